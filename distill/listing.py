"""What there is and how it differs, as text: recipes, runs, family trees, two checkpoints side by side.

Every listing takes the command line's Options and returns what is printed. None computes; only the family tree writes,
its picture.
"""

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from distill import prices
from distill.config import STAGES, VARIANTS, load, read
from distill.errors import UserError
from distill.options import Options
from distill.runs import FRESH_SECONDS, RUNS, read_status, run_folder, write_text
from distill.state import lineage
from evaluation.plots import Node, standalone_tree

HEADLINE = {"sync_corr": "sync", "identity_distance": "identity", "motion_ratio": "motion", "seam_ratio": "seams"}


def recipes(options: Options) -> str:
    """A table of the recipes in recipes/: path, stage, steps, what they cost as written, what the comment on the first
    line says. With PLAN=1 the costs are worked out afresh."""
    found = {path: read(path).data for path in sorted(Path("recipes").rglob("*.yaml"))}
    found = {path: data for path, data in found.items() if "stage" in data}  # the others are bases and grids
    if not found:
        return "There are no recipes under recipes/: run this in the repository's folder."
    if options.own.get("plan"):
        prices.renew(list(found))
    known = prices.known()
    rows = []
    for path, data in found.items():
        first = path.read_text(encoding="utf-8").splitlines()[0]
        price = known.get(str(path))
        if price is not None and price.recipe != prices.digest(path):
            price = None  # written for another version of it
        cost = ("-", "-", "-", "") if price is None else price.words
        steps = str((data.get("train") or {}).get("steps", "-"))
        rows.append((str(path), data["stage"], steps, *cost, first.lstrip("# ") if first.startswith("#") else ""))
    return columns(rows, ("recipe", "stage", "steps", "GPUs", "GB each", "hours", "", "what it is"))


def validate(options: Options) -> str:
    """Load a recipe as it is and in each variant; UserError with every problem, else what it would do."""
    if options.recipe is None:
        raise UserError("Nothing to check: give RECIPE=recipes/tiny/stage2_dmd.yaml, or a grid.")
    if "stages" in read(options.recipe).data:
        from distill.ablate import check  # torch comes with it

        return check(options.recipe, (None, *VARIANTS))
    problems: list[str] = []
    for variant in (None, *VARIANTS):
        try:
            load(options.recipe, options.overrides, variant)
        except UserError as error:
            found = [line.strip() for line in error.message.splitlines()]
            problems += [line for line in found if line not in problems and not line.endswith(" problems:")]
    if problems:
        raise UserError("\n".join(problems))
    recipe = load(options.recipe, options.overrides, options.variant)
    train = recipe.train
    lines = [
        f"{options.recipe} is valid: {recipe.name}, {recipe.stage} at scale {recipe.scale}",
        f"  {train.steps} steps of {train.batch_size * train.grad_accumulation} clips per process "
        f"({train.batch_size} x {train.grad_accumulation} micro-steps), {train.precision}",
    ]
    for phase in recipe.phases:
        terms = ", ".join(f"{spec.weight:g} {spec.name}" for spec in phase.terms)
        lines.append(f"  {phase.update} every {phase.every}: {terms}, lr {recipe.optimizer[phase.update].lr:g}")
    return "\n".join(lines)


def runs(options: Options) -> str:
    """Every run with its stages: status, step, how long ago it gave a sign of life; and its scores, if measured.
    A grid is a line with how many of its cells are done, and its cells under it."""
    lines = []
    for folder in sorted(path for path in RUNS.glob("*") if path.is_dir() and path.name != "compare"):
        state = folder / "GRID.json"
        if state.is_file():
            cells = json.loads(state.read_text())["cells"]
            done = sum(cell["state"] == "done" for cell in cells)
            lines.append(f"{folder.name:20} grid, {done} of {len(cells)} cells done")
            for cell in cells:
                lines += _run(folder / f"{cell['cell']}-seed{cell['seed']}", "  ")
                lines += [f"{'':22}{cell['state']}: {cell['reason']}"] if cell["reason"] else []
        elif folder.name == "shared":
            lines.append(f"{folder.name:20} {len(list(folder.iterdir()))} stages that cells of grids have in common")
        else:
            lines += _run(folder)
    return "\n".join(lines) if lines else "There are no runs yet: make online-lpm."


def _run(folder: Path, indent: str = "") -> list[str]:
    own = [stage for stage in STAGES if (folder / stage).is_dir() and not (folder / stage).is_symlink()]
    name, stages = indent + folder.name, ", ".join(_stage(folder / stage) for stage in own)
    return [f"{name:20} {stages or 'empty'}", *(f"{'':20} {line}" for line in _scores(folder / "report/scores.json"))]


