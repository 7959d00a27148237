"""Data-forcing: at high noise the real score is asked at the data, not at the student's sample: a late addition to
distribution matching (https://arxiv.org/abs/2405.14867).

    g = m (x0_fake(x_t) - x0_real(y_t)) / mean |x - x0_real(y_t)|        per chunk, t > low; x the sample, y the data

under the same condition and noise; m is 0 in the box of the mouth, which follows the audio by itself, and 1 elsewhere.
Where the student has stilled, its noised sample tells the teacher of no motion, so the teacher asks for none; the data
do. For a few hundred late steps beside `dmd`: from scratch it diverges. Needs the data's clip under the condition of
the samples: rollouts `self` and `renoised`, or `long` whose streams begin anew with every update.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from distill.contracts import Roles, Roll, Term
from recipes.dmd import chunk_scale, surrogate
from teacher.flow import add_noise, sample_time, x0_from_v
from teacher.guidance import Guidance, guided_velocity


@dataclass(frozen=True)
class Config:
    cfg: Guidance = field(default_factory=Guidance)
    shift: float = 5.0  # of the re-noising times
    low: float = 0.8
    high: float = 0.98
    floor: float = 1e-3  # of the normalizer
    mouth: tuple[float, float, float, float] = (0.0, 0.0, 0.0, 0.0)  # top, bottom, left, right, as shares; none

    def __post_init__(self):
        if not 0 < self.low < self.high < 1 or self.shift <= 0 or self.floor <= 0:
            raise ValueError("times need 0 < low < high < 1, shift and floor must be above 0")
        top, bottom, left, right = self.mouth
        if not (0 <= top <= bottom <= 1 and 0 <= left <= right <= 1):
            raise ValueError(f"mouth {list(self.mouth)} must be top <= bottom, left <= right, as shares of the picture")


def term(roll: Roll, roles: Roles, cfg: Config) -> Term:
    """Surrogate whose gradient in roll.x0 is g over the number of elements."""
    if roll.real is None:
        raise ValueError("data_forcing needs the data's clip under the samples' condition: rollout.kind self.")
    with torch.no_grad():
        x0 = roll.x0.detach()
        t = sample_time((len(x0),), cfg.shift, roles.rows("data_forcing/time"), cfg.low, cfg.high).to(x0.device)
        eps = roles.noise(x0, "data_forcing/noise")
        xt, yt = (add_noise(x, eps, t) for x in (x0, roll.real))
        fake = x0_from_v(xt, roles.dit("critic")(xt, t, roll.cond), t)
        real = x0_from_v(yt, guided_velocity(roles.dit("teacher"), yt, t, roll.cond, cfg.cfg), t)
        g = outside(cfg.mouth, x0) * (fake - real) / chunk_scale(x0 - real, roles, cfg.floor)
    return surrogate(roll.x0, g)


def outside(box: tuple[float, float, float, float], like: Tensor) -> Tensor:
    """[H, W]: 0 in the box, 1 elsewhere."""
    mask = torch.ones(like.shape[-2:], dtype=like.dtype, device=like.device)
    top, bottom, left, right = (
        round(share * side) for share, side in zip(box, (len(mask),) * 2 + mask.shape[1:] * 2, strict=True)
    )
    mask[top:bottom, left:right] = 0
    return mask
