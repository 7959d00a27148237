"""Samplers of the teacher: Euler and Heun on the probability-flow ODE.

Both take a velocity function `(x, t [B]) -> v`, start from noise `x` [B, T, C, H, W] and go down float64 `times`
from 1 to 0. A trajectory is the list of states at every time, the first being the noise itself.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

Velocity = Callable[[Tensor, Tensor], Tensor]


def euler(velocity: Velocity, x: Tensor, times: Tensor) -> list[Tensor]:
    """First order, one evaluation per step. Returns the states at all `times`."""
    states = [x]
    for t, following in zip(times[:-1], times[1:], strict=True):
        x = x + float(following - t) * velocity(x, t.expand(len(x)))
        states.append(x)
    return states


def heun(velocity: Velocity, x: Tensor, times: Tensor) -> list[Tensor]:
    """Second order (trapezoid), two evaluations per step but one for the last. Returns the states at all `times`."""
    states = [x]
    for t, following in zip(times[:-1], times[1:], strict=True):
        step = float(following - t)
        v = velocity(x, t.expand(len(x)))
        ahead = x + step * v
        # At t = 0 the velocity is an extrapolation; the last step stays first order, as in EDM.
        x = x + step * (v + velocity(ahead, following.expand(len(x)))) / 2 if following > 0 else ahead
        states.append(x)
    return states


SAMPLERS = {"euler": euler, "heun": heun}


def evaluations(sampler: str, steps: int) -> int:
    """Velocity evaluations of a sampler."""
    return 2 * steps - 1 if sampler == "heun" else steps
