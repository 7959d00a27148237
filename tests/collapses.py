"""Collapses made on purpose: does the verdict name each, and when, against the loss?

    python tests/collapses.py PARENT [steps] [name ...]      trains into runs/collapses/, some at a time if named
    python tests/collapses.py table                          the table of what lies there

Stage 2 of the tiny scale from PARENT, whose run holds the trajectories, with the prepared data and the kept teacher:
three healthy seeds, and the same recipe with the student's learning rate x30, with a critic that does not move, with
guidance 20, with audio that is all silent. The loss has left the healthy band at the first logged step where train/dmd
lies outside the interval of the healthy seeds (distill/reference.py). Every student update is logged; no pictures are
made, so that the verdicts are those of cheap signals alone.
"""

from __future__ import annotations

import re
import sys
from dataclasses import replace
from pathlib import Path

import torch

from distill.config import load
from distill.data import dataset
from distill.data.batch import Batch
from distill.engine import Engine
from distill.reference import band_of, curves_of
from distill.roles import build_roles, find_teacher
from distill.runs import StageRun
from distill.state import lineage
from distill.trainer import Source, Trainer
from distill.trajectories import Trajectories
from teacher.conditions import SILENCE

RECIPE = Path("recipes/tiny/stage2_dmd.yaml")
PLACE = Path("runs/collapses")
HEALTHY = {f"healthy-{seed}": (f"seed={seed}",) for seed in range(3)}
COLLAPSES = {
    "lr-x30": ("optimizer.student.lr=1.5e-3",),
    "no-critic": ("optimizer.critic.lr=0.0",),
    "guidance-20": ("phases.1.terms.dmd.cfg={text: 20.0, audio: 20.0}",),
    "silent-audio": (),
}


class Silent:
    """A source whose audio is lost on the way, while states and pictures stay."""

    def __init__(self, source: Source):
        self.source, self.fingerprint, self.made_by = source, source.fingerprint, source.made_by

    def sample(self, batch_size: int, generator: torch.Generator) -> Batch:
        batch = self.source.sample(batch_size, generator)
        lost = {name: torch.full_like(getattr(batch.cond, name), SILENCE) for name in ("speak", "listen")}
        return replace(batch, cond=replace(batch.cond, **lost))


def train(name: str, parent: Path, steps: int) -> None:
    """One run into runs/collapses/<name>, never stopped by its verdict."""
    changes = {**HEALTHY, **COLLAPSES}[name]
    recipe = load(RECIPE, (*changes, f"train.steps={steps}", "train.log_every=2", "health.stop=never"))
    above = lineage.read(parent)
    data, folder = Path(recipe.data.path), PLACE / name
    clips = dataset.load(data, "train")
    teacher = find_teacher(recipe, folder)
    source: Source = Trajectories(parent.parent / "trajectories", clips, recipe.student.steps)
    roles = build_roles(recipe, teacher, above, data)
    roles.trajectories = source
    folder.mkdir(parents=True, exist_ok=True)
    run = StageRun(folder, done=False)
    source = Silent(source) if name == "silent-audio" else source
    Trainer(recipe, run, roles, source, Engine(recipe.train.precision), above).fit()


def table() -> str:
    """Per run: the first step at which the verdict was not healthy, its words; the first at which the loss was out."""
    healthy = [curves_of(PLACE / name / "metrics.jsonl", 10**6).get("train/dmd", {}) for name in HEALTHY]
    band = band_of(healthy) if all(healthy) else {}
    lines = []
    for name in (*HEALTHY, *COLLAPSES):
        folder = PLACE / name
        if not (folder / "metrics.jsonl").is_file():
            continue
        said = re.findall(r"step (\d+): ((?:watch|STOP): .*)", (folder / "log.txt").read_text(encoding="utf-8"))
        curve = curves_of(folder / "metrics.jsonl", 10**6).get("train/dmd", {})  # nothing before the first update
        out = [step for step, value in curve.items() if step in band and not band[step][1] <= value <= band[step][2]]
        named = f"step {said[0][0]}: {said[0][1]}" if said else "healthy throughout"
        left = f"step {out[0]}" if out else f"never in {max(curve, default=0)} steps"
        lines.append(f"{name:13} {named:90} loss outside: {left}")
    return "\n".join(lines)


if __name__ == "__main__":
    torch.set_num_threads(1)
    if sys.argv[1:] == ["table"]:
        print(table())
    else:
        count = int(sys.argv[2]) if len(sys.argv) > 2 else 24
        for chosen in sys.argv[3:] or (*HEALTHY, *COLLAPSES):
            train(chosen, Path(sys.argv[1]), count)
        print(table())
