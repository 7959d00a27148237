"""DMD with guidance and distribution matching apart (Decoupled DMD, https://arxiv.org/abs/2511.22677).

A guided teacher puts two forces into one difference: x0_fake - x0_plain draws the student's distribution to the
teacher's, x0_plain - x0_guided pushes it along the conditions. Here each has noise, times and a weight of its own:

    g = w_d (x0_fake - x0_plain) / mean |x - x0_plain|              at x_s, time and noise of the distribution's part
      + w_g (x0_plain - x0_guided) / mean |x - x0_plain|            at x_t, time and noise of the guidance's part

per chunk, with the surrogate loss of recipes/dmd.py. Guidance at high noise alone (`guidance: {low: 0.5}`) shapes what
is said and leaves the fine structure to the distribution's part.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from distill.contracts import Roles, Roll, Term
from recipes.dmd import chunk_scale, renoised, surrogate
from teacher.flow import x0_from_v
from teacher.guidance import Guidance, guided_velocity


@dataclass(frozen=True)
class Part:
    """One force: how strong, and at which times."""

    weight: float = 1.0
    shift: float = 5.0
    low: float = 0.02
    high: float = 0.98

    def __post_init__(self):
        if not 0 < self.low < self.high < 1 or self.shift <= 0 or self.weight < 0:
            raise ValueError("times need 0 < low < high < 1, shift must be above 0, weight at least 0")


@dataclass(frozen=True)
class Config:
    cfg: Guidance = field(default_factory=lambda: Guidance(text=4.0, audio=4.0))
    distribution: Part = field(default_factory=Part)
    guidance: Part = field(default_factory=Part)
    floor: float = 1e-3  # of the normalizers

    def __post_init__(self):
        if self.floor <= 0:
            raise ValueError("floor must be above 0")


def term(roll: Roll, roles: Roles, cfg: Config) -> Term:
    """Surrogate whose gradient in roll.x0 is the sum of both parts."""
    x0 = roll.x0.detach()
    with torch.no_grad():
        distribution = distribution_part(x0, roll, roles, cfg)
        guidance = guidance_part(x0, roll, roles, cfg)
    logs = {"distribution": distribution.abs().mean(), "guidance": guidance.abs().mean()}
    value = surrogate(roll.x0, distribution + guidance)
    return Term(value.value, value.logs | logs)


def distribution_part(x0: Tensor, roll: Roll, roles: Roles, cfg: Config) -> Tensor:
    """Critic less plain teacher, [B, T, C, H, W]."""
    xt, t = renoised(x0, "decoupled_dmd/distribution", roles, cfg.distribution)
    plain = x0_from_v(xt, roles.dit("teacher")(xt, t, roll.cond), t)
    fake = x0_from_v(xt, roles.dit("critic")(xt, t, roll.cond), t)
    return cfg.distribution.weight * (fake - plain) / chunk_scale(x0 - plain, roles, cfg.floor)


def guidance_part(x0: Tensor, roll: Roll, roles: Roles, cfg: Config) -> Tensor:
    """Plain teacher less guided teacher, [B, T, C, H, W]; without guidance it is zero and costs nothing."""
    if cfg.cfg == Guidance() or cfg.guidance.weight == 0:
        return torch.zeros_like(x0)
    xt, t = renoised(x0, "decoupled_dmd/guidance", roles, cfg.guidance)
    teacher = roles.dit("teacher")
    refs = teacher.encode_refs(roll.cond)
    plain = x0_from_v(xt, teacher(xt, t, roll.cond, refs), t)
    guided = x0_from_v(xt, guided_velocity(teacher, xt, t, roll.cond, cfg.cfg, refs), t)
    return cfg.guidance.weight * (plain - guided) / chunk_scale(x0 - plain, roles, cfg.floor)
