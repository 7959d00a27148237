"""The command line: `python -m distill <command> [--recipe R] [--run N] [--parent P] [--set "a=b c=d"] [--quick]`.

It parses, dispatches to distill.pipeline, and turns failures into exit codes: a user's mistake is one sentence on
stderr, anything else keeps its traceback. Torch is imported only by the commands that compute.
"""

import argparse
import errno
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from distill.config import SCALES, STAGES, read
from distill.errors import ExitCode, UserError
from distill.listing import LISTINGS
from distill.options import Options, run_name

COMMANDS = {
    "online-lpm": "the whole path: data, teacher, stages 1-4, export, evaluation, report; does only what is missing",
    "data": "prepare the data set: speech, characters, latents",
    "teacher": "train the teacher from nothing by flow matching",
    "keep": "put the teacher of a run where the repository keeps one",
    "trajectories": "store the teacher's sampling trajectories for stage 1",
    "stage1": "causal initialization by ODE regression on the trajectories",
    "stage2": "off-policy distribution matching on re-noised teacher latents",
    "stage3": "self-forcing: distribution matching on the student's own long rollouts",
    "stage4": "train the one-step refiner",
    "distill": "trajectories and stages 1 to 4",
    "export": "gather backbone, refiner and codec into one Online LPM folder",
    "evaluate": "measure teacher and student on held-out characters and speech",
    "report": "write the report of a run from its scores",
    "lineage": "draw the family tree of a run's newest checkpoint, or of --parent",
    "recipes": "list the recipes",
    "validate": "check a recipe and its quick and smoke variants: all problems at once, with file and line",
    "runs": "list the runs: how far each stage is, and the scores",
    "diff": "what differs between the recipes, data, code and environment of two checkpoints",
    "doctor": "check this machine",
}
SEVERAL = ("online-lpm", "distill", "export", "evaluate", "report")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    parsed = _parse(arguments)
    try:
        return _dispatch(parsed.command, _options(parsed))
    except UserError as error:
        print(error.message, file=sys.stderr)
        return int(error.code)
    except KeyboardInterrupt:
        print("Interrupted; the same command goes on from the last checkpoint.", file=sys.stderr)
        return ExitCode.INTERRUPTED
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        print("The disk is full: free some space and run the same command again.", file=sys.stderr)
        return ExitCode.USAGE
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and "out of memory" not in str(error).lower():
            raise
        print(f"Out of memory: lower train.batch_size with SET= ({str(error).splitlines()[0]}).", file=sys.stderr)
        return ExitCode.MEMORY


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m distill", description="Distill a teacher into Online LPM.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    for name, text in COMMANDS.items():
        command = commands.add_parser(name, help=text, description=text)
        command.add_argument("--recipe", type=Path, help="recipe YAML (default: the one of the stage)")
        command.add_argument("--run", help="name of the run folder under runs/ (default: the scale)")
        command.add_argument("--parent", help="checkpoint to start from (default: found in the run)")
        if name == "diff":
            command.add_argument("--a", help="a checkpoint, a stage folder or an export")
            command.add_argument("--b", help="another one")
        command.add_argument("--set", default="", help="overrides, 'a.b=1 c=2'")
        command.add_argument("--quick", action="store_true", help="fewer steps, marked as such in the report")
        command.add_argument("--smoke", action="store_true", help="a few steps of everything: does it run")
    return parser.parse_args(arguments)


def _options(given: argparse.Namespace) -> Options:
    scale = "tiny"
    if given.recipe is not None:
        scale = str(read(given.recipe).data.get("scale", scale))
        scale = scale if scale in SCALES else "tiny"  # the full check of the recipe will say so
    return Options(
        recipe=given.recipe,
        run=run_name(given.run, scale, given.quick, given.smoke),
        parent=given.parent,
        overrides=tuple(shlex.split(given.set)),
        quick=given.quick,
        smoke=given.smoke,
        scale=scale,
        several=given.command in SEVERAL,
        pair=(getattr(given, "a", None), getattr(given, "b", None)),
    )


def _dispatch(command: str, options: Options) -> int:
    if command in LISTINGS:
        print(LISTINGS[command](options))
        return ExitCode.DONE
    if command == "doctor":
        from distill.doctor import examine

        return examine()
    print(f"{command}: {COMMANDS[command]} (run {options.run})", flush=True)
    from distill import pipeline  # imports torch, hence here

    if command == "distill":
        pipeline.trajectories(options)
        for stage in STAGES[2:]:
            pipeline.train_stage(options, stage)
    elif command == "teacher" or command.startswith("stage"):
        pipeline.train_stage(options, command)
    else:
        getattr(pipeline, command.replace("-", "_"))(options)
    return ExitCode.DONE
