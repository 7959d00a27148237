"""What the shipped recipes cost, worked out beforehand: `make recipes` shows it at once, `make recipes PLAN=1` makes it
again.

Recipes for GPUs: the first of `OFFERS` that they fit on as written, by the planner (estimated). Recipes for a CPU:
memory by the planner, hours from a whole run of it: tested where that had all cores, estimated where it had fewer
threads, as runs side by side have. recipes/costs.json: {path: Price}
"""

from __future__ import annotations

import hashlib
import json
import statistics
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from distill.config import Recipe, load, read, to_yaml
from distill.errors import UserError
from distill.runs import RESOLVED, RUNS, write_json
from distill.tracking import progress

FILE = Path("recipes/costs.json")
OFFERS = ((1, 24), (1, 80), (8, 80), (8, 141), (16, 141))  # GPUs, GB of each
ON_CPU = ("tiny",)  # scales that are run without GPU


@dataclass(frozen=True)
class Price:
    """`recipe` is the hash of what was priced; gpus 0 is a CPU; hours None where no run was measured."""

    recipe: str
    gpus: int
    gpu_memory: int
    gigabytes: float
    hours: float | None
    tested: bool

    @property
    def words(self) -> tuple[str, str, str, str]:
        """(GPUs, GB, hours, how they are known)."""
        where = f"{self.gpus}x{self.gpu_memory} GB" if self.gpus else "none"
        hours = "-" if self.hours is None else f"{self.hours:.2f}" if self.hours < 1 else f"{self.hours:.0f}"
        return where, f"{self.gigabytes:.1f}", hours, "tested" if self.tested else "estimated"


def known() -> dict[str, Price]:
    """The prices on record, by path; none where the file is not there."""
    return {path: Price(**price) for path, price in json.loads(FILE.read_text()).items()} if FILE.is_file() else {}


def digest(path: Path) -> str:
    """What a price holds for: all that the recipe and those it extends say."""
    return hashlib.sha256(json.dumps(read(path).data, sort_keys=True).encode()).hexdigest()[:16]


def renew(paths: list[Path]) -> None:
    """Price recipes and write the file. Hours of what runs on a CPU come from the runs in runs/; those on record
    stay, if the recipe is still the same, until a run knows better."""
    prices, before = {}, known()
    for path in progress(paths, "recipes"):
        recipe = load(path)
        if recipe.phases:
            with suppress(UserError):  # of what the planner cannot follow nothing is known beforehand
                made = price(recipe, digest(path))
                prices[str(path)] = asdict(_with_hours_on_record(made, before.get(str(path))))
    write_json(FILE, prices)


def price(recipe: Recipe, digest: str) -> Price:
    """Price of one recipe as written."""
    from distill.engine.config import EngineConfig
    from distill.plan import GB, plan
    from distill.standing import Setting

    if recipe.scale in ON_CPU:
        hours, tested = _measured(recipe)
        needed = plan(Setting(recipe, 1, EngineConfig(kind="plain")), 80 * GB).total / GB
        return Price(digest, 0, 0, round(needed, 2), hours, tested)
    for gpus, memory in OFFERS:
        made = plan(Setting(recipe, gpus, EngineConfig(kind="plain" if gpus == 1 else "fsdp2")), memory * GB)
        if made.fits:
            return Price(digest, gpus, memory, round(made.total / GB, 1), round(made.hours, 2), False)
    raise UserError(f"{recipe.name} fits on none of {OFFERS} as written: see make plan for what makes it fit.")


def _with_hours_on_record(made: Price, kept: Price | None) -> Price:
    """What was tested is worth more than an estimate, and that more than nothing."""
    if kept is None or kept.recipe != made.recipe or made.tested:
        return made
    return replace(made, hours=kept.hours, tested=kept.tested) if kept.tested or made.hours is None else made


def _measured(recipe: Recipe) -> tuple[float | None, bool]:
    """Hours of the fastest whole run of just this recipe, whatever its seed, in runs/, by the median of its steps; and
    whether it had a thread for every core: the others are asked only where no run had."""
    wanted = _work(to_yaml(recipe))
    found: dict[bool, list[float]] = {True: [], False: []}
    for curves in RUNS.glob("**/metrics.jsonl"):
        resolved = curves.parent / RESOLVED
        if not resolved.is_file() or _work(resolved.read_text(encoding="utf-8")) != wanted:
            continue
        records = [json.loads(line) for line in curves.read_text(encoding="utf-8").splitlines()]
        paces = [record["perf/step_s"] for record in records if "perf/step_s" in record]
        if paces and records[-1]["step"] >= recipe.train.steps:
            machine = json.loads((curves.parent / "env.json").read_text(encoding="utf-8"))
            alone = machine["threads"] >= machine["cores"]
            found[alone].append(statistics.median(paces) * recipe.train.steps / 3600)
    tested = bool(found[True])
    return (round(min(found[tested]), 3) if found[tested] else None), tested


def _work(written: str) -> dict[str, Any]:
    """What a recipe, as resolved, has to do: neither its seed nor the limits of its verdict cost time."""
    return {key: value for key, value in yaml.safe_load(written).items() if key not in ("seed", "health")}
