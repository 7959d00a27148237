"""Is a difference more than chance, when both the clips and the seeds of the training are draws of many?

Two methods trained with the same seeds and scored on the same clips give differences d[seed, identity]. Seeds and
identities are crossed random factors, as readers and cases are in diagnostic studies (Dorfman, Berbaum & Metz 1992;
Hillis 2007, 10.1002/sim.2532): the variance of the mean is that of seeds plus that of identities minus what both
count, its degrees of freedom follow Satterthwaite. Where every seed was scored on identities of its own (nested, not
crossed), the means of the seeds are the draws. values [S, N] -> table [S, I] -> Effect -> p.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from mpmath import betainc
from torch import Tensor


@dataclass(frozen=True)
class Effect:
    """A mean over seeds and identities, its standard error, and the degrees of freedom of that; each [...]."""

    mean: Tensor
    se: Tensor
    df: Tensor


def by_cluster(values: Tensor, cluster: Tensor) -> Tensor:
    """values [S, N] of clips, NaN where a clip has none; cluster [N] -> table [S, I] of influence values.

    The mean of a row is the mean over its clips, however many of them each cluster has; clusters without a value in
    any seed are left out.
    """
    values = values.double()
    known = ~values.isnan()
    names, where = cluster.unique(return_inverse=True)
    count = known.sum(1, keepdim=True)
    means = torch.where(known, values, 0.0).sum(1, keepdim=True) / count  # NaN where a seed has no value at all
    apart = torch.where(known, values - means, 0.0)
    rows = torch.zeros(len(values), len(names), dtype=torch.float64)
    sums = rows.index_add(1, where, apart)
    kept = rows.index_add(1, where, known.double()).sum(0) > 0
    sums = sums[:, kept]
    return means + sums * sums.shape[1] / count


def crossed(table: Tensor) -> Effect:
    """table [..., S, I] -> the mean over both, as a draw of other seeds and other identities would vary.

    With one seed only the identities count (and the result speaks of that one training); one identity tells nothing.
    """
    seeds, people = table.shape[-2:]
    mean = table.mean((-2, -1))
    if people < 2:
        nothing = torch.full_like(mean, math.nan)
        return Effect(mean, nothing, nothing)
    by_seed, by_person = table.mean(-1, keepdim=True), table.mean(-2, keepdim=True)
    ms_people = seeds * by_person.squeeze(-2).var(-1)
    if seeds < 2:
        return Effect(mean, (ms_people / people).sqrt(), torch.full_like(mean, people - 1.0))
    rest = table - by_seed - by_person + mean[..., None, None]
    ms_seeds = people * by_seed.squeeze(-1).var(-1)
    ms_rest = rest.square().sum((-2, -1)) / ((seeds - 1) * (people - 1))
    more = ms_people > ms_rest
    total = ms_seeds + torch.where(more, ms_people - ms_rest, 0.0)
    parts = ms_people.square() / (people - 1) + ms_rest.square() / ((seeds - 1) * (people - 1))
    df = total.square() / (ms_seeds.square() / (seeds - 1) + torch.where(more, parts, 0.0))
    return Effect(mean, (total / (seeds * people)).sqrt(), df)


def effect(values: Tensor, cluster: Tensor) -> Effect:
    """values [S, N], NaN where a seed has none; cluster [N] names identities -> crossed, or nested where no identity
    was scored with more than one seed."""
    known = ~values.isnan()
    names = cluster.unique()
    scored = torch.stack([known[:, cluster == name].any(1) for name in names], 1)  # [S, I]
    if len(values) < 2 or not known.any() or (scored.sum(0) > 1).any():
        return crossed(by_cluster(values, cluster))
    means = values.double().nanmean(1)
    df = torch.tensor(len(means) - 1.0, dtype=torch.float64)
    return Effect(means.mean(), means.std() / math.sqrt(len(means)), df)


def p_value(mean: float, se: float, df: float) -> float:
    """Two-sided, of Student's t; NaN where there is no error to hold the mean against, 1 where nothing differs."""
    if mean == 0 and se == 0:
        return 1.0
    if not se > 0 or not df > 0:
        return math.nan
    t2 = (mean / se) ** 2
    return float(betainc(df / 2, 0.5, 0, df / (df + t2), regularized=True))


def adjust(p_values: Sequence[float]) -> list[float]:
    """The p-values adjusted for there being so many (Benjamini & Hochberg 1995): of what stays below 0.05, one in
    twenty is expected to be chance; where nothing differs at all, even one is as unlikely. NaN does not count."""
    known = sorted(((p, i) for i, p in enumerate(p_values) if not math.isnan(p)), reverse=True)
    adjusted = [math.nan] * len(p_values)
    lowest = 1.0
    for above, (p, i) in enumerate(known):
        lowest = min(lowest, p * len(known) / (len(known) - above))
        adjusted[i] = lowest
    return adjusted
