"""Distribution matching distillation (DMD2, arXiv 2405.14867; in latent space as in Self-Forcing, arXiv 2506.08009).

    g = (x0_fake - x0_real) / max(mean |x - x0_real|, floor)          per chunk
    L = 1/2 mean (x - sg(x - g))^2          so that  dL/dx = g / number of elements

x0_real is the teacher's guided prediction and x0_fake the critic's conditional one, both at the same re-noised student
sample. Neither network sees a gradient. The teacher is bidirectional: it scores distributions, not causal paths.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from einops import rearrange, repeat
from torch import Tensor

from distill.contracts import Roles, Roll, Term
from teacher.flow import add_noise, sample_time, x0_from_v
from teacher.guidance import Guidance, guided_velocity


@dataclass(frozen=True)
class Config:
    cfg: Guidance = field(default_factory=lambda: Guidance(text=4.0, audio=4.0))
    shift: float = 5.0  # of the re-noising times
    low: float = 0.02
    high: float = 0.98
    floor: float = 1e-3  # of the normalizer

    def __post_init__(self):
        if not 0 < self.low < self.high < 1 or self.shift <= 0 or self.floor <= 0:
            raise ValueError("times need 0 < low < high < 1, shift and floor must be above 0")


def term(roll: Roll, roles: Roles, cfg: Config) -> Term:
    """Surrogate whose gradient in roll.x0 is the normalized score difference."""
    with torch.no_grad():
        gradient = dmd_gradient(roll.x0.detach(), roll, roles, cfg)
    target = roll.x0.detach() - gradient
    value = (roll.x0 - target).square().mean() / 2
    return Term(value, {"gradient": gradient.abs().mean()})


def dmd_gradient(x0: Tensor, roll: Roll, roles: Roles, cfg: Config) -> Tensor:
    """g [B, T, C, H, W] at one random time per clip."""
    t = sample_time((len(x0),), cfg.shift, roles.rows("dmd/time"), cfg.low, cfg.high).to(x0.device)
    xt = add_noise(x0, roles.noise(x0, "dmd/noise"), t)
    teacher, critic = roles.dit("teacher"), roles.dit("critic")
    real = x0_from_v(xt, guided_velocity(teacher, xt, t, roll.cond, cfg.cfg), t)
    fake = x0_from_v(xt, critic(xt, t, roll.cond), t)
    chunk = roles.stream.chunk_frames if x0.shape[1] % roles.stream.chunk_frames == 0 else x0.shape[1]
    scale = rearrange((x0 - real).abs(), "b (i k) c h w -> b i (k c h w)", k=chunk).mean(-1).clamp_min(cfg.floor)
    return (fake - real) / repeat(scale, "b i -> b (i k) 1 1 1", k=chunk)
