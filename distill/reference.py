"""Reference bands: where the curves of a healthy run lie, measured over seeds and kept in recipes/<scale>/bands/.

A band is of one setting: the recipe without what cannot change a curve, the data, the teacher, the parent's recipe. It
speaks where all of these are the same, up to the step it was measured at: `inside band`, or `outside band: train/dmd
0.41 (0.22..0.30)`.

Of the values y[s, k] of S seeds at logged step k, low and high hold a further run with probability .999 per value (the
prediction interval of Student's t), the variance being pooled over `POOLED` logged steps on either side; and they hold
what was measured. Curves that stay above rounding are taken by their logarithm: what varies in a loss is a share of it.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distill.config import Recipe
from evaluation.bootstrap import student_quantile

POOLED = 2
RARE = 0.001  # share of healthy values outside
SHOWN = 3  # curves named in a line
# What another CPU or number of threads may make of a 0, and as a share of a value: the gauges of a parent that all
# seeds begin with have no spread, and the same training elsewhere has them to three digits (docs/LOG.md).
ROUNDING, ELSEWHERE = 1e-6, 1e-3
# What changes no curve, or is known in another form (data and teacher by their hashes, the parent by its recipe).
ASIDE = ("name", "seed", "parent", "teacher", "data", "evaluation", "health", "gate")
ASIDE_TRAIN = ("sample_every", "save_every", "keep", "max_nonfinite")
Curve = dict[int, tuple[float, float, float]]  # logged step -> mean, low, high


@dataclass(frozen=True)
class Origin:
    """What a run is made of, as far as it decides its curves."""

    settings: str
    data: str | None = None  # what made it, not its content: that differs in rounding from CPU to CPU
    teacher: str | None = None
    parent: str | None = None  # settings of the parent's recipe, with its steps


@dataclass(frozen=True)
class Band:
    """The curves of one setting over seeds."""

    origin: Origin
    steps: int
    curves: dict[str, Curve]
    about: dict[str, Any] = field(default_factory=dict)  # seeds, variant, code, cost: for the reader

    def outside(self, step: int, values: Mapping[str, float]) -> list[str]:
        """`tag value (low..high)` of every value outside, the farthest first; NaN and unknown tags are not judged."""
        found = []
        for tag, value in values.items():
            known = self.curves.get(tag, {}).get(step)
            if known is None:
                continue
            _, low, high = known
            room = ROUNDING + ELSEWHERE * max(abs(low), abs(high))
            if value < low - room or value > high + room:
                far = max(low - value, value - high) / max(high - low, 1e-12)
                found.append((far, f"{tag} {value:.3g} ({low:.3g}..{high:.3g})"))
        return [text for _, text in sorted(found, reverse=True)]

    def knows(self, step: int, values: Mapping[str, float]) -> bool:
        """Whether anything can be said about these values."""
        return step <= self.steps and any(step in self.curves.get(tag, {}) for tag in values)


@dataclass(frozen=True)
class Reference:
    """The band that fits a run, if there is one; else `why` not."""

    band: Band | None = None
    why: str = ""

    def compare(self, step: int, values: Mapping[str, float]) -> str:
        """`inside band`, `outside band: ...`, or nothing where nothing was measured."""
        if self.band is None or not self.band.knows(step, values):
            return ""
        outside = self.band.outside(step, values)
        more = f" and {len(outside) - SHOWN} more" if len(outside) > SHOWN else ""
        return f"outside band: {', '.join(outside[:SHOWN])}{more}" if outside else "inside band"


def settings(resolved: Mapping[str, Any], whole: bool = False) -> str:
    """Hash of a resolved recipe without what changes no curve: at constant rates not even the number of steps. `whole`
    keeps that all the same: what a parent has become does depend on it."""
    kept = {key: value for key, value in resolved.items() if key not in ASIDE}
    kept["train"] = {key: value for key, value in (kept.get("train") or {}).items() if key not in ASIDE_TRAIN}
    level = all(one["schedule"] == "constant" for one in (kept.get("optimizer") or {}).values())
    if level and not whole:
        del kept["train"]["steps"]
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()[:16]


def find(folder: Path, origin: Origin) -> Reference:
    """The band of `origin` among the files of a folder."""
    same = [
        band for path in sorted(folder.glob("*.json")) for band in read(path) if band.origin.settings == origin.settings
    ]
    for band in same:
        if band.origin == origin:
            return Reference(band)
    if not same:
        return Reference(why="no band was measured with these settings")
    other = [what for what in ("data", "teacher", "parent") if getattr(same[0].origin, what) != getattr(origin, what)]
    return Reference(why=f"the band of these settings was measured with another {' and another '.join(other)}")


def bands_of(recipe: Recipe) -> Path:
    """Where the bands of a scale are kept."""
    return Path("recipes") / recipe.scale / "bands"


def read(path: Path) -> list[Band]:
    """The bands of a file."""
    found = []
    for entry in json.loads(path.read_text(encoding="utf-8")):
        curves = {
            tag: {int(step): (values[0], values[1], values[2]) for step, values in curve.items()}
            for tag, curve in entry["curves"].items()
        }
        found.append(Band(Origin(**entry["origin"]), entry["steps"], curves, entry["about"]))
    return found


def as_json(bands: Sequence[Band]) -> str:
    """The text of a file of bands, a line per curve: what changes can be read in a diff."""
    entries = []
    for band in bands:
        curves = ",\n".join(f"   {json.dumps(tag)}: {json.dumps(curve)}" for tag, curve in sorted(band.curves.items()))
        head = {"origin": vars(band.origin), "steps": band.steps, "about": band.about}
        entries.append(f' {json.dumps(head, sort_keys=True)[:-1]},\n  "curves": {{\n{curves}\n  }}}}')
    return "[\n" + ",\n".join(entries) + "\n]\n"


# ---- from curves to bands ---------------------------------------------------------------------------------


def measured(origin: Origin, runs: Sequence[Path], steps: int, about: dict[str, Any]) -> Band:
    """The band of several runs' metrics.jsonl up to `steps`."""
    curves = [curves_of(path, steps) for path in runs]
    tags = sorted(set.intersection(*(set(curve) for curve in curves)))
    return Band(origin, steps, {tag: band_of([curve[tag] for curve in curves]) for tag in tags}, about)


