"""Slopes and their confidence, when what was drawn at random are the identities, not the windows.

Windows of one character share its oddities, so characters are resampled whole (cluster bootstrap; Davison & Hinkley
1997, ch. 3.8). The percentile interval is too short for a few dozen clusters; its levels are widened as Hesterberg
(2015, arXiv 1411.5279, section 4.3) does, so that it covers what it says. values [N] or [N, W], one row per identity.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from statistics import NormalDist

import torch
from torch import Tensor

from evaluation.crossed import p_value
from teacher.randomness import keyed_generator

DRAWS = 4000
LEVEL = 0.95


def interval(values: Tensor, seed: int = 0, level: float = LEVEL, draws: int = DRAWS) -> dict[str, float]:
    """values [N], one per identity, NaN where there is none -> {"mean", "low", "high"}; NaN ends under two."""
    known = values.double()[~values.isnan()]
    if not len(known):
        return {"mean": math.nan, "low": math.nan, "high": math.nan}
    means = known[resample(len(known), seed, draws)].mean(1)
    return {"mean": known.mean().item(), **_ends(means, len(known), level)}


def interval_of(
    statistic: Callable[[Tensor], Tensor], count: int, seed: int = 0, level: float = LEVEL, draws: int = DRAWS
) -> dict[str, float]:
    """Of any statistic: identities chosen [n] -> scalar. For ratios of sums, areas under survival curves, ..."""
    whole = float(statistic(torch.arange(count)))
    values = torch.stack([statistic(chosen).double() for chosen in resample(count, seed, draws)])
    return {"mean": whole, **_ends(values[~values.isnan()], count, level)}


def slope_per_minute(minutes: Tensor, values: Tensor) -> Tensor:
    """minutes [W], values [N, W], NaN where a window has none -> least-squares slope of each row [N]."""
    known = ~values.isnan()
    weight, filled = known.double(), torch.where(known, values.double(), 0.0)
    count = weight.sum(1, keepdim=True)
    x = (minutes.double() - (weight * minutes).sum(1, keepdim=True) / count) * weight
    return (x * filled).sum(1) / x.square().sum(1)


def shuffled(values: Tensor, seed: int = 0) -> Tensor:
    """values [N, W] with the windows of each row in random order: whatever was a trend is none any more."""
    order = torch.rand(values.shape, generator=keyed_generator(seed, "shuffled time")).argsort(1)
    return values.gather(1, order)


def resample(count: int, seed: int, draws: int) -> Tensor:
    """Identities drawn with replacement [draws, count]; the same for the same count and seed, so arms stay paired."""
    return torch.randint(count, (draws, count), generator=keyed_generator(seed, "bootstrap", count))


def _ends(values: Tensor, count: int, level: float) -> dict[str, float]:
    if count < 2 or not len(values):
        return {"low": math.nan, "high": math.nan}
    tail = widened(count, (1 - level) / 2)
    low, high = values.quantile(torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist()
    return {"low": low, "high": high}


def widened(count: int, tail: float) -> float:
    """The tail probability at which to read the bootstrap distribution, for an interval of tails `tail`:
    Phi(-sqrt(n / (n - 1)) t), t the quantile of Student's distribution with n - 1 degrees of freedom."""
    return NormalDist().cdf(-math.sqrt(count / (count - 1)) * student_quantile(count - 1, 1 - tail))


@lru_cache(maxsize=64)
def student_quantile(df: float, level: float) -> float:
    """The value that Student's t with `df` degrees of freedom stays below with probability `level` > 1/2."""
    low, high = 0.0, 1.0
    while p_value(high, 1.0, df) > 2 * (1 - level):
        high *= 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if p_value(middle, 1.0, df) > 2 * (1 - level) else (low, middle)
    return (low + high) / 2


def band(values: Tensor, seed: int = 0) -> dict[str, list[float]]:
    """values [N, W] -> {"mean", "low", "high"} over identities, window by window, for curves."""
    points: Sequence[dict[str, float]] = [interval(column, seed, draws=800) for column in values.T]
    return {key: [point[key] for point in points] for key in ("mean", "low", "high")}
