"""Mistakes a user can mend, and the exit codes by which scripts tell them apart.

A UserError is printed as one sentence without a traceback; everything else is a bug and keeps its traceback.
"""

from enum import IntEnum
from pathlib import Path
from traceback import walk_tb


class ExitCode(IntEnum):
    """What the process status says; 75 is the one that means "run the same command again"."""

    DONE = 0
    USAGE = 2  # the command line, the recipe, the disk: something the user gave
    DATA = 3  # the data set or a cache
    MEMORY = 4  # out of memory
    NUMERICS = 5  # too many non-finite steps in a row, or a collapse
    CHECKPOINT = 6  # checkpoints exist but none of them is whole, or a parent does not pass its gate
    STOPPED = 75  # stopped on request, everything saved, resumable
    INTERRUPTED = 130  # stopped at once by a second ctrl-C


class UserError(Exception):
    """One sentence saying what is wrong, where, and what to do about it."""

    def __init__(self, message: str, code: int = ExitCode.USAGE) -> None:
        super().__init__(message)
        self.message = message
        self.code = ExitCode(code)


def refusal(error: ValueError) -> str:
    """What a shipped loss or rollout says of settings that only its samples show to be wrong; "" for other errors."""
    shipped = Path(__file__).resolve().parents[1] / "recipes"
    *_, (last, _) = walk_tb(error.__traceback__)
    return str(error) if Path(last.f_code.co_filename).parent == shipped else ""
