"""When does a stream stop showing its character? Thresholds of verification, and survival with censored streams.

A window fails when it lies further from its character's references than the distance at which a stranger would be let
in once in a thousand (false match rate 1e-3); a stream fails at the first of three failing windows in a row. Streams
that last to their end are censored: Kaplan & Meier (1958) -> curve; its area up to the horizon is the restricted mean.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from evaluation.bootstrap import interval_of

FALSE_MATCH_RATE = 1e-3
IN_A_ROW = 3


def threshold(strangers: Tensor, rate: float = FALSE_MATCH_RATE) -> float:
    """Distances between different characters [n] -> the largest distance d for which at most `rate` of them are <= d.

    ValueError when there are too few to speak about so small a rate.
    """
    ordered = strangers.double().flatten().sort().values
    allowed = math.floor(rate * len(ordered) + 1e-9)
    if allowed < 1:
        raise ValueError(f"{len(ordered)} distances say nothing about a rate of {rate:g}: give {round(1 / rate)}.")
    return ordered[allowed - 1].item()


def verification(own: Tensor, strangers: Tensor, rate: float = FALSE_MATCH_RATE) -> dict[str, float]:
    """Distances to the own [m] and to other references [n] -> {"threshold", "true_match_rate", "equal_error_rate"}."""
    at = threshold(strangers, rate)
    every = torch.cat([own.flatten(), strangers.flatten()]).double().unique()
    a, b = own.double().flatten().sort().values, strangers.double().flatten().sort().values
    missed = 1 - torch.searchsorted(a, every, right=True) / len(a)
    passed = torch.searchsorted(b, every, right=True) / len(b)
    best = (missed - passed).abs().argmin()
    equal = (missed[best] + passed[best]).item() / 2
    return {"threshold": at, "true_match_rate": (own <= at).double().mean().item(), "equal_error_rate": equal}


@dataclass(frozen=True)
class Lifetimes:
    """minutes [N] at which each stream failed, or ended; failed [N] bool: False is censored."""

    minutes: Tensor
    failed: Tensor


def time_to_failure(
    minutes: Tensor, distance: Tensor, limit: float, horizon: float, in_a_row: int = IN_A_ROW
) -> Lifetimes:
    """minutes [W] of the windows, distance [N, W] -> when `in_a_row` windows beyond `limit` begin, or the horizon."""
    beyond = distance.double() > limit
    runs = beyond.unfold(1, in_a_row, 1).all(2)  # [N, W - in_a_row + 1]
    failed = runs.any(1)
    first = minutes.double()[runs.double().argmax(1)]
    return Lifetimes(torch.where(failed, first, float(horizon)), failed)


def kaplan_meier(lives: Lifetimes) -> tuple[list[float], list[float]]:
    """-> times of failures (0 in front) and the share that lives on from each: S = prod (1 - died / at risk).

    A stream that is censored at the time of a failure counts as at risk there.
    """
    times, shares, share = [0.0], [1.0], 1.0
    for time in lives.minutes[lives.failed].unique().tolist():
        died = ((lives.minutes == time) & lives.failed).sum().item()
        share *= 1 - died / (lives.minutes >= time).sum().item()
        times.append(time)
        shares.append(share)
    return times, shares


def restricted_mean(lives: Lifetimes, horizon: float) -> float:
    """Mean minutes without failure up to the horizon: the area under the curve."""
    times, shares = kaplan_meier(lives)
    ends = [*times[1:], horizon]
    return sum(s * max(0.0, min(b, horizon) - a) for a, b, s in zip(times, ends, shares, strict=True))


def restricted_mean_difference(a: Lifetimes, b: Lifetimes, horizon: float, seed: int = 0) -> dict[str, float]:
    """Two arms with the same identities in the same order -> restricted mean of a minus b, {"mean", "low", "high"}.

    Identities are resampled for both arms together: what they share cancels.
    """

    def gap(chosen: Tensor) -> Tensor:
        return torch.tensor(restricted_mean(_of(a, chosen), horizon) - restricted_mean(_of(b, chosen), horizon))

    return interval_of(gap, len(a.minutes), seed, draws=1000)


def _of(lives: Lifetimes, chosen: Tensor) -> Lifetimes:
    return Lifetimes(lives.minutes[chosen], lives.failed[chosen])
