"""The command line: `python -m distill <command> [--recipe R] [--run N] [--parent P] [--set "a=b c=d"] [--quick]`.

It parses, calls the command's function, and turns failures into exit codes: a user's mistake is one sentence on stderr,
anything else keeps its traceback. A command is one line in COMMANDS; torch is imported only by those that compute.
"""

import argparse
import errno
import importlib
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from distill import launch
from distill.config import SCALES, read
from distill.errors import ExitCode, UserError, refusal
from distill.launch import SPREAD
from distill.options import Options, run_name
from distill.schema import split_overrides


@dataclass(frozen=True)
class Command:
    """What a command does, where its function is, which options of its own it takes."""

    text: str
    function: str  # "module:name", called with Options; a text that it returns is printed, a number is the exit status
    arguments: tuple[str, ...] = ()  # after Options
    own: tuple[tuple[str, str], ...] = ()  # (option, help): Options.own[option] in the function, "" when not given
    several: bool = False  # runs more than one stage: a recipe of one stage leaves the others at their defaults
    quiet: bool = False  # prints nothing but its result


FORCE = (("force", "why a parent that does not pass the stage's gate is to be taken all the same"),)
TRAINING = (*SPREAD, *FORCE)

COMMANDS = {
    "online-lpm": Command(
        "the whole path: data, teacher, stages 1-4, export, evaluation, report; does only what is missing",
        "distill.pipeline:online_lpm",
        own=FORCE,
        several=True,
    ),
    "data": Command("prepare the data set: speech, characters, latents", "distill.pipeline:data"),
    "teacher": Command(
        "train the teacher from nothing by flow matching", "distill.pipeline:train_stage", ("teacher",), TRAINING
    ),
    "ar-teacher": Command(
        "train the autoregressive teacher, causal and of many steps, from the teacher",
        "distill.pipeline:train_stage",
        ("ar-teacher",),
        TRAINING,
    ),
    "keep": Command("put the teacher of a run where the repository keeps one", "distill.pipeline:keep"),
    "trajectories": Command("store the teacher's sampling trajectories for stage 1", "distill.pipeline:trajectories"),
    "stage1": Command(
        "causal initialization of the student",
        "distill.pipeline:train_stage",
        ("stage1",),
        TRAINING,
    ),
    "stage2": Command(
        "distribution matching, off-policy as shipped",
        "distill.pipeline:train_stage",
        ("stage2",),
        TRAINING,
    ),
    "stage3": Command(
        "distribution matching, on-policy as shipped",
        "distill.pipeline:train_stage",
        ("stage3",),
        TRAINING,
    ),
    "stage4": Command("train the one-step refiner", "distill.pipeline:train_stage", ("stage4",), TRAINING),
    "distill": Command("trajectories and stages 1 to 4", "distill.pipeline:distill", own=FORCE, several=True),
    "export": Command(
        "gather backbone, refiner and codec into one Online LPM folder", "distill.pipeline:export", several=True
    ),
    "evaluate": Command(
        "measure teacher and student on held-out characters and speech", "distill.pipeline:evaluate", several=True
    ),
    "ablate": Command(
        "train and score every cell of a grid with every seed; what is done or shared is not done again",
        "distill.ablate:ablate",
        own=(
            ("grid", "recipes/ablations/<name>.yaml; or a recipe, which is held against the one it extends"),
            ("seeds", "instead of the grid's, '0 1 2'"),
            ("name", "the grid's folder under runs/ (default: its name)"),
            ("jobs", "processes at once (default 1)"),
            ("dry", "only list the cells and the predicted minutes"),
        ),
        quiet=True,
    ),
    "score": Command(
        "measure one stage of a run, its student alone",
        "distill.score:score",
        own=(("stage", "default: the last one that is done"),),
    ),
    "compare": Command(
        "put runs, or the cells of a grid, side by side: scores with paired differences, curves, films, cost",
        "distill.compare:compare",
        own=(
            ("runs", "grids and runs, 'a b c'; run:stage2 for that row of a run"),
            ("baseline", "the arm that the others are held against (default: the grid's, or the first)"),
            ("out", "folder of the page (default: beside the grid, or runs/compare/)"),
        ),
        quiet=True,
    ),
    "bands": Command(
        "measure where the curves of healthy runs lie: the reference bands of a recipe, or of all of a scale",
        "distill.bands:measure",
        own=(
            ("seeds", "how many (default: 3)"),
            ("steps", "up to which step (default: all of the recipe's)"),
            ("parents", "a run whose stages are taken as parents (default: bands/parents, trained where missing)"),
        ),
    ),
    "report": Command("write the report of a run from its scores", "distill.pipeline:report", several=True),
    "stream": Command(
        "play a recording to a character of an Online LPM and film it",
        "distill.streaming:stream",
        several=True,
        own=(
            ("audio", "what the character says: any audio file, or a recording of the model's folder"),
            ("listen", "what the character hears, likewise"),
            ("character", "a character of the model's folder (default: the first)"),
            ("text", "how the character is to look: a caption, or a text of the model's folder (default: its first)"),
            ("model", "an Online LPM folder (default: that of the run)"),
            ("out", "the mp4 to write (default: under the run's streams/)"),
        ),
    ),
    "serve": Command(
        "serve a page on which a character speaks and listens live",
        "distill.serving:serve",
        own=(
            ("model", "an Online LPM folder (default: the run's)"),
            ("compare", "another one, to be shown beside it"),
            ("host", "address to listen at (default: 127.0.0.1, this machine alone)"),
            ("port", "port to listen at (default: 8000)"),
        ),
        quiet=True,
    ),
    "latency": Command(
        "measure first frame, time per chunk and memory over an hour of video, and the teacher beside it",
        "distill.latency:measure",
        several=True,
        own=(
            ("model", "an Online LPM folder (default: that of the run)"),
            ("horizon", "seconds of video to stream (default: 3600)"),
        ),
    ),
    "drift": Command(
        "stream held-out characters for minutes and measure whether they stay who they are and alive, with controls",
        "distill.drift:drift",
        several=True,
        own=(
            ("minutes", "length of each stream (default: 10)"),
            ("characters", "how many held-out characters (default: 24)"),
            ("shares", "3: every seed of a grid streams another third of the characters (default: all of them)"),
            ("baseline", "rows beside it, 'teacher undistilled stage2' (the teacher for its motion alone)"),
            ("stage", "stage1 to stage4, online_lpm or undistilled (default: the export, or the last stage)"),
            ("model", "an Online LPM folder instead of the run's"),
            ("age", "0 leaves out the session of 10,000 chunks, 1 has one for every cell of a grid"),
        ),
    ),
    "lineage": Command(
        "draw the family tree of a run's newest checkpoint, or of --parent, as text and as picture",
        "distill.listing:family",
        own=(("out", "file of the picture (default: lineage.svg in the run's folder)"),),
        quiet=True,
    ),
    "recipes": Command(
        "list the recipes and what they cost",
        "distill.listing:recipes",
        own=(("plan", "1: work the costs out afresh, a few minutes"),),
        quiet=True,
    ),
    "validate": Command(
        "check a recipe and its quick and smoke variants: all problems at once, with file and line",
        "distill.listing:validate",
        quiet=True,
    ),
    "runs": Command("list the runs: how far each stage is, and the scores", "distill.listing:runs", quiet=True),
    "diff": Command(
        "what differs between the recipes, data, code and environment of two checkpoints",
        "distill.listing:diff",
        own=(("a", "a checkpoint, a stage folder or an export"), ("b", "another one")),
        quiet=True,
    ),
    "consolidate": Command(
        "write a checkpoint as one safetensors set, in files of 5 GB with an index where it is larger",
        "distill.consolidate:consolidate",
    ),
    "import-wan": Command(
        "take Wan2.1's weights as the teacher of a run",
        "distill.import_wan:import_wan",
        own=(("weights", "a safetensors file, an index, or a folder with them"),),
        quiet=True,
    ),
    "plan": Command(
        "what a recipe costs on so many GPUs, whether it fits, and the cheapest change that makes it fit",
        "distill.plan:command",
        own=(
            ("gpus", "how many (default: 8)"),
            ("gpu-mem", "memory of each in GB (default: 80)"),
            ("accelerate", "how training is spread: a file of recipes/accelerate/ (default: ddp)"),
            ("json", "1 for JSON, for machines"),
        ),
        quiet=True,
    ),
    "gpu-check": Command(
        "tests, attention back ends and training steps on this machine's GPU, as one table; without one it says so",
        "distill.gpu_check:check",
        quiet=True,
    ),
    "doctor": Command("check this machine", "distill.doctor:examine", quiet=True),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    parsed = _parse(arguments)
    rank = os.environ.get("RANK", "0")
    if rank != "0":  # one of several processes: rank 0 speaks for all
        sys.stdout = open(os.devnull, "w")
    try:
        options = _options(parsed)
        if launch.wanted(options.own):
            if COMMANDS[parsed.command].arguments:
                options.load(*COMMANDS[parsed.command].arguments)  # a mistake in it is told once, not by every process
            given = sys.argv[1:] if arguments is None else arguments
            return launch.launch(options.own, ["-m", "distill", *given])
        return _run(COMMANDS[parsed.command], parsed.command, options)
    except UserError as error:
        if rank == "0" or error.code not in (ExitCode.STOPPED, ExitCode.NUMERICS):  # those all processes agree on
            print(error.message if rank == "0" else f"process {rank}: {error.message}", file=sys.stderr)
        return int(error.code)
    except KeyboardInterrupt:
        print("Interrupted; the same command goes on from the last checkpoint.", file=sys.stderr)
        return ExitCode.INTERRUPTED
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        print("The disk is full: free some space and run the same command again.", file=sys.stderr)
        return ExitCode.USAGE
    except ValueError as error:
        if not refusal(error):
            raise
        print(refusal(error), file=sys.stderr)
        return ExitCode.USAGE
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and "out of memory" not in str(error).lower():
            raise
        print(f"Out of memory: lower train.batch_size with SET= ({str(error).splitlines()[0]}).", file=sys.stderr)
        return ExitCode.MEMORY


def _run(command: Command, name: str, options: Options) -> int:
    if not command.quiet:
        print(f"{name}: {command.text} (run {options.run})", flush=True)
    module, _, function = command.function.partition(":")
    result = getattr(importlib.import_module(module), function)(options, *command.arguments)
    if isinstance(result, str):
        try:
            print(result, flush=True)
        except BrokenPipeError:  # the work is done, and whoever reads has seen enough: `make runs | head`
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else the exit fails on what is left
    return result if isinstance(result, int) else ExitCode.DONE


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m distill", description="Distill a teacher into Online LPM.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    for name, command in COMMANDS.items():
        sub = commands.add_parser(name, help=command.text, description=command.text)
        sub.add_argument("--recipe", type=Path, help="recipe YAML (default: the one of the stage)")
        sub.add_argument("--scale", choices=SCALES, help="whose default recipes to take (default: tiny)")
        sub.add_argument("--run", help="name of the run folder under runs/ (default: the scale)")
        sub.add_argument("--parent", help="checkpoint to start from (default: found in the run)")
        sub.add_argument("--set", default="", help="overrides, 'a.b=1 c=2'")
        sub.add_argument("--quick", action="store_true", help="fewer steps, marked as such in the report")
        sub.add_argument("--smoke", action="store_true", help="a few steps of everything: does it run")
        for option, text in command.own:
            # An option without a value is a yes: --json.
            sub.add_argument(f"--{option}", default="", const="1", nargs="?", help=text)
    return parser.parse_args(arguments)


def _options(given: argparse.Namespace) -> Options:
    command = COMMANDS[given.command]
    scale = given.scale or "tiny"
    if given.recipe is not None:
        scale = str(read(given.recipe).data.get("scale", scale))
        scale = scale if scale in SCALES else "tiny"  # the full check of the recipe will say so
    return Options(
        recipe=given.recipe,
        run=run_name(given.run, scale, given.quick, given.smoke),
        parent=given.parent,
        overrides=split_overrides(given.set),
        quick=given.quick,
        smoke=given.smoke,
        scale=scale,
        several=command.several,
        own={option: getattr(given, option.replace("-", "_")) for option, _ in command.own},
    )
