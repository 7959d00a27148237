"""Flow time, and the one place that converts between x0, v and eps. Times are float64, t in [0, 1], 1 = noise.

    x_t = (1 - t) x0 + t eps        v = eps - x0        x0 = x_t - t v        eps = x_t + (1 - t) v
    shift: t' = s t / (1 + (s - 1) t)                                         (rectified flow; SD3, Wan)

Times broadcast: t [B] or [B, T] against latents [B, T, C, H, W].
"""

from __future__ import annotations

import torch
from torch import Tensor

from teacher.draws import draw_rows


def shift_time(t: Tensor, shift: float) -> Tensor:
    """Warp flow time towards noise (shift > 1)."""
    return shift * t / (1 + (shift - 1) * t)


def unshift_time(t: Tensor, shift: float) -> Tensor:
    """Inverse of `shift_time`."""
    return t / (shift - (shift - 1) * t)


def schedule(num_steps: int, shift: float) -> Tensor:
    """`num_steps + 1` float64 times from 1 to 0, uniform before the shift."""
    return shift_time(torch.linspace(1, 0, num_steps + 1, dtype=torch.float64), shift)


def sample_time(shape: tuple[int, ...], shift: float, generator: torch.Generator, low=0.0, high=1.0) -> Tensor:
    """Shifted uniform times of `shape` [B, ...], clamped to [low, high], float64."""
    rows, device = shape[1:], generator.device
    u = draw_rows(
        lambda n: torch.rand((n, *rows), generator=generator, dtype=torch.float64, device=device), shape[0], generator
    )
    return shift_time(u, shift).clamp(low, high)


def per_frame(t: Tensor, like: Tensor) -> Tensor:
    """t [B] or [B, T] -> a tensor of `like`'s dtype that broadcasts against `like` [B, T, C, H, W]."""
    if t.ndim > 2:
        raise ValueError(f"A time has shape [B] or [B, T], got {tuple(t.shape)}.")
    return t.to(like.dtype).reshape(*t.shape, *[1] * (like.ndim - t.ndim))


def add_noise(x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
    """x_t of clean x0 and noise eps."""
    t = per_frame(t, x0)
    return (1 - t) * x0 + t * eps


def velocity(x0: Tensor, eps: Tensor) -> Tensor:
    """The flow's target."""
    return eps - x0


def x0_from_v(xt: Tensor, v: Tensor, t: Tensor) -> Tensor:
    return xt - per_frame(t, xt) * v


def eps_from_v(xt: Tensor, v: Tensor, t: Tensor) -> Tensor:
    return xt + (1 - per_frame(t, xt)) * v


def v_from_x0(xt: Tensor, x0: Tensor, t: Tensor) -> Tensor:
    """Undefined at t = 0, where x_t is x0 whatever v is."""
    return (xt - x0) / per_frame(t, xt)


def v_from_eps(xt: Tensor, eps: Tensor, t: Tensor) -> Tensor:
    """Undefined at t = 1."""
    return (eps - xt) / (1 - per_frame(t, xt))
