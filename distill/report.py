"""Put the report of a run together: scores, drift curves, loss curves, a contact sheet, films with sound, lineage."""

from __future__ import annotations

import json
from pathlib import Path

from torch import Tensor

from distill.data.dataset import LatentDataset
from distill.errors import ExitCode, UserError
from distill.evaluate import Bench
from distill.state import checkpoint, lineage
from evaluation.bench import decode
from evaluation.drift import Drift
from evaluation.metrics import ROWS, STAGES
from evaluation.plots import Chart, Node
from evaluation.report import Figure, drift_charts, loss_charts, write_report
from evaluation.scores import load_values
from evaluation.video import as_image, contact_sheet, mp4_bytes, png_bytes, side_by_side

FILMED = {"speaking": 1, "listening": 2}  # state of the clip that is filmed
SHOWN = ("data", "teacher", "teacher_few_step", "undistilled", "stage3", "online_lpm")  # rows in pictures and films
PAST_SAMPLES = 24000  # 1.5 s before the first frame


def assemble(folder: Path, bench: Bench) -> Path:
    """Write runs/<run>/report/index.html and report.md from what `evaluate` kept."""
    path = folder / "report" / "scores.json"
    if not path.is_file():
        raise UserError(f"{path} is missing: run `make evaluate` first.", ExitCode.DATA)
    scores = json.loads(path.read_text())
    rows = [row for row in ROWS if (bench.folder / row / "latents.safetensors").is_file()]
    drifts = {
        row: Drift(**load_values(bench.folder / row / "drift.safetensors"))
        for row in rows
        if (bench.folder / row / "drift.safetensors").is_file()
    }
    losses = [chart for stage in STAGES for chart in _losses(folder / stage)]
    return write_report(
        folder / "report",
        scores,
        drift_charts(drifts),
        losses,
        _figures(bench, rows),
        _family(folder),
        bool(scores["about"]["quick"]),
    )


def _losses(stage: Path) -> list[Chart]:
    metrics = stage / "metrics.jsonl"
    return loss_charts(stage.name, metrics) if metrics.is_file() else []


def _figures(bench: Bench, rows: list[str]) -> list[Figure]:
    """A contact sheet of three clips, and one film per state with all rows side by side."""
    shown = [row for row in SHOWN if row in rows]
    clips: dict[str, Tensor] = {row: bench.latents(row) for row in shown}
    chosen = [_first(bench, state) for state in FILMED.values()]
    sheet = [(row, decode(bench.codec, clips[row][i : i + 1])[0]) for i in chosen for row in shown]
    caption = "Same character, same audio; time runs to the right."
    figures = [Figure("Contact sheet", caption, png_bytes(contact_sheet(sheet)), "png")]
    for (name, _), index in zip(FILMED.items(), chosen, strict=True):
        panels: dict[str, Tensor] = {row: decode(bench.codec, clips[row][index : index + 1])[0] for row in shown}
        wave = _heard(bench.test, bench, index)
        film = side_by_side(panels, scale=3)
        poster = png_bytes(as_image(film[len(film) // 2]))
        caption = bench.test.captions[index]
        figures.append(Figure(name.capitalize(), caption, mp4_bytes(film, wave, scale=1), "mp4", poster))
    return figures


def _first(bench: Bench, state: int) -> int:
    """The first clip that is in `state` from beginning to end, else the first clip."""
    whole = (bench.batch.state == state).all(1).nonzero().flatten().tolist()
    return whole[0] if whole else 0


def _heard(data: LatentDataset, bench: Bench, index: int) -> Tensor:
    speak, listen = data.waves(bench.batch.index[index : index + 1])
    return (speak + listen)[0, PAST_SAMPLES:]


def _family(folder: Path) -> list[Node]:
    """One node per checkpoint, from the manifests."""
    nodes: list[Node] = []
    names: dict[str, str] = {}
    for name in ("teacher", "ar-teacher", "trajectories", *STAGES, "online-lpm"):
        place = folder / name
        if not place.is_dir() or (not (place / checkpoint.MANIFEST).is_file() and not (place / "checkpoints").is_dir()):
            continue
        manifest = lineage.read(place)
        parent = manifest.data.get("parent") or {}
        above = parent.get("manifest_sha256")
        if above and above not in names:
            names[above] = str(parent.get("stage", "teacher"))
            nodes.append(Node(names[above], f"kept · {above[:8]}", None))
        names[manifest.hash] = name
        nodes.append(Node(name, f"step {manifest.step} · {manifest.hash[:8]}", names.get(above) if above else None))
    return nodes