def _stage(folder: Path) -> str:
    status = read_status(folder)
    if not status:
        return f"{folder.name} done" if (folder / "manifest.json").is_file() else f"{folder.name} unfinished"
    word, silent = status.get("status", "?"), time.time() - float(status.get("heartbeat", 0))
    if word == "running" and silent > FRESH_SECONDS:
        word = f"dead for {silent / 60:.0f} min"
    health = f" ({status['health']})" if "health" in status else ""
    return f"{folder.name} {word} at {status.get('step', 0)}{health}"


def _scores(path: Path) -> list[str]:
    if not path.is_file():
        return []
    scores = json.loads(path.read_text())
    lines = []
    students = [row for row in scores if row.startswith("stage") or row == "online_lpm"]
    for row in ("teacher", *students[-1:]):
        means = {label: scores.get(row, {}).get(key, {}).get("mean") for key, label in HEADLINE.items()}
        found = [f"{label} {mean:.3f}" for label, mean in means.items() if mean is not None]
        lines += [f"{row}: {', '.join(found)}"] if found else []
    return lines


def family(options: Options) -> str:
    """The family tree of PARENT=, or of the checkpoint furthest down the road in RUN=, and where its picture is: OUT=,
    else lineage.svg in the run's folder."""
    place = options.parent or newest_stage(options.run)
    told, out = lineage.tree(place), options.own.get("out")
    if options.parent and not out:
        return told
    path = Path(out) if out else run_folder(options.run) / "lineage.svg"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, standalone_tree(tree_nodes(place)))
    return f"{told}\nWrote {path}."


def tree_nodes(place: str | Path) -> list[Node]:
    """One node per generation, the eldest first."""
    nodes: list[Node] = []
    for manifest, named, remark in reversed(lineage.ancestors(place)):
        name = manifest.stage if manifest else Path(named["path"]).name
        step = f"step {manifest.step:,} · {manifest.scale} · " if manifest else ""
        detail = f"{step}{named['manifest_sha256'][:8]}{f' · {remark}' if remark else ''}"
        nodes.append(Node(name, detail, nodes[-1].name if nodes else None))
    return nodes


def newest_stage(run: str) -> Path:
    """The folder furthest down the road in a run: the export, else the last stage that has a checkpoint."""
    folder = run_folder(run)
    for name in ("online-lpm", *reversed(STAGES)):
        if (folder / name / "manifest.json").is_file() or any(folder.glob(f"{name}/checkpoints/step_*")):
            return folder / name
    raise UserError(f"The run folder {folder} holds no checkpoint: give RUN=name of one that does, or PARENT=path.")


def diff(options: Options) -> str:
    """Key by key what differs between two manifests: the recipe first, what came of it, the metrics, last."""
    first, second = options.own.get("a"), options.own.get("b")
    if not first or not second:
        raise UserError("Two checkpoints are compared: give A=path B=path.")
    one, other = lineage.read(first), lineage.read(second)
    here, there = flatten(one.data), flatten(other.data)
    # File hashes and what follows from the rest would bury the causes.
    keys = {key for key in {**here, **there} if not key.startswith(("files.", "recipe_sha256"))}
    lines = [
        f"  {key}: {' -> '.join(_told(here.get(key, 'absent'), there.get(key, 'absent')))}"
        for key in sorted(keys, key=lambda key: (not key.startswith("recipe."), key.startswith("metrics."), key))
        if here.get(key, ...) != there.get(key, ...)
    ]
    title = f"{one.path} ({one.hash[:12]}) -> {other.path} ({other.hash[:12]})"
    return "\n".join([title, *(lines or ["  nothing differs"])])


def _told(one: Any, other: Any) -> tuple[str, str]:
    """Two values that differ; long fractions only as long as it takes to see that they do."""
    short = tuple(f"{value:.4g}" if isinstance(value, float) else str(value) for value in (one, other))
    return (short[0], short[1]) if short[0] != short[1] else (str(one), str(other))


def columns(rows: Sequence[Sequence[str]], head: Sequence[str]) -> str:
    """Rows of text under a head, every column as wide as it needs."""
    lines = [list(head), *map(list, rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in lines)


def flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    """Nested dicts and lists -> {"a.b.0": leaf}."""
    if isinstance(value, dict) and value:
        return {k: v for key, part in value.items() for k, v in flatten(part, f"{prefix}{key}.").items()}
    if isinstance(value, list) and any(isinstance(part, (dict, list)) for part in value):
        return {k: v for key, part in enumerate(value) for k, v in flatten(part, f"{prefix}{key}.").items()}
    return {prefix.rstrip("."): value}
