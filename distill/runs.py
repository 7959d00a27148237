"""Run folders: runs/<run>/<stage>/, opened by one command again and again until the stage is done.

A stage folder holds recipe.yaml (as written), config.resolved.yaml, copies of the user's own losses, env.json,
STATUS.json (running, stopped, done, failed; pid, host, heartbeat, peak memory), log.txt, metrics.jsonl, tb/, samples/,
checkpoints/. A run name that exists with another recipe, or that another live process is writing, is refused before
anything is touched. runs/<grid>/<cell> is a run too.
"""

import json
import os
import resource
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from tqdm import tqdm

from distill.config import Recipe, own_files, to_yaml
from distill.data.version import meaning
from distill.errors import ExitCode, UserError
from distill.schema import differing_keys
from distill.state.checkpoint import require_space
from distill.state.lineage import environment

RUNS = Path("runs")
BEAT_SECONDS = 10.0
FRESH_SECONDS = 60.0  # a heartbeat older than this means that the process is gone
STATUS, RESOLVED = "STATUS.json", "config.resolved.yaml"


def run_folder(run: str) -> Path:
    """runs/<run>; the name is a plain one, or <grid>/<cell> for a cell of a grid."""
    parts = run.split("/")
    if len(parts) > 2 or any(not part or part.startswith(".") or set(part) & set("\\ ") for part in parts):
        raise UserError(f"'{run}' cannot name a run: use letters, digits, '-', '_' and '.'.")
    return RUNS / run


def existing_run(run: str) -> Path:
    """Its folder; UserError, with the runs that there are, when it has none."""
    folder = run_folder(run)
    if not folder.is_dir():
        have = ", ".join(sorted(path.name for path in RUNS.glob("*") if path.is_dir())) or "nothing"
        raise UserError(f"There is no run {folder}: {RUNS} holds {have}.")
    return folder


@dataclass
class StageRun:
    """One stage of one run. `done` says that an earlier process finished it."""

    folder: Path
    done: bool
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoints"

    @property
    def samples(self) -> Path:
        return self.folder / "samples"

    @property
    def tb(self) -> Path:
        return self.folder / "tb"

    def say(self, text: str) -> None:
        """One line to the terminal (above a progress bar) and to log.txt."""
        tqdm.write(text)
        with open(self.folder / "log.txt", "a", encoding="utf-8") as log:
            log.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n")

    def note(self, **facts: Any) -> None:
        """Put facts (step=..., loss=...) into STATUS.json with the next heartbeat."""
        self.facts.update(facts)


@contextmanager
def open_stage(
    run: str, recipe: Recipe, recipe_path: Path | None = None, parent: str | None = None
) -> Iterator[StageRun]:
    """Take hold of runs/<run>/<stage> for the length of the block, then write how it ended.

    parent: hash of the parent's manifest; a folder trained from another parent is refused. When the stage was done
    before, `done` is true and the folder stays as it is, unless the recipe asks for more steps alone. Ends as done,
    stopped (code 75, ctrl-C) or failed.
    """
    folder = run_folder(run) / recipe.stage
    status = read_status(folder)
    longer = _asks_for_more(folder, run, recipe)
    _refuse_other_parent(folder, run, status, parent)
    _refuse_other_code(folder, run, recipe)
    if status.get("status") == "done" and not longer:
        yield StageRun(folder, done=True, facts=dict(status))
        return
    _refuse_live_process(folder, status)
    _fill(folder, recipe, recipe_path)
    kept = {key: value for key, value in status.items() if key not in ("error", "code")}
    stage = StageRun(folder, done=False, facts={**kept, "stage": recipe.stage, "parent": parent})
    end = threading.Event()
    write_status(folder, "running", stage.facts)
    beat = threading.Thread(target=_beat, args=(stage, end), daemon=True)
    beat.start()
    outcome, extra = "failed", {}
    try:
        yield stage
        outcome = "done"
    except KeyboardInterrupt:
        outcome = "stopped"
        raise
    except UserError as error:
        outcome = "stopped" if error.code == ExitCode.STOPPED else "failed"
        extra = {"error": error.message, "code": int(error.code)}
        raise
    except BaseException as error:
        extra = {"error": f"{type(error).__name__}: {error}"}
        raise
    finally:
        end.set()
        beat.join()
        write_status(folder, outcome, {**stage.facts, **extra})