def curves_of(metrics: Path, steps: int) -> dict[str, dict[int, float]]:
    """metrics.jsonl -> {tag: {step: value}} of losses, gauges, gradient norms and updates; time and level are not."""
    curves: dict[str, dict[int, float]] = {}
    for line in metrics.read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        for tag, value in record.items():
            wanted = tag.startswith(("train/", "health/", "optim/grad_norm_", "optim/update_"))
            number = isinstance(value, int | float) and math.isfinite(value)
            if wanted and number and tag != "health/level" and record["step"] <= steps:
                curves.setdefault(tag, {})[record["step"]] = float(value)
    return curves


def band_of(seeds: Sequence[Mapping[int, float]]) -> Curve:
    """Curves of S >= 2 seeds -> mean, low, high at the steps that all have, rounded outwards to four digits."""
    steps = sorted(set.intersection(*(set(curve) for curve in seeds)))
    values = torch.tensor([[curve[step] for step in steps] for curve in seeds], dtype=torch.float64)  # [S, K]
    positive = bool((values > ROUNDING).all())
    scaled = values.log() if positive else values
    half = half_width(scaled)
    low = torch.minimum(scaled.mean(0) - half, scaled.amin(0))
    high = torch.maximum(scaled.mean(0) + half, scaled.amax(0))
    low, high = (low.exp(), high.exp()) if positive else (low, high)
    rows = zip(steps, values.mean(0).tolist(), low.tolist(), high.tolist(), strict=True)
    return {step: (_rounded(m, 0), _rounded(a, -1), _rounded(b, 1)) for step, m, a, b in rows}


def half_width(values: Tensor) -> Tensor:
    """[S, K] -> [K]: half of the interval that holds a further run's value."""
    seeds, steps = values.shape
    variance = values.var(0)
    out = []
    for k in range(steps):
        near = variance[max(0, k - POOLED) : k + POOLED + 1]
        df = (seeds - 1) * len(near)
        out.append(student_quantile(df, 1 - RARE / 2) * (near.mean() * (1 + 1 / seeds)).sqrt())
    return torch.stack(out)


def _rounded(value: float, direction: int) -> float:
    if value == 0 or not math.isfinite(value):
        return value
    unit = 10.0 ** (math.floor(math.log10(abs(value))) - 3)
    turn = (math.floor, round, math.ceil)[direction + 1]
    return float(f"{turn(value / unit) * unit:.4g}")
