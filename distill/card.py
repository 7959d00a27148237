"""The model card of an export, made from its lineage: data, stages, scores, licence.

stage-4 recipe, the refiner's manifest, scores.json where the run has been evaluated -> README.md
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from distill.errors import UserError
from distill.state import lineage
from distill.state.lineage import Manifest
from evaluation.metrics import METRICS
from evaluation.tables import arrow, present, setting, title
from evaluation.verdict import mean
from student.card import card
from student.causal_dit import StreamConfig

SHOWN = ("teacher", "teacher_few_step", "online_lpm")


def export_card(stream: StreamConfig, refiner: Manifest, report: Path) -> str:
    """The whole card; `report` may hold scores.json."""
    scores = json.loads((report / "scores.json").read_text()) if (report / "scores.json").is_file() else {}
    sections = {"Data": _data(refiner), "Stages": _stages(refiner)}
    if scores:
        sections["Scores"] = _scores(scores)
    sections["Licence"] = (
        "Apache-2.0, weights and code. The characters are drawn; no real person is depicted. Enclosed recordings are "
        "synthesized speech."
    )
    return card(stream, f"Online LPM ({refiner.scale})", sections, _results(scores))


def _data(refiner: Manifest) -> str:
    facts = refiner.recipe.get("data", {}).get("prepare", {})
    people, clips = (facts.get(f"train_{what}", "?") for what in ("identities", "clips"))
    return (
        f"The procedural puppet world: {people} drawn characters with {clips} clips each, moved by synthesized and "
        f"recorded speech (data fingerprint {refiner.data.get('data_fingerprint')}). Characters, sentences and voice "
        "of the scores are held out."
    )


def _stages(refiner: Manifest) -> str:
    """Youngest first: what each stage trained on and how long, and the tree that leads there."""
    rows = ["| stage | recipe | rollout | terms | steps | manifest |", "|---|---|---|---|---:|---|"]
    manifest: Manifest | None = refiner
    while manifest is not None:
        told = manifest.recipe
        terms = [f"{name} ({phase['update']})" for phase in told.get("phases", []) for name in phase["terms"]]
        rollout = (told.get("rollout") or {}).get("kind", "–")
        rows.append(
            f"| {manifest.stage} | {manifest.data.get('name')} | {rollout} | {', '.join(terms) or '–'} | "
            f"{manifest.step} | {manifest.hash[:12]} |"
        )
        manifest = _parent(manifest)
    return "\n".join([*rows, "", "```", lineage.tree(refiner.path), "```"])


def _parent(manifest: Manifest) -> Manifest | None:
    try:
        parent = manifest.data.get("parent")
        return lineage.read(parent["path"]) if parent else None
    except UserError:  # a pruned ancestor: the tree says so
        return None


def _scores(scores: dict[str, Any]) -> str:
    rows = [row for row in present(scores) if row in SHOWN]
    about = setting(scores, bool(scores.get("about", {}).get("quick")))
    lines = [about, "", f"| | {' | '.join(title(row) for row in rows)} |", "|---" + "|---:" * len(rows) + "|"]
    for metric in METRICS:
        values = [mean(scores, row, metric.key) for row in rows]
        cells = ["–" if value is None else metric.show(value) for value in values]
        lines.append(f"| {metric.label} {arrow(metric)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _results(scores: dict[str, Any]) -> list[dict[str, Any]]:
    """The scores as the Hub's model-index wants them."""
    found = [(metric, mean(scores, "online_lpm", metric.key)) for metric in METRICS] if "online_lpm" in scores else []
    return [
        {"type": metric.key, "name": metric.label.lstrip("… "), "value": round(value, metric.digits)}
        for metric, value in found
        if value is not None
    ]
