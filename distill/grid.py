"""A grid: one YAML file -> cells x seeds -> the jobs that train and score them, shared work planned once.

A job is one stage in one run folder. Its `key` is the hash of everything that decides its result (resolved recipe with
its seed, code of its losses, data, teacher, key of its parent): the last stage of a cell lies in
runs/<grid>/<cell>-seed<k>, every stage before it in runs/shared/<stage>-<key>, where other cells and grids find it.
"""

from __future__ import annotations

import hashlib
import inspect
import itertools
import json
import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from distill import config
from distill.config import SCALES, Recipe, default_recipe, load
from distill.data.prepare import read_fingerprint
from distill.data.version import meaning
from distill.errors import UserError
from distill.evaluate import MEASURED_BY
from distill.pipeline import NEEDS_TRAJECTORIES
from distill.roles import find_teacher
from distill.runs import run_folder
from distill.schema import Report, Source, build, choice, parse_value, read_yaml
from distill.state import lineage

TRAINED = ("stage1", "stage2", "stage3", "stage4")
SCORE = "score"
SHARED = "shared"  # the run folders of stages that cells have in common
START_SECONDS = 15.0  # of a process: imports, data, networks, the first and the last samples


@dataclass(frozen=True)
class Cell:
    """One method: recipes by stage (`recipe` is that of the last stage), overrides, stages if not the grid's, and
    `step_seconds` where its last stage takes other time than the grid says."""

    name: str
    recipe: str = ""
    recipes: Any = field(default_factory=dict)  # {stage: path}
    set: Any = field(default_factory=dict)  # {key: value}
    stages: tuple[str, ...] = ()
    step_seconds: float | None = None


@dataclass(frozen=True)
class Grid:
    """A grid as written. A key of `set` and `grid` is of the last stage, `stage1.key` of stage 1, `all.key` of all."""

    name: str
    stages: tuple[str, ...]
    scale: str = choice(*SCALES, default="tiny")
    recipes: Any = field(default_factory=dict)  # {stage: path from this file}, else the scale's default
    set: Any = field(default_factory=dict)
    grid: Any = field(default_factory=dict)  # {key: [values]}, every combination
    cells: tuple[Cell, ...] = ()
    seeds: tuple[int, ...] = (0,)
    parents: str = choice("per_seed", "once", default="per_seed")  # train the stages before the last for every seed?
    parent: str = ""  # a checkpoint to start from; stages up to its own are not trained
    baseline: str = ""  # a cell; the first one unless named
    evaluation: Any = field(default_factory=dict)  # overrides of evaluation.*
    step_seconds: Any = field(default_factory=dict)  # {stage: expected seconds per step on two quiet cores}

    def __post_init__(self) -> None:
        for what, stages in [("stages", self.stages), *((f"cells.{c.name}.stages", c.stages) for c in self.cells)]:
            if list(stages) != [stage for stage in TRAINED if stage in stages]:
                raise ValueError(f"{what}: {list(stages)} must be some of {', '.join(TRAINED)}, in order")
        if not self.stages:
            raise ValueError("stages: at least one stage is needed")
        for what in ("recipes", "set", "grid", "evaluation", "step_seconds"):
            if not isinstance(getattr(self, what), dict):
                raise ValueError(f"{what}: a mapping is needed, this is {getattr(self, what)!r}")
        for key, values in self.grid.items():
            if not isinstance(values, list) or not values:
                raise ValueError(f"grid.{key}: a list of values is needed, this is {values!r}")
        if not self.cells and not self.grid:
            raise ValueError(
                "a grid needs `cells`, a list of {name, recipe, set}, or `grid`, a mapping {key: [values]}"
            )
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds: {list(self.seeds)} must be different numbers, at least one")


@dataclass(frozen=True)
class Job:
    """One process: train a stage, sample trajectories, or score a run. `links` are stages made elsewhere."""

    stage: str
    run: str
    key: str
    family: str  # the key without seed and parent: jobs of one family take the same time
    recipe: Path
    overrides: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()  # keys
    links: tuple[tuple[str, str], ...] = ()  # (stage, run)
    parent: str = ""
    expected: float | None = None  # seconds
    steps: int = 0
    variant: str | None = None

    @property
    def folder(self) -> Path:
        return run_folder(self.run)


