"""Score one stage of a run: its student on the held-out clips and streams, kept per clip for paired comparisons.

runs/<run>/<stage> -> runs/<run>/report/{scores.json, rows/<stage>/}. The recipe is the one kept in the stage's folder,
so that a run can be scored without the files it was started from; `--set evaluation.clips=16` changes the measurement.
"""

from __future__ import annotations

import time
from pathlib import Path

from distill.config import Recipe, load
from distill.errors import UserError
from distill.evaluate import Bench, measure_all, student_row
from distill.options import Options
from distill.roles import network
from distill.runs import RESOLVED, existing_run, read_status
from distill.state import lineage
from evaluation.bench import BenchConfig
from evaluation.scores import write_scores
from student.causal_dit import CausalDiT

STUDENTS = ("stage1", "stage2", "stage3", "stage4")


def score(options: Options) -> str:
    """Measure the last finished stage of RUN=, or --stage."""
    folder = existing_run(options.run)
    stage = options.own.get("stage") or last_stage(folder)
    if stage not in STUDENTS or not (folder / stage / RESOLVED).is_file():
        there = [name for name in STUDENTS if (folder / name / RESOLVED).is_file()]
        raise UserError(f"{folder} has no stage '{stage}' to score: STAGE is one of {', '.join(there) or 'none yet'}.")
    recipe = load(folder / stage / RESOLVED, options.overrides)
    bench = Bench(Path(recipe.data.path), recipe.evaluation or BenchConfig(), folder / "report" / "rows")
    source, nets = students(folder, stage, recipe)
    began = time.perf_counter()
    values, _ = measure_all(bench, [student_row(bench, stage, source, *nets)], print)
    about = {
        "quick": options.variant is not None,
        "clips": len(bench.batch),
        "characters": len(set(bench.batch.identity.tolist())),
        "stream_seconds": bench.config.stream_seconds,
    }
    write_scores(folder / "report" / "scores.json", values, {"evaluation": time.perf_counter() - began}, about)
    return f"Wrote {folder / 'report' / 'scores.json'}; next: make compare RUNS='{options.run} ...'."


def students(folder: Path, stage: str, recipe: Recipe) -> tuple[str, list[CausalDiT]]:
    """The hash of a stage's newest checkpoint, and its averaged student; behind its backbone, where it is a refiner."""
    manifest = lineage.read(folder / stage)
    nets = [CausalDiT(network(recipe.model, manifest, "ema").eval(), recipe.student)]
    if stage == "stage4":  # the refiner works behind the backbone that it was trained with
        backbone = lineage.read(str((manifest.data.get("parent") or {}).get("path")))
        lineage.require(backbone, stage="stage3", hash=manifest.parent_hash)
        nets.insert(0, CausalDiT(network(recipe.model, backbone, "ema").eval(), recipe.student))
    return manifest.hash, nets


def last_stage(folder: Path) -> str:
    """The latest stage of a run that is done; UserError when there is none."""
    done = [stage for stage in STUDENTS if read_status(folder / stage).get("status") == "done"]
    if not done:
        raise UserError(f"{folder} has no finished stage to score: run `make distill-stage1 RUN={folder.name}` first.")
    return done[-1]
