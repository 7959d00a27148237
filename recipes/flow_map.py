"""A flow map: one network for any number of steps (AnyFlow, https://arxiv.org/abs/2605.13724; the identity is that of
MeanFlow, https://arxiv.org/abs/2505.13447).

F(x, t, r) is the mean velocity of the path from t down to r: x_r = x_t - (t - r) F(x_t, t, r). Derived along the path,

    F(x_t, t, r) = v - (t - r) dF/dt        dF/dt = (F(x_t + h+ v, t + h+, r) - F(x_t - h- v, t - h-, r)) / (h+ + h-)

and the right side, under stop-gradient, is the target of the left: E = mean (F - target)^2 of a clip. The derivative
is a central difference, h both ways as far as r <= t +- h <= 1 allows: two more evaluations without gradient, and no
kernel for forward derivatives.

The target holds the network's own slope in t, and so it can run away from itself: of a network that hears t as
sinusoids of up to 1000 t, h = 5/1000 takes the whole slope, and a few clips with a long way from t to r drown all
others. The tiny recipe (docs/LOG.md, 30 November) needs a longer h and MeanFlow's weight, L = E / (E + 1e-3)^p with
the divisor under stop-gradient; where the target is noisy (velocity data) the weight moves the place of the least L,
and at p = 1 L is always near 1: E is logged as `error`. In bf16 the two sides of the difference round as much as they
differ at h = 5/1000: train in fp32, or with h = 0.02 and more.

Half of the clips take r = t (there F is the velocity), a quarter r = 0 (there it leads to x0), the others any r
between. Needs `model.flow_map` and the rollout `data`; every chunk is told its past as in recipes/consistency.py, where
`velocity` and `cfg` are explained too.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from distill.contracts import Roles, Roll, Term
from distill.rollout import given_history
from recipes.consistency import path_velocity
from teacher.draws import draw_rows
from teacher.flow import add_noise, per_frame, sample_time
from teacher.guidance import Guidance


@dataclass(frozen=True)
class Config:
    shift: float = 3.0  # of the times t
    instant: float = 0.5  # share of clips with r = t
    to_clean: float = 0.25  # share of clips with r = 0
    step: float = 0.005  # h
    adaptive: float = 0.0  # p; 0 is the mean of E
    velocity: str = "data"
    cfg: Guidance = field(default_factory=Guidance)

    def __post_init__(self):
        if min(self.instant, self.to_clean) < 0 or self.instant + self.to_clean > 1:
            raise ValueError("instant and to_clean are shares: at least 0, together at most 1")
        if self.shift <= 0 or not 0 < self.step < 0.5:
            raise ValueError("shift must be above 0 and step lie in (0, 0.5)")
        if self.adaptive < 0:
            raise ValueError("adaptive must be at least 0")
        if self.velocity not in ("data", "teacher"):
            raise ValueError(f"velocity {self.velocity!r} must be data or teacher")


def term(roll: Roll, roles: Roles, cfg: Config) -> Term:
    """Squared distance of F from the right side of its identity, every clip by its weight."""
    student = roles.causal("student")
    if not student.flow_map:
        raise ValueError("flow_map needs a student that hears where a step ends: model.flow_map must be true.")
    x0 = roll.x0.detach()
    t, r = draw_times(len(x0), roles, cfg)
    t, r = t.to(x0.device), r.to(x0.device)
    eps, past = roles.noise(x0, "flow_map/noise"), given_history(x0, roles, t)
    xt = add_noise(x0, eps, t)
    with torch.no_grad():
        v = path_velocity(x0, eps, xt, t, roll.cond, roles, cfg)
        up, down = (t + cfg.step).clamp(max=1.0), torch.maximum(t - cfg.step, r)
        ahead, behind = (student(xt + per_frame(s - t, xt) * v, s, roll.cond, *past, r) for s in (up, down))
        # At t = r = 1 there is no room on either side, and nothing for the derivative to be multiplied with.
        slope = (ahead - behind) / per_frame((up - down).clamp_min(1e-6), xt)
        target = v - per_frame(t - r, xt) * slope
    error = (student(xt, t, roll.cond, *past, r) - target).square().flatten(1).mean(1)  # [B]
    sizes = error.detach()
    instant = (t == r).to(sizes.dtype)
    logs = {"error": sizes.mean(), "instant": (sizes * instant).sum() / instant.sum().clamp_min(1)}
    return Term(((sizes + 1e-3) ** -cfg.adaptive * error).mean(), logs)


def draw_times(count: int, roles: Roles, cfg: Config) -> tuple[Tensor, Tensor]:
    """(t [B], r [B]) float64, r <= t."""
    t = sample_time((count,), cfg.shift, roles.rows("flow_map/time"))
    rows = roles.rows("flow_map/end")
    u = draw_rows(lambda n: torch.rand(2, n, generator=rows, dtype=torch.float64), count, rows, dim=1)
    r = torch.where(u[0] < cfg.instant + cfg.to_clean, torch.zeros_like(t), u[1] * t)
    return t, torch.where(u[0] < cfg.instant, t, r)
