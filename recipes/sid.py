"""Score identity distillation (SiD, https://arxiv.org/abs/2404.04057): the Fisher divergence of student and teacher
over noise levels, by an estimate that does not trust the critic alone.

With real, fake the x0 that teacher (guided) and critic see in x_t = (1 - t) x + t eps, x being the student's sample:

    L = mean [ (real - fake) (fake - x) + (1 - alpha) |real - fake|^2 ] / sg(max(mean |x - real|, floor))     per chunk

A perfect critic is the mean of x given x_t, and then alpha = 0, which is (real - fake) (real - x), is the divergence
|real - fake|^2 in the mean. Its gradient takes the critic for a constant, though the critic follows the student; alpha
takes the square, which suffers most from that, away (1) or turns it round (the paper: 1.2 is best).
Unlike in DMD the gradient runs through teacher and critic to x; their weights are frozen by the trainer.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from distill.contracts import Roles, Roll, Term
from recipes.dmd import chunk_scale, renoised
from teacher.flow import x0_from_v
from teacher.guidance import Guidance, guided_velocity


@dataclass(frozen=True)
class Config:
    cfg: Guidance = field(default_factory=lambda: Guidance(text=4.0, audio=4.0))
    alpha: float = 1.0
    shift: float = 5.0  # of the re-noising times
    low: float = 0.02
    high: float = 0.98
    floor: float = 1e-3  # of the normalizer

    def __post_init__(self):
        if not 0 < self.low < self.high < 1 or self.shift <= 0 or self.floor <= 0:
            raise ValueError("times need 0 < low < high < 1, shift and floor must be above 0")
        if not 0 <= self.alpha <= 2:
            raise ValueError("alpha must lie in [0, 2]")


def term(roll: Roll, roles: Roles, cfg: Config) -> Term:
    """The estimate; it may fall below zero."""
    x0 = roll.x0
    xt, t = renoised(x0, "sid", roles, cfg)
    real = x0_from_v(xt, guided_velocity(roles.dit("teacher"), xt, t, roll.cond, cfg.cfg), t)
    fake = x0_from_v(xt, roles.dit("critic")(xt, t, roll.cond), t)
    gap = real - fake
    scale = chunk_scale((x0 - real).detach(), roles, cfg.floor)
    value = ((gap * (fake - x0) + (1 - cfg.alpha) * gap.square()) / scale).mean()
    return Term(value, {"gap": gap.detach().square().mean().sqrt()})
