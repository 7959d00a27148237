"""How far a grid is: what lies on the disk already, what it will still take, and GRID.json, which tells it to others.

A job is done when its folder says so and holds what the grid asks for; a folder made from something else is never
overwritten, it marks the job as failed with the reason. What another grid has made to the same key is not made again:
the cell's stage, and its report where it was scored in the same way, become links to that one's.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from distill.config import load, to_yaml
from distill.errors import ExitCode, UserError
from distill.grid import SCORE, Job, Plan
from distill.runs import RESOLVED, RUNS, read_status, run_folder, write_json
from distill.schema import differing_keys
from distill.state import checkpoint

UNKNOWN_SECONDS = 60.0  # for the bar alone, where nothing is known about a job
CARD = "job.json"  # in every run folder of a grid and in every report of a cell: what made it
STATE = "GRID.json"


@dataclass
class Progress:
    """By key: waiting, running, done, failed or stopped; why; the seconds of those that ended in this call."""

    state: dict[str, str] = field(default_factory=dict)
    reason: dict[str, str] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    def fail(self, plan: Plan, job: Job, why: str) -> None:
        """Mark a job, and everything that needs it, for the same reason."""
        for other in plan.jobs.values():
            if any(part.key == job.key for part in plan.chain(other.key)):
                self.state[other.key], self.reason[other.key] = "failed", why


def survey(plan: Plan) -> Progress:
    """What is on the disk."""
    progress = Progress({job.key: "done" if is_done(job) else "waiting" for job in plan.jobs.values()})
    progress.state |= dict.fromkeys(elsewhere(plan), "done")
    for job in plan.jobs.values():
        why = holds_other(job)
        if why:
            progress.fail(plan, job, why)
    return progress


def is_done(job: Job) -> bool:
    """Whether an earlier process finished this very job."""
    if job.stage == SCORE:
        return _read(job.folder / "report" / CARD).get("key") == job.key
    if job.stage == "trajectories":
        return (job.folder / job.stage / checkpoint.MANIFEST).is_file()
    card = _read(job.folder / CARD)
    return card.get("key") == job.key and read_status(job.folder / job.stage).get("status") == "done"


def elsewhere(plan: Plan) -> dict[str, Path]:
    """Key -> stage or report of the same key in another run folder, of the cells' jobs that have none of their own."""
    missing = [job for job in ends(plan) if not place(job).exists()]
    made: dict[Any, Path] = {}
    for path in RUNS.glob(f"*/*/{CARD}") if missing else ():
        card, report = _read(path), path.parent / "report"
        stage = path.parent / str(card.get("stage"))
        if read_status(stage).get("status") == "done" and not stage.is_symlink():
            made[card.get("key")] = stage
        if not report.is_symlink():
            made[_read(report / CARD).get("key")] = report
    return {job.key: made[job.key] for job in missing if job.key in made}


def ends(plan: Plan) -> list[Job]:
    """The last stage and the score of every cell: what lies in the grid's own folders."""
    return [plan.jobs[part] for key in plan.cells.values() for part in (*plan.jobs[key].needs, key)]


def place(job: Job) -> Path:
    """The folder that a job fills."""
    return job.folder / ("report" if job.stage == SCORE else job.stage)


def stale(job: Job) -> bool:
    """Is the job's place a link to what has become something else?"""
    return place(job).is_symlink() and not is_done(job)


def holds_other(job: Job) -> str:
    """Why the job's folder cannot take it, "" when it can."""
    kept = job.folder / job.stage / RESOLVED
    if job.stage == SCORE or _read(job.folder / CARD).get("key") == job.key or not kept.is_file():
        return ""
    old = yaml.safe_load(kept.read_text(encoding="utf-8")) or {}
    new = yaml.safe_load(to_yaml(load(job.recipe, job.overrides, job.variant)))
    what = ", ".join(differing_keys(old, new)[:4]) or "the code of its losses, its data, its teacher or its parent"
    return f"{job.folder} was made from something else ({what}): rename the cell, or delete that folder"


def rows(plan: Plan, progress: Progress) -> list[tuple[str, str, str, str, str]]:
    """(cell, seed, state, seconds in this call, reason) of every cell."""
    out = []
    for (cell, seed), key in plan.cells.items():
        chain = [job.key for job in plan.chain(key)]
        states = {progress.state[part] for part in chain}
        now = next((word for word in ("running", "stopped") if word in states), progress.state[key])
        seconds = sum(progress.seconds.get(part, 0.0) for part in chain)
        out.append((cell, str(seed), now, f"{seconds:.0f}" if seconds else "-", progress.reason.get(key, "")))
    return out


def predicted(plan: Plan, job: Job) -> float | None:
    """Seconds of a job: as those like it took, else as the grid expects, None where nothing is known."""
    took = [_taken(other) for other in plan.jobs.values() if other.family == job.family and is_done(other)]
    known = [seconds for seconds in took if seconds]
    return sum(known) / len(known) if known else job.expected


def left(plan: Plan, progress: Progress) -> tuple[float, int]:
    """(predicted seconds of what is not done, number of jobs whose time is not known)."""
    open_jobs = [job for job in plan.jobs.values() if progress.state[job.key] in ("waiting", "running", "stopped")]
    seconds = [predicted(plan, job) for job in open_jobs]
    return sum(part for part in seconds if part is not None), sum(part is None for part in seconds)


def spent(plan: Plan, progress: Progress, expected: dict[str, float]) -> float:
    """Expected seconds of the jobs that ended in this call, and of the running ones as far as their steps say."""
    total = sum(expected.get(key, 0.0) for key in progress.seconds)
    for key in [key for key, state in progress.state.items() if state == "running"]:
        job = plan.jobs[key]
        share = float(read_status(job.folder / job.stage).get("step", 0)) / job.steps if job.steps else 0.0
        total += min(1.0, share) * expected.get(key, 0.0)
    return total


def write_state(plan: Plan, progress: Progress) -> None:
    """runs/<grid>/GRID.json, when something has changed."""
    keys = ("cell", "seed", "state", "seconds", "reason")
    cells = [dict(zip(keys, row, strict=True)) for row in rows(plan, progress)]
    state = {"name": plan.grid.name, "baseline": plan.baseline, "cells": cells}
    path = run_folder(plan.run) / STATE
    if _read(path) != state:
        write_json(path, state)


def done_cells(folder: Path) -> list[tuple[str, int]]:
    """(cell, seed) of what a grid has finished; UserError when there is nothing."""
    cells = json.loads((folder / STATE).read_text(encoding="utf-8"))["cells"]
    done = [(cell["cell"], cell["seed"]) for cell in cells if cell["state"] == "done"]
    if not done:
        raise UserError(f"The grid {folder} has no finished cell: run `make ablate` with it first.", ExitCode.DATA)
    return done


def _taken(job: Job) -> float:
    if job.stage == SCORE:
        return float(_read(job.folder / "report" / CARD).get("seconds", 0.0))
    return float(_read(job.folder / "timings.json").get(job.stage, 0.0))


def _read(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return {}
