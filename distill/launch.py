"""Start the processes of one command: torch's elastic launcher (what torchrun runs), inside this process.

It is used as a library so that the exit status of a worker is the exit status of the command (75 stays "run it again"),
and so that a mistake of the user is one sentence instead of a traceback per process. `torchrun -m distill ...` works
just as well.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections.abc import Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, NoReturn

from distill.engine.config import EngineConfig, load_engine
from distill.errors import ExitCode, UserError

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

# (option, help) of the commands that train
SPREAD = (
    ("accelerate", "how training is spread: a file of recipes/accelerate/ (default: one process)"),
    ("processes", "processes on this machine, one per GPU (default: 1)"),
    ("nodes", "machines that take part (default: 1); the same command is given on each"),
    ("node-rank", "number of this machine, from 0"),
    ("master", "host:port of machine 0"),
)
SHUTDOWN_SECONDS = 600  # for the step under way and its checkpoint, after a signal or another process's death


def wanted(own: dict[str, str]) -> bool:
    """Whether this process has to start others: they were asked for, and it is not one of them."""
    return "RANK" not in os.environ and (own.get("processes", "") not in ("", "1") or bool(own.get("nodes")))


def check(own: dict[str, str]) -> EngineConfig:
    """The engine that the options name; UserError where they do not fit together."""
    config = load_engine(own.get("accelerate"))
    several = wanted(own) or int(os.environ.get("WORLD_SIZE", "1")) > 1
    if several and config.kind == "plain":
        raise UserError("Several processes need ACCELERATE=, for example recipes/accelerate/ddp.yaml.")
    return config


def launch(own: dict[str, str], command: Sequence[str]) -> int:
    """Run `python COMMAND` in every process and wait; the exit status of the first that failed."""
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    check(own)
    processes, nodes = _number(own, "processes", 1, 1), _number(own, "nodes", 1, 1)
    rank = _number(own, "node-rank", 0, 0)
    if nodes > 1 and (":" not in own.get("master", "") or rank >= nodes):
        raise UserError(f"{nodes} machines need MASTER=host:port of the first, and NODE_RANK= from 0 to {nodes - 1}.")
    config = LaunchConfig(
        min_nodes=nodes,
        max_nodes=nodes,
        nproc_per_node=processes,
        rdzv_backend="static" if nodes > 1 else "c10d",
        rdzv_endpoint=own.get("master", "") if nodes > 1 else "localhost:0",
        rdzv_configs={"rank": rank} if nodes > 1 else {},
        run_id="distill",
        max_restarts=0,
    )
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
    if "shutdown_timeout" in {f.name for f in fields(LaunchConfig)}:
        config.shutdown_timeout = SHUTDOWN_SECONDS
    # It would tell every exit once more; the workers have, and _status does.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    try:
        elastic_launch(config, sys.executable)(*command)
    except ChildFailedError as error:
        return _status(error)
    except SignalException:  # passed on to the workers, which have saved and ended by now
        return ExitCode.STOPPED
    return ExitCode.DONE


def leave(status: int) -> NoReturn:
    """End this process; at once where it is one of several and its work is done. Threads of gloo, of groups that
    DeepSpeed holds on to, would abort one exit in a few, and a finished run would be called dead. A failure takes the
    long way, so that the process that failed first is the first to be seen."""
    if "RANK" not in os.environ or status:
        sys.exit(status)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _number(own: dict[str, str], name: str, default: int, least: int) -> int:
    text = own.get(name) or str(default)
    if not text.isdigit() or int(text) < least:
        raise UserError(f"--{name} takes a whole number from {least}, this is '{text}'.")
    return int(text)


def _status(error: ChildFailedError) -> int:
    """What the first process that failed said; one that died of a signal is named."""
    rank, failure = error.get_first_failure()
    if failure.exitcode < 0:
        name = signal.Signals(-failure.exitcode).name
        print(
            f"Process {rank} died of {name}: the others were ended; the same command goes on from the last checkpoint.",
            file=sys.stderr,
        )
        return ExitCode.STOPPED
    return failure.exitcode
