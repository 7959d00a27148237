"""Measure reference bands: `python -m distill bands --recipe R --seeds 3 --steps N` -> recipes/<scale>/bands/R.json.

Every seed trains the recipe's first N steps in runs/bands/<name>-seed<k>, scheduled as the whole recipe says, from
parents that all seeds and recipes share: the stages of the run PARENTS, or of runs/bands/parents, where what is missing
is trained first. What is done is not done again, an interrupted seed goes on. Without a recipe: all of the scale.
"""

from __future__ import annotations

import os
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from distill import pipeline, reference
from distill.config import STAGES, Recipe, read
from distill.data.prepare import read_fingerprint
from distill.data.version import made_by
from distill.errors import ExitCode, UserError
from distill.options import Options
from distill.reference import Band, Origin, as_json, measured, settings
from distill.runs import read_status, run_folder, write_text
from distill.state import checkpoint, lineage
from distill.state.lineage import Manifest

TRAJECTORIES = "trajectories"


def measure(options: Options) -> None:
    """Bands of the recipe, or of all recipes of the scale that train something."""
    seeds, steps = _count(options, "seeds", 3), _count(options, "steps", 0)
    if seeds < 2:
        raise UserError("A band needs the spread of at least 2 seeds: give SEEDS=3.")
    for path in [options.recipe] if options.recipe else shipped(options.scale):
        chosen = replace(options, recipe=path)
        recipe = chosen.load(str(read(path).data.get("stage")))
        if recipe.phases:
            one(chosen, recipe, seeds, min(steps or recipe.train.steps, recipe.train.steps))


def shipped(scale: str) -> list[Path]:
    """All recipes of a scale, in the order of their stages."""
    paths = [path for path in sorted(Path("recipes", scale).rglob("*.yaml")) if "stage" in read(path).data]
    return sorted(paths, key=lambda path: STAGES.index(read(path).data["stage"]))


def one(options: Options, recipe: Recipe, seeds: int, steps: int) -> Path:
    """Train the seeds of one recipe and write its band beside those of its other variants."""
    assert options.recipe is not None
    name = f"{options.recipe.stem}{f'-{options.variant}' if options.variant else ''}"
    above = parents(options, recipe)
    runs, spent = [], 0.0
    for seed in range(seeds):
        run = f"bands/{name}-seed{seed}"
        began = time.process_time()
        train(replace(options, run=run, overrides=(*options.overrides, f"seed={seed}")), recipe, steps, above)
        spent += time.process_time() - began
        runs.append(run_folder(run) / recipe.stage)
    manifest = lineage.read(runs[0])
    about: dict[str, Any] = {"recipe": recipe.name, "variant": options.variant, "seeds": list(range(seeds))}
    about |= {"set": list(options.overrides)} if options.overrides else {}
    about |= {"code": manifest.data["code"]["sources"], "cpu_seconds": round(spent, 1)}
    band = measured(origin_of(manifest), [run / "metrics.jsonl" for run in runs], steps, about)
    path = reference.bands_of(recipe) / f"{options.recipe.stem}.json"
    write(path, band)
    print(f"Wrote {path}: {len(band.curves)} curves up to step {steps}, {spent:.0f} CPU seconds in this call.")
    return path


def train(options: Options, recipe: Recipe, steps: int, above: dict[str, Path]) -> None:
    """The first `steps` steps of one seed, unless they were made before."""
    folder = run_folder(options.run)
    if int(read_status(folder / recipe.stage).get("step", 0)) >= steps:
        return
    folder.mkdir(parents=True, exist_ok=True)
    for stage, place in above.items():
        link = folder / stage
        if not link.exists():
            link.symlink_to(os.path.relpath(place, folder))
    try:
        pipeline.train_stage(replace(options, parent=None), recipe.stage, until=steps)
    except UserError as error:
        done = int(read_status(folder / recipe.stage).get("step", 0)) >= steps
        if error.code != ExitCode.STOPPED or not done:
            raise


def parents(options: Options, recipe: Recipe) -> dict[str, Path]:
    """Folders of the stages that a recipe starts from, made where they are missing."""
    causal = recipe.rollout is not None and getattr(recipe.rollout.config, "source", "") == "ar-teacher"
    variant = f"-{options.variant}" if options.variant else ""
    run = options.own.get("parents") or f"bands/parents{'-ar' if causal else ''}{variant}"
    plain = replace(options, recipe=None, run=run, parent=None, overrides=(), several=True)
    found = {}
    if recipe.parent not in (None, "teacher"):
        parent = str(recipe.parent)
        above = plain.load(parent)
        parents(options, above)
        if read_status(run_folder(run) / parent).get("status") != "done":
            pipeline.train_stage(plain, parent)
        found[parent] = run_folder(run) / parent
    if recipe.rollout is not None and recipe.rollout.kind in pipeline.NEEDS_TRAJECTORIES:
        made = run_folder(run) / TRAJECTORIES
        if not (made / checkpoint.MANIFEST).is_file():
            wanted = next(
                path
                for path in shipped(options.scale)
                if read(path).data["stage"] == TRAJECTORIES
                and (read(path).data.get("parent") == "ar-teacher") == causal
            )
            pipeline.make(replace(plain, recipe=wanted), run_folder(run))
        found[TRAJECTORIES] = made
    return found


def origin_of(manifest: Manifest) -> Origin:
    """What a checkpoint's run was made of, from its manifest; the trainer says the same of itself."""
    data: dict[str, Any] = manifest.data
    parent = lineage.read(data["parent"]["path"]) if data.get("parent") else None
    above = settings(parent.recipe, whole=True) if parent and parent.stage != "teacher" else None
    facts = read_fingerprint(Path(manifest.recipe["data"]["path"]))
    return Origin(settings(manifest.recipe), made_by(facts) if facts else None, data.get("teacher"), above)


def write(path: Path, band: Band) -> None:
    """Put a band into its file, in the place of one of the same settings, or of what the same command gave before."""
    kept = reference.read(path) if path.is_file() else []
    kept = [one for one in kept if one.origin.settings != band.origin.settings and _asked(one) != _asked(band)]
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, as_json([*kept, band]))


def _asked(band: Band) -> tuple[Any, Any]:
    return band.about.get("variant"), band.about.get("set", [])


def _count(options: Options, name: str, default: int) -> int:
    given = options.own.get(name, "")
    if given and not given.isdigit():
        raise UserError(f"--{name} takes a number, this is '{given}'.")
    return int(given or default)