@dataclass(frozen=True)
class Plan:
    """What a grid asks for: the jobs in an order that can be run, and which of them end a cell (cell, seed -> key)."""

    grid: Grid
    path: Path
    run: str
    jobs: dict[str, Job]
    cells: dict[tuple[str, int], str]

    @property
    def baseline(self) -> str:
        """The cell that the others are compared with."""
        return self.grid.baseline or next(iter(self.cells))[0]

    def chain(self, key: str) -> list[Job]:
        """A job and everything it needs, first things first."""
        job = self.jobs[key]
        above = [part for need in job.needs for part in self.chain(need)]
        return list({part.key: part for part in [*above, job]}.values())


@dataclass(frozen=True)
class Choice:
    """What the command line adds to a grid: its folder, a variant, overrides (as in `set`), seeds, a parent."""

    run: str = ""
    variant: str | None = None
    overrides: tuple[str, ...] = ()
    seeds: tuple[int, ...] = ()
    parent: str = ""


def read_grid(path: Path, choice: Choice = Choice()) -> Grid:
    """The checked grid, or one UserError with all that is wrong with the file itself.

    A recipe is a grid too: of itself and the recipe that it extends, its baseline.
    """
    source = config.read(path, (), choice.variant)
    source = of_recipe(path, source, choice) if "stage" in source.data else source
    report = Report(source, str(path))
    grid = build(Grid, dict(source.data), (), report)
    report.stop_if_any()
    assert isinstance(grid, Grid)
    more = dict(_split(text) for text in choice.overrides)
    seeds, parent = choice.seeds or grid.seeds, choice.parent or grid.parent
    grid = replace(grid, set={**grid.set, **more}, seeds=seeds, parent=parent)
    return _after(lineage.read(parent).stage, grid) if parent else grid


def _after(parent: str, grid: Grid) -> Grid:
    """The grid without the stages up to its cells' parent, a checkpoint of stage `parent`."""
    if parent not in TRAINED:
        return grid
    gone = TRAINED[: TRAINED.index(parent) + 1]
    settings = {key for cell in grid.cells for key in cell.set} | set(grid.set) | set(grid.grid)
    for key in sorted(key for key in settings if key.partition(".")[0] in gone):
        raise UserError(f"The grid sets {key}, but PARENT= is a checkpoint of {parent}: it is not trained again.")
    for cell in grid.cells:
        if {**grid.set, **cell.set}.get("parent") in gone[:-1]:
            raise UserError(f"Cell {cell.name} begins at an earlier stage than PARENT=, a {parent}: give its parent.")
    cells = tuple(replace(cell, stages=tuple(s for s in cell.stages if s not in gone)) for cell in grid.cells)
    stages = tuple(stage for stage in grid.stages if stage not in gone)
    if not stages or any(old.stages and not new.stages for old, new in zip(grid.cells, cells, strict=True)):
        raise UserError(f"PARENT= is a checkpoint of {parent}, and cells of the grid end there: give an earlier one.")
    return replace(grid, stages=stages, cells=cells)


def of_recipe(path: Path, source: Source, choice: Choice) -> Source:
    """The grid of a recipe and its base, with the stages before it, or after a given parent, as the scale has them."""
    extends = read_yaml(path).data.get("extends")
    base = None if extends is None else path.parent / str(extends)
    stage, scale = str(source.data["stage"]), str(source.data.get("scale", "tiny"))
    if base is None or config.read(base).data.get("stage") != stage:
        raise UserError(
            f"{path} is a recipe that extends no other {stage}: name a grid, or extend what to compare with."
        )
    stages, above = [stage], source.data.get("parent")
    given = lineage.read(choice.parent).stage if choice.parent else ""
    while above in TRAINED and above != given:
        stages.insert(0, str(above))
        above = config.read(default_recipe(str(above), scale)).data.get("parent")
    common = Path("recipes/ablations/base.yaml")
    shared = config.read(common, (), choice.variant).data if common.is_file() and scale == "tiny" else {}
    cells = [{"name": base.stem, "recipe": str(base.resolve())}, {"name": path.stem, "recipe": str(path.resolve())}]
    return Source({**shared, "name": path.stem, "scale": scale, "stages": stages, "cells": cells}, {}, source.folders)


