"""Samplers of the teacher: Euler and Heun on the probability-flow ODE, and the few-step re-noising sampler.

All take a velocity function `(x, t [B]) -> v`, start from noise `x` [B, T, C, H, W] and go down float64 `times`
from 1 to 0. A trajectory is the list of states at every time, the first being the noise itself.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from teacher.flow import add_noise, x0_from_v

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


def few_step(velocity: Velocity, x: Tensor, steps: list[float], generator: torch.Generator) -> Tensor:
    """x0 prediction, fresh noise down to the next time, and again: the distilled sampler, `len(steps)` evaluations."""
    for index, time in enumerate(steps):
        t = torch.full((len(x),), time, dtype=torch.float64, device=x.device)
        x0 = x0_from_v(x, velocity(x, t), t)
        if index + 1 == len(steps):
            return x0
        eps = torch.randn(x.shape, generator=generator, device=x.device, dtype=x.dtype)
        x = add_noise(x0, eps, torch.full_like(t, steps[index + 1]))
    raise ValueError("The few-step sampler needs at least one step.")