def read_status(folder: Path) -> dict[str, Any]:
    """STATUS.json of a stage folder, empty where there is none."""
    try:
        return json.loads((folder / STATUS).read_text())
    except FileNotFoundError:
        return {}
    except ValueError:
        return {}  # written by rename, so damaged only by hand; the checkpoints decide what is true


def write_status(folder: Path, status: str, facts: dict[str, Any]) -> None:
    """Replace STATUS.json in one rename."""
    beat = {"status": status, "pid": os.getpid(), "host": socket.gethostname(), "heartbeat": time.time()}
    write_json(folder / STATUS, {**facts, **beat, "peak_gib": round(peak_gib(), 3)})


def peak_gib() -> float:
    """The most memory that this process has held: on the GPU where one is used, else resident."""
    torch = sys.modules.get("torch")  # not imported by commands that only look
    if torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated() / 2**30
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # kibibytes; on macOS bytes
    return most / (2**30 if sys.platform == "darwin" else 2**20)


def write_json(path: Path, data: Any) -> None:
    """A JSON file that is never seen half-written."""
    write_text(path, json.dumps(data, indent=1, sort_keys=True) + "\n")


def write_text(path: Path, text: str) -> None:
    """A text file that is never seen half-written."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


# ---- refusals and set-up ----------------------------------------------------------------------------------


def _asks_for_more(folder: Path, run: str, recipe: Recipe) -> bool:
    """Whether the recipe only asks for more steps than the folder's, at rates that do not depend on how many there are:
    then what was trained is the beginning of what is asked for, to the bit. Any other difference is refused."""
    path = folder / RESOLVED
    if not path.is_file():
        return False
    known, asked = yaml.safe_load(path.read_text(encoding="utf-8")) or {}, yaml.safe_load(to_yaml(recipe))
    differ = differing_keys(known, asked)
    level = all(one.schedule == "constant" for one in recipe.optimizer.values())
    if differ == ["train.steps"] and level and asked["train"]["steps"] > known["train"]["steps"]:
        return True
    if differ:
        shown = ", ".join(differ[:6]) + (f" and {len(differ) - 6} more" if len(differ) > 6 else "")
        raise UserError(
            f"The run '{run}' exists with another recipe for {recipe.stage} ({shown}): use RUN=other for a new run, "
            f"or delete {folder}."
        )
    return False


def _refuse_other_parent(folder: Path, run: str, status: dict[str, Any], parent: str | None) -> None:
    known = status.get("parent")
    if known and parent and known != parent:
        raise UserError(
            f"{folder} was trained from another parent (manifest {known[:12]}, now {parent[:12]}): use RUN=other, or "
            f"delete {folder} to train it again in run '{run}'."
        )


def _refuse_other_code(folder: Path, run: str, recipe: Recipe) -> None:
    """A loss of the user's own is kept beside the resolved recipe; when its code has changed, this is another run."""
    for name, path in own_files(recipe).items():
        kept = folder / f"{name}.py"
        if kept.is_file() and meaning(kept.read_text(encoding="utf-8")) != meaning(path.read_text(encoding="utf-8")):
            raise UserError(
                f"The run '{run}' exists with another {path}: use RUN=other for a new run, or delete {folder}."
            )


def _refuse_live_process(folder: Path, status: dict[str, Any]) -> None:
    if status.get("status") != "running" or time.time() - float(status.get("heartbeat", 0)) > FRESH_SECONDS:
        return
    host, pid = status.get("host"), int(status.get("pid", 0))
    if host == socket.gethostname() and (pid == os.getpid() or not _alive(pid)):
        return
    raise UserError(f"{folder} is being written by process {pid} on {host}: wait for it or stop it (kill {pid}).")


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _fill(folder: Path, recipe: Recipe, recipe_path: Path | None) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"The run folder {folder} cannot be made: {error.strerror}.") from None
    require_space(folder, 0)
    for name in ("tb", "samples", "checkpoints"):
        (folder / name).mkdir(exist_ok=True)
    if recipe_path is not None:
        write_text(folder / "recipe.yaml", recipe_path.read_text(encoding="utf-8"))
    for name, path in own_files(recipe).items():
        write_text(folder / f"{name}.py", path.read_text(encoding="utf-8"))
    write_json(folder / "env.json", environment())
    write_text(folder / RESOLVED, to_yaml(recipe))


def _beat(stage: StageRun, end: threading.Event) -> None:
    while not end.wait(BEAT_SECONDS):
        write_status(stage.folder, "running", stage.facts)
