"""`make ablate GRID=recipes/ablations/<name>.yaml [JOBS=n] [DRY=1]`: train and score every cell with every seed.

What is done is not done again: shared stages, cells of an earlier call, what other grids have in common with this one.
Ctrl-C lets the running jobs save, the same command goes on; a failed cell is marked with its reason and tried again the
next time.
"""

from __future__ import annotations

from pathlib import Path

from distill.config import load
from distill.errors import ExitCode, UserError
from distill.grid import SCORE, SHARED, Choice, Plan, plan
from distill.jobs import link, run_all
from distill.listing import columns
from distill.options import Options
from distill.pipeline import need_data
from distill.progress import left, rows, survey
from distill.runs import run_folder, write_text
from distill.tracking import StopSignal


def ablate(options: Options) -> str:
    """Run the grid GRID=; with DRY=1 only say what would run."""
    if not options.own.get("grid"):
        raise UserError("No grid was named: give GRID=recipes/ablations/stage1_losses.yaml.")
    path, count = Path(options.own["grid"]), _count(options.own.get("jobs", ""))
    _there(path)
    asked = Choice(
        options.own.get("name", ""), options.variant, options.overrides, _seeds(options), options.parent or ""
    )
    found = plan(path, asked)
    if options.own.get("dry"):
        return describe(found, count)
    first = next(iter(found.jobs.values()))
    need_data(load(first.recipe, first.overrides, first.variant))
    found = plan(path, asked)  # the keys hold the data's fingerprint, which exists by now
    folder = run_folder(found.run)
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "grid.yaml", path.read_text(encoding="utf-8"))
    print(describe(found, count), flush=True)
    link(found)
    progress = survey(found)
    with StopSignal() as stop:
        run_all(found, progress, count, stop)
    told = rows(found, progress)
    print(columns(told, ("cell", "seed", "state", "seconds", "why")))
    if stop.requested:
        raise UserError("Stopped and saved; the same command goes on.", ExitCode.STOPPED)
    done = sum(state == "done" for _, _, state, *_ in told)
    text = f"Wrote {folder}: {done} of {len(told)} cells are done; next: make compare RUNS={found.run}."
    if done < len(told):
        raise UserError(f"{text} The same command tries the failed ones again.")
    return text


def _there(path: Path) -> None:
    """UserError where no file is, with the grids that there are."""
    if not path.is_file():
        found = sorted(Path("recipes/ablations").glob("*.yaml"))
        shipped = ", ".join(grid.name for grid in found if not grid.stem.startswith("base"))
        raise UserError(f"There is no grid {path}: recipes/ablations/ holds {shipped or 'none'}.")


def describe(found: Plan, count: int = 1) -> str:
    """The cells with their stages and how far they are, and the minutes that are still predicted."""
    progress = survey(found)
    lines = []
    for (cell, seed), key in found.cells.items():
        chain = [job for job in found.chain(key) if job.stage != SCORE]
        places = [job.run.partition("/")[2] if job.run.startswith(f"{SHARED}/") else job.stage for job in chain]
        lines.append((cell, str(seed), " ".join(places), progress.state[key]))
    seconds, unknown = left(found, progress)
    beside = f", beside {unknown} jobs whose time is not known" if unknown else ""
    waiting = sum(state == "waiting" for state in progress.state.values())
    told = f"{len(found.jobs)} jobs, {waiting} to do: about {seconds / count / 60:.0f} minutes on quiet cores{beside}"
    title = f"{found.path}: {len(found.cells)} cells (baseline {found.baseline}), {told}."
    return "\n".join([title, columns(lines, ("cell", "seed", "stages", "state"))])


def check(path: Path, variants: tuple[str | None, ...]) -> str:
    """What `make validate` says of a grid; UserError with every problem of its cells in every variant."""
    problems: list[str] = []
    for variant in variants:
        try:
            plan(path, Choice(variant=variant))
        except UserError as error:
            problems += [line for line in error.message.splitlines() if line not in problems]
    if problems:
        raise UserError("\n".join(problems))
    return describe(plan(path))


def _seeds(options: Options) -> tuple[int, ...]:
    words = options.own.get("seeds", "").split()
    if not all(word.isdigit() for word in words):
        raise UserError(f"SEEDS='{options.own['seeds']}' are no numbers: give SEEDS='0 1 2'.")
    return tuple(map(int, words))


def _count(text: str) -> int:
    if text and (not text.isdigit() or int(text) < 1):
        raise UserError(f"JOBS={text} is no number of processes: give 1 or more.")
    return int(text or 1)
