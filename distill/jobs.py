"""Run the jobs of a grid as processes: the same commands that a user would type, some at once, what is needed first.

Ctrl-C once: every running process saves and ends, nothing new starts; twice: all stop at once. A process that fails
marks what needs it and the others go on. What a process says goes to runs/<grid>/logs/<cell>-<stage>.txt.
"""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from tqdm import tqdm

from distill import progress as standing
from distill.errors import ExitCode
from distill.grid import SCORE, Job, Plan
from distill.progress import CARD, Progress
from distill.runs import run_folder, write_json
from distill.tracking import StopSignal, clock

POLL_SECONDS = 0.1
BAR = "{desc}: {percentage:3.0f}% |{bar}| {elapsed}, ETA {remaining}"


@dataclass
class Running:
    """A process at work."""

    job: Job
    process: subprocess.Popen[bytes]
    log: TextIO
    began: float


def link(plan: Plan) -> None:
    """Lay links to what other grids have made to the same keys; take away those that no longer hold."""
    for job in standing.ends(plan):
        if standing.stale(job):
            standing.place(job).unlink()
    for key, source in standing.elsewhere(plan).items():
        job, place = plan.jobs[key], standing.place(plan.jobs[key])
        _lay_out(plan, job)
        place.symlink_to(os.path.relpath(source, place.parent), target_is_directory=True)
        print(f"{place}: the same as {source}, linked")


def run_all(plan: Plan, progress: Progress, count: int, stop: StopSignal) -> None:
    """Run what waits, `count` processes at once, until all is done, failed, or `stop` is requested."""
    running: list[Running] = []
    passed_on = False
    todo = [job for job in plan.jobs.values() if progress.state[job.key] == "waiting"]
    expected = {job.key: standing.predicted(plan, job) or standing.UNKNOWN_SECONDS for job in todo}
    whole = sum(expected.values())
    with tqdm(total=whole, desc=plan.run, bar_format=BAR, disable=not sys.stderr.isatty()) as bar:
        try:
            while True:
                for ended in [one for one in running if one.process.poll() is not None]:
                    running.remove(ended)
                    _finish(plan, progress, ended)
                if stop.requested and not passed_on:
                    passed_on = True
                    for one in running:
                        one.process.send_signal(signal.SIGTERM)
                for job in [] if stop.requested else _ready(plan, progress)[: count - len(running)]:
                    running.append(_start(plan, job, count))
                    progress.state[job.key] = "running"
                    tqdm.write(f"{_label(plan, job)}: started")
                standing.write_state(plan, progress)
                if not running:
                    return
                bar.n = round(min(whole, standing.spent(plan, progress, expected)), 1)
                bar.refresh()
                time.sleep(POLL_SECONDS)
        finally:  # a second ctrl-C, or a mistake of ours: leave no process behind
            for one in running:
                one.process.kill()
                progress.state[one.job.key] = "stopped"
            standing.write_state(plan, progress)


def command(job: Job) -> list[str]:
    """What a user would type to do a job alone."""
    out = [sys.executable, "-m", "distill", job.stage, "--run", job.run]
    out += ["--recipe", str(job.recipe)] if job.stage != SCORE else []
    out += ["--set", shlex.join(job.overrides)] if job.overrides else []
    out += ["--parent", job.parent] if job.parent else []
    return out + ([f"--{job.variant}"] if job.variant else [])


def _ready(plan: Plan, progress: Progress) -> list[Job]:
    """Jobs whose needs are done, in the grid's order: the first cell's result comes first."""
    waiting = [job for job in plan.jobs.values() if progress.state[job.key] == "waiting"]
    return [job for job in waiting if all(progress.state[key] == "done" for key in job.needs)]


def _start(plan: Plan, job: Job, count: int) -> Running:
    _lay_out(plan, job)
    path = _log(plan, job)
    path.parent.mkdir(parents=True, exist_ok=True)
    log = open(path, "a", encoding="utf-8")
    words = command(job)
    print(f"$ {shlex.join(['python', *words[1:]])}", file=log, flush=True)
    environment = dict(os.environ)
    if count > 1:
        environment.setdefault("OMP_NUM_THREADS", str(max(1, _cores() // count)))
    # In a session of its own: ctrl-C reaches this process alone, which passes it on once.
    process = subprocess.Popen(
        words, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, start_new_session=True, env=environment
    )
    return Running(job, process, log, time.monotonic())


def _lay_out(plan: Plan, job: Job) -> None:
    """The run folder with its card, and its shared stages as links to where they were made."""
    job.folder.mkdir(parents=True, exist_ok=True)
    for stage, run in job.links:
        link = job.folder / stage
        if link.is_symlink():
            link.unlink()
        link.symlink_to(os.path.relpath(run_folder(run) / stage, job.folder))
    if job.stage != SCORE:
        cells = {plan.jobs[end].needs[0]: name for name, end in plan.cells.items()}
        cell, seed = cells.get(job.key, ("", 0))
        write_json(job.folder / CARD, {"key": job.key, "stage": job.stage, "cell": cell, "seed": seed})


def _finish(plan: Plan, progress: Progress, ended: Running) -> None:
    ended.log.close()
    job, status = ended.job, ended.process.returncode
    seconds = progress.seconds[job.key] = time.monotonic() - ended.began
    label, took = _label(plan, job), clock(seconds)
    if status == ExitCode.DONE:
        if job.stage == SCORE:
            write_json(job.folder / "report" / CARD, {"key": job.key, "seconds": seconds})
        progress.state[job.key] = "done"
        tqdm.write(f"{label}: done in {took}")
    elif status in (ExitCode.STOPPED, ExitCode.INTERRUPTED, -signal.SIGTERM):  # the last: it had nothing to save yet
        progress.state[job.key] = "stopped"
        tqdm.write(f"{label}: stopped and saved after {took}")
    else:
        said = _log(plan, job).read_text(encoding="utf-8", errors="replace").strip().splitlines()
        why = f"{said[-1].strip()} (exit {status}, {_log(plan, job)})"
        progress.fail(plan, job, why)
        tqdm.write(f"{label}: FAILED: {why}")


def _label(plan: Plan, job: Job) -> str:
    return f"{job.run.removeprefix(f'{plan.run}/')} {job.stage}"


def _log(plan: Plan, job: Job) -> Path:
    return run_folder(plan.run) / "logs" / f"{job.run.rpartition('/')[2]}-{job.stage}.txt"


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