def expand(grid: Grid) -> list[Cell]:
    """Cells times every combination of `grid`, with the grid's own settings laid under theirs; names are unique."""
    cells = grid.cells or (Cell(""),)
    keys = list(grid.grid)
    ends = [key.rpartition(".")[2] for key in keys]
    labels = [end if ends.count(end) == 1 else key for key, end in zip(keys, ends, strict=True)]
    out = []
    for cell, values in itertools.product(cells, itertools.product(*grid.grid.values())):
        parts = [cell.name] if cell.name else []
        parts += [f"{label}-{_plain(value)}" for label, value in zip(labels, values, strict=True)]
        stages = cell.stages or grid.stages
        recipes = {**grid.recipes, **cell.recipes, **({stages[-1]: cell.recipe} if cell.recipe else {})}
        settings = {**grid.set, **cell.set, **dict(zip(keys, values, strict=True))}
        out.append(Cell("-".join(parts), "", recipes, settings, stages, cell.step_seconds))
    names = [cell.name for cell in out]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise UserError(f"Two cells of the grid are called '{twice[0]}': give them different names.")
    if grid.baseline and grid.baseline not in names:
        raise UserError(f"The baseline '{grid.baseline}' is no cell of the grid: it has {', '.join(names)}.")
    return out


def plan(path: Path, choice: Choice = Choice()) -> Plan:
    """All jobs of the grid at `path`; one UserError with every problem of its recipes."""
    grid, variant = read_grid(path, choice), choice.variant
    run = choice.run or f"{grid.name}{f'-{variant}' if variant else ''}"
    jobs: dict[str, Job] = {}
    ends: dict[tuple[str, int], str] = {}
    problems: list[str] = []
    reader = Reader(grid, path.parent, variant)
    for cell, seed in itertools.product(expand(grid), grid.seeds):
        try:
            for job in _chain(reader, cell, seed, f"{run}/{cell.name}-seed{seed}"):
                jobs.setdefault(job.key, job)
                ends[cell.name, seed] = job.key
        except UserError as error:
            told = error.message.splitlines()
            problems += [f"cell {cell.name}: {line.strip()}" for line in told if not line.endswith(" problems:")]
    if problems:
        raise UserError("\n".join(dict.fromkeys(problems)))
    return Plan(grid, path, run, jobs, ends)


class Reader:
    """Reads the recipes of a grid's cells, each once, with what decides their results."""

    def __init__(self, grid: Grid, base: Path, variant: str | None):
        self.grid, self.base, self.variant = grid, base, variant
        self.known: dict[tuple[Path, tuple[str, ...]], tuple[Recipe, dict[str, Any]]] = {}

    def read(self, stage: str, path: Path, overrides: tuple[str, ...]) -> tuple[Recipe, dict[str, Any]]:
        """The checked recipe and its facts."""
        if (path, overrides) not in self.known:
            recipe = load(path, overrides, self.variant)
            if recipe.stage != stage:
                raise UserError(f"{path} is a recipe of {recipe.stage} but {stage} is asked for.")
            self.known[path, overrides] = recipe, _facts(recipe)
        return self.known[path, overrides]


