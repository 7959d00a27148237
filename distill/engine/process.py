"""One stage folder for all processes: rank 0 holds it, the others look on in silence; nobody waits for the dead.

`together` is `runs.open_stage` for an engine. A refusal that rank 0 meets is raised by all, and a collective that fails
because another process has gone becomes one sentence.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from distill.config import Recipe
from distill.engine.plain import Engine
from distill.errors import ExitCode, UserError
from distill.runs import StageRun, open_stage, run_folder

# How gloo and NCCL say that a peer has gone.
GONE = ("connection closed by peer", "connection reset", "broken pipe", "watchdog", "timed out", "remote process")


class Onlooker(StageRun):
    """The run of a process that is not rank 0: it writes and says nothing."""

    def say(self, text: str) -> None: ...

    def note(self, **facts: Any) -> None: ...


@contextmanager
def together(
    engine: Engine, run: str, recipe: Recipe, recipe_path: Path | None = None, parent: str | None = None
) -> Iterator[StageRun]:
    """`open_stage` by rank 0 for all."""
    if engine.processes == 1:
        with open_stage(run, recipe, recipe_path, parent) as stage:
            yield stage
        return
    if not engine.is_main:
        refusal, done = engine.from_main(("", False))
        if refusal:
            raise UserError(refusal)
        with told():
            yield Onlooker(run_folder(run) / recipe.stage, done)
        return
    opened = open_stage(run, recipe, recipe_path, parent)
    try:
        stage = opened.__enter__()
    except UserError as error:
        engine.from_main((error.message, False))
        raise
    engine.from_main(("", stage.done))
    try:
        with told():
            yield stage
    except BaseException as error:
        if not opened.__exit__(type(error), error, error.__traceback__):
            raise
    else:
        opened.__exit__(None, None, None)


@contextmanager
def told() -> Iterator[None]:
    """A failed collective, said so that a user can act on it."""
    try:
        yield
    except RuntimeError as error:
        if not any(sign in str(error).lower() for sign in GONE):
            raise
        raise UserError(
            f"Another process of this run has gone ({str(error).splitlines()[0][-120:]}): look at its last lines; the "
            "same command goes on from the last checkpoint.",
            ExitCode.STOPPED,
        ) from None
