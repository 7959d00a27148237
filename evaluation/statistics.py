"""From one value per clip to a mean with its standard error.

Every metric of this package returns a float64 vector [N] with one value per clip, NaN where it does not apply (lip sync
of a clip without speech). Statistics that are not means of clips (a ratio of sums, a Frechet distance, the peak of a
pooled curve) are written as *influence values*, a vector whose mean is the statistic and whose scatter is its jackknife
error (Efron & Tibshirani 1993, ch. 11). So means, errors and paired differences have one definition for all of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor


def mean_se(values: Tensor) -> dict[str, float]:
    """values [N] -> {"mean", "se"} over the clips that have a value; NaN where there are none (se: fewer than two)."""
    kept = values.double()[~values.isnan()]
    n = kept.numel()
    mean = kept.mean().item() if n else math.nan
    return {"mean": mean, "se": kept.std().item() / math.sqrt(n) if n > 1 else math.nan}


def exactly(value: float, num_clips: int) -> Tensor:
    """A known number (evaluations per chunk) as a per-clip vector [N] with standard error zero."""
    return torch.full((num_clips,), float(value), dtype=torch.float64)


def ratio_of_sums(numerator: Tensor, denominator: Tensor) -> Tensor:
    """[N], [N] -> influence values [N] of R = sum(a) / sum(b): R + (a - R b) / mean(b).

    The ratio of sums, not the mean of ratios: a clip whose truth hardly moves would otherwise count most.
    """
    a, b = numerator.double(), denominator.double()
    valid = ~(a.isnan() | b.isnan())
    out = torch.full_like(a, math.nan)
    if not valid.any() or b[valid].sum() == 0:
        return out
    ratio = a[valid].sum() / b[valid].sum()
    out[valid] = ratio + (a[valid] - ratio * b[valid]) / b[valid].mean()
    return out


def jackknife(statistic: Callable[[Tensor], float], clips: Tensor, num_clips: int) -> Tensor:
    """statistic(clip indices) -> influence values [num_clips]; `clips` [n] are those that take part, others are NaN.

    Pseudo-values n T - (n-1) T_(-i), moved so that their mean is T itself (the move removes the bias correction, which
    for a distance near zero would give negative values).
    """
    out = torch.full((num_clips,), math.nan, dtype=torch.float64)
    n = clips.numel()
    if n == 0:
        return out
    whole = statistic(clips)
    if n == 1:
        out[clips] = whole
        return out
    every = torch.ones(n, dtype=torch.bool)
    left_out = torch.tensor([statistic(clips[every.index_fill(0, torch.tensor([i]), False)]) for i in range(n)])
    out[clips] = whole + (n - 1) * (left_out.double().mean() - left_out.double())
    return out


def paired_difference(a: Tensor, b: Tensor) -> dict[str, float]:
    """a, b [N] on the same clips -> mean and standard error of a - b, and `z`, the difference in standard errors."""
    result = mean_se(a.double() - b.double())
    se = result["se"]
    return {"difference": result["mean"], "se": se, "z": result["mean"] / se if se > 0 else math.nan}


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """values [N, F], mask [N, F] bool -> mean over the masked frames [N], NaN where there are none."""
    count = mask.sum(1)
    mean = torch.where(mask, values, torch.zeros_like(values)).sum(1) / count.clamp(min=1)
    return torch.where(count > 0, mean, torch.full_like(mean, math.nan))


def masked_std(values: Tensor, mask: Tensor, least: int = 2) -> Tensor:
    """values [N, F], mask [N, F] bool -> standard deviation over the masked frames [N], NaN under `least` frames."""
    mean = masked_mean(values, mask).nan_to_num()[:, None]
    std = masked_mean((values - mean) ** 2, mask).sqrt()
    return torch.where(mask.sum(1) >= least, std, torch.full_like(std, math.nan))