def _chain(reader: Reader, cell: Cell, seed: int, run: str) -> list[Job]:
    """The jobs of one cell with one seed, first things first; the last one scores it."""
    grid, variant = reader.grid, reader.variant
    jobs: list[Job] = []
    links: list[tuple[str, str]] = []
    above = _hash(lineage.read(grid.parent).hash) if grid.parent else ""
    for stage in cell.stages:
        last = stage == cell.stages[-1]
        own_seed = seed if last or grid.parents == "per_seed" else grid.seeds[0]
        path, overrides = _recipe_of(stage, cell, reader)
        overrides = (*overrides, f"seed={own_seed}")
        recipe, facts = reader.read(stage, path, overrides)
        needs = [jobs[-1].key] if jobs and jobs[-1].stage in TRAINED else []
        if recipe.rollout is not None and recipe.rollout.kind in NEEDS_TRAJECTORIES:
            known = next((job for job in jobs if job.stage == "trajectories"), None)
            source = known or _trajectories(reader, cell)
            jobs += [] if known else [source]
            links += [] if known else [("trajectories", source.run)]
            needs.append(source.key)
        key = _hash(facts, above, *needs)
        where = run if last else f"{SHARED}/{stage}-{key[:12]}"
        job = Job(
            stage=stage,
            run=where,
            key=key,
            family=_hash({**facts, "recipe": {**recipe.resolved, "seed": 0}}),
            recipe=path,
            overrides=overrides,
            needs=tuple(needs),
            links=tuple(links),
            parent=grid.parent if stage == cell.stages[0] else "",
            expected=_expected(grid, stage, recipe.train.steps, cell.step_seconds if last else None),
            steps=recipe.train.steps,
            variant=variant,
        )
        jobs.append(job)
        links.append((stage, where))
        above = key
    chosen = tuple(_override(f"evaluation.{key}", value) for key, value in grid.evaluation.items())
    reader.read(jobs[-1].stage, jobs[-1].recipe, (*jobs[-1].overrides, *chosen))  # are the evaluation's keys right?
    return [*jobs, _scoring(grid, jobs[-1], chosen)]


def _scoring(grid: Grid, trained: Job, chosen: tuple[str, ...]) -> Job:
    return replace(
        trained,
        stage=SCORE,
        key=_hash(trained.key, grid.evaluation, lineage.sources(*MEASURED_BY)),
        family=_hash(grid.evaluation, SCORE),
        overrides=chosen,
        needs=(trained.key,),
        links=(),
        parent="",
        expected=grid.step_seconds.get(SCORE),
        steps=0,
    )


def _trajectories(reader: Reader, cell: Cell) -> Job:
    path, overrides = _recipe_of("trajectories", cell, reader)
    recipe, facts = reader.read("trajectories", path, overrides)
    key = _hash(facts)
    where = f"{SHARED}/trajectories-{key[:12]}"
    expected = _expected(reader.grid, "trajectories", recipe.trajectories.count)
    return Job("trajectories", where, key, key, path, overrides, expected=expected, variant=reader.variant)


def _recipe_of(stage: str, cell: Cell, reader: Reader) -> tuple[Path, tuple[str, ...]]:
    """The recipe file of a stage, and the overrides that are meant for it."""
    given = cell.recipes.get(stage)
    path = reader.base / given if given else default_recipe(stage, reader.grid.scale)
    mine = []
    for key, value in cell.set.items():
        where, _, rest = key.partition(".")
        if where == "all":
            mine.append(_override(rest, value))
        elif where in TRAINED:
            mine += [_override(rest, value)] if where == stage else []
        elif where == "trajectories":
            mine += [_override(key, value)] if where == stage else []
        elif stage == cell.stages[-1]:
            mine.append(_override(key, value))
    return path, tuple(mine)


def _facts(recipe: Recipe) -> dict[str, Any]:
    """Everything beside its parents that decides what a recipe gives."""
    terms = {(spec.name, spec.source) for phase in recipe.phases for spec in phase.terms}
    functions = [config.term_function(*term) for term in sorted(terms)]
    if recipe.rollout is not None:
        functions.append(config.rollout_function(recipe.rollout.kind, recipe.rollout.source))
    files = [Path(inspect.getsourcefile(function) or "") for function in functions]
    return {
        "recipe": recipe.resolved,
        "code": {path.name: _hash(meaning(path.read_text(encoding="utf-8"))) for path in files},
        "data": read_fingerprint(Path(recipe.data.path)).get("fingerprint"),
        "teacher": find_teacher(recipe, run_folder(SHARED)).hash,
    }


def _expected(grid: Grid, stage: str, count: int, own: float | None = None) -> float | None:
    seconds = grid.step_seconds.get(stage) if own is None else own
    return None if seconds is None else START_SECONDS + seconds * count


def _split(text: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise UserError(f"The override '{text}' is not of the form key.key=value.")
    return key, parse_value(value)


def _override(key: str, value: Any) -> str:
    return f"{key}={json.dumps(value)}"


def _plain(value: Any) -> str:
    """A value as part of a folder's name."""
    return re.sub(r"[^A-Za-z0-9.]+", "-", str(value)).strip("-")


def _hash(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
