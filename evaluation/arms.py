"""Arms of a comparison: methods trained with the same seeds and scored on the same clips, and what sets them apart.

`contrast(arms, ...)` holds every arm against the baseline, metric by metric, paired over seeds and clips: the tables of
the page, and the content of compare.json. Values of an arm are [S, N]: seeds by clips (or by streams, for drift).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from evaluation.crossed import adjust, effect, p_value
from evaluation.drift import Drift
from evaluation.metrics import BY_KEY, COSTS, METRICS, MINUTES, Metric

LEVEL = 0.05
# one value per streamed character, not per clip
STREAMED = ("drift_slope_per_min", *(metric.key for metric in MINUTES))
MINUTES_OF = {  # where drift.json calls it otherwise
    "minutes_speak": "motion_speak",
    "minutes_listen": "motion_listen",
    "minutes_silence": "motion_silence",
    "minutes_sync": "sync",
    "minutes_unasked": "unasked",
    "minutes_copy": "copy",
}
Mark = Literal["better", "worse", "maybe better", "maybe worse", "same"]


@dataclass(frozen=True)
class Arm:
    """One method. `curves`: {tag: one {step: value} per seed}; `recipe`: dotted keys; `cost`: in the units of COST."""

    name: str
    seeds: tuple[int, ...]
    values: Mapping[str, Tensor]
    drift: Sequence[Drift] = ()
    curves: Mapping[str, Sequence[Mapping[int, float]]] = field(default_factory=dict)
    recipe: Mapping[str, Any] = field(default_factory=dict)
    cost: Mapping[str, float] = field(default_factory=dict)
    long: Sequence[Mapping[str, Any]] = ()  # drift.json of every seed, where all have one


@dataclass(frozen=True)
class Contrast:
    """An arm against the baseline in one metric. difference: of the values, arm - baseline; error: of the distances
    from ideal, negative when the arm is better, and what the test is about; adjusted: p for there being many tests."""

    difference: float
    difference_se: float
    error: float
    se: float
    df: float
    p: float
    adjusted: float = math.nan
    mark: Mark = "same"


COST = {  # what an arm costs: (label, digits)
    "steps": ("steps, all stages", 0),
    "train_s": ("training, s", 0),
    "step_s": ("s per step, last stage", 3),
    "peak_gib": ("peak memory, GiB", 2),
    "evaluations_per_chunk": ("evaluations per chunk", 0),
    "seconds_per_video_second": ("s per video s", 3),
}


def over_minutes(long: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
    """drift.json of every seed -> values [S, N] of MINUTES, N all characters that some seed streamed, NaN elsewhere."""
    people = sorted({who for told in long for who in told["identities"]})
    out = {}
    for metric in MINUTES:
        key = MINUTES_OF.get(metric.key, metric.key)
        if any(key not in one["rows"][one["subject"]]["per_character"] for one in long):
            continue  # measured before there was such a figure
        table = torch.full((len(long), len(people)), math.nan, dtype=torch.float64)
        for row, told in zip(table, long, strict=True):
            values = told["rows"][told["subject"]]["per_character"][key]
            at = [people.index(who) for who in told["identities"]]
            row[at] = torch.tensor([math.nan if value is None else value for value in values], dtype=torch.float64)
        out[metric.key] = table
    return out


def tested() -> list[Metric]:
    """The metrics that arms are compared in."""
    return [*(metric for metric in METRICS if metric.key not in COSTS), *MINUTES]


def summary(arm: Arm, metric: Metric, cluster: Tensor) -> dict[str, float]:
    """{"mean", "se"} of an arm over seeds and identities; cluster [N] names the identity of each clip."""
    if metric.key not in arm.values:
        return {"mean": math.nan, "se": math.nan}
    found = effect(arm.values[metric.key], _clusters(metric, arm.values[metric.key], cluster))
    return {"mean": found.mean.item(), "se": found.se.item()}


def contrast(arms: Sequence[Arm], baseline: str, cluster: Tensor) -> dict[str, dict[str, Contrast]]:
    """{arm: {metric: Contrast}} of every arm but the baseline; p-values are adjusted over all of them together."""
    base = next(arm for arm in arms if arm.name == baseline)
    found: dict[tuple[str, str], Contrast] = {}
    for arm in arms:
        for metric in tested():
            if arm is not base and metric.key in arm.values and metric.key in base.values:
                found[arm.name, metric.key] = _pair(arm, base, metric, cluster)
    adjusted = adjust([entry.p for entry in found.values()])
    out: dict[str, dict[str, Contrast]] = {arm.name: {} for arm in arms if arm is not base}
    for ((name, key), entry), p in zip(found.items(), adjusted, strict=True):
        out[name][key] = Contrast(**{**vars(entry), "adjusted": p, "mark": _mark(entry, p, BY_KEY[key])})
    return out


def ranking(arms: Sequence[Arm], contrasts: Mapping[str, Mapping[str, Contrast]]) -> list[tuple[str, int, int]]:
    """(arm, number of metrics that are surely better, surely worse than the baseline's), the best first."""
    rows = []
    for arm in arms:
        marks = [entry.mark for entry in contrasts.get(arm.name, {}).values()]
        rows.append((arm.name, marks.count("better"), marks.count("worse")))
    return sorted(rows, key=lambda row: row[2] - row[1])


def differing(arms: Sequence[Arm]) -> dict[str, list[Any]]:
    """{key: value per arm} of the recipes, only where they differ; a stage that an arm lacks is one line."""
    out: dict[str, list[Any]] = {}
    stages = dict.fromkeys(key.partition(".")[0] for arm in arms for key in arm.recipe)
    have = {stage: [any(k.startswith(f"{stage}.") for k in arm.recipe) for arm in arms] for stage in stages}
    for stage, present in have.items():
        if not all(present):
            out[stage] = ["trained" if there else "not trained" for there in present]
    for key in dict.fromkeys(key for arm in arms for key in arm.recipe):
        values = [arm.recipe.get(key, "–") for arm in arms]
        if all(have[key.partition(".")[0]]) and any(value != values[0] for value in values):
            out[key] = values
    return out


def mean_curve(curves: Sequence[Mapping[int, float]]) -> tuple[list[int], list[float], list[float]]:
    """One {step: value} per seed -> (steps that all have, mean, standard deviation over seeds)."""
    steps = sorted(set.intersection(*(set(curve) for curve in curves))) if curves else []
    table = torch.tensor([[curve[step] for step in steps] for curve in curves], dtype=torch.float64)
    if not steps:
        return [], [], []
    spread = table.std(0) if len(curves) > 1 else torch.zeros(len(steps))
    return steps, table.mean(0).tolist(), spread.tolist()


def _pair(arm: Arm, base: Arm, metric: Metric, cluster: Tensor) -> Contrast:
    ours, theirs = arm.values[metric.key].double(), base.values[metric.key].double()
    both = ~(ours.isnan() | theirs.isnan())  # a clip that one of them cannot be measured on says nothing about the pair
    ours, theirs = (torch.where(both, values, math.nan) for values in (ours, theirs))
    cluster = _clusters(metric, ours, cluster)
    plain = effect(ours - theirs, cluster)
    found = effect(metric.errors(ours) - metric.errors(theirs), cluster)
    mean, se, df = (part.item() for part in (found.mean, found.se, found.df))
    return Contrast(plain.mean.item(), plain.se.item(), mean, se, df, p_value(mean, se, df))


def _mark(entry: Contrast, adjusted: float, metric: Metric) -> Mark:
    """Sure when it holds among all the tests, "maybe" when it would hold alone; what nobody notices is the same."""
    if not abs(entry.error) >= metric.matters or not entry.p < LEVEL:
        return "same"
    if adjusted < LEVEL:
        return "better" if entry.error < 0 else "worse"
    return "maybe better" if entry.error < 0 else "maybe worse"


def _clusters(metric: Metric, values: Tensor, cluster: Tensor) -> Tensor:
    return torch.arange(values.shape[1]) if metric.key in STREAMED else cluster
