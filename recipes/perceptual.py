"""Perceptual distance between the student's decoded frames and the target's (CausVid, https://arxiv.org/abs/2412.07772,
and LPM 1.0 use LPIPS here, https://arxiv.org/abs/1801.03924).

Without learned features in reach, distance is taken on a Laplacian pyramid of the decoded pixels: every band counts
alike, so that the few pixels of a mouth or an eyelid weigh as much as the large flat areas that dominate latent MSE.
Charbonnier penalty sqrt(d^2 + eps^2) per band; frames are drawn at random to bound the cost.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from distill.contracts import Roles, Roll, Term


@dataclass(frozen=True)
class Config:
    levels: int = 3  # bands of the pyramid
    frames: int = 4  # latent frames per clip that are decoded
    epsilon: float = 0.02  # below this a difference counts quadratically

    def __post_init__(self):
        if self.levels < 1 or self.frames < 1 or self.epsilon <= 0:
            raise ValueError("levels and frames must be at least 1, epsilon above 0")


def term(roll: Roll, roles: Roles, cfg: Config) -> Term:
    """Mean pyramid distance between decode(x0) and decode(target)."""
    if roll.target is None:
        raise ValueError("perceptual needs a rollout with a target: rollout.kind teacher, renoised or data.")
    chosen = torch.randperm(roll.x0.shape[1], generator=roles.generator("perceptual", shared=True))[: cfg.frames].to(
        roll.x0.device
    )
    ours, theirs = (roles.codec.decode_unclamped(x[:, chosen]) for x in (roll.x0, roll.target))
    return Term(pyramid_distance(ours.flatten(0, 1), theirs.flatten(0, 1), cfg))


def pyramid_distance(a: Tensor, b: Tensor, cfg: Config) -> Tensor:
    """Images [N, 3, H, W] -> scalar; zero (up to epsilon) only for equal images."""
    difference, total = a - b, a.new_zeros(())  # the pyramid is linear: the difference's bands are enough
    for level in range(cfg.levels):
        coarse = F.avg_pool2d(difference, 2) if level + 1 < cfg.levels else None
        band = difference if coarse is None else difference - F.interpolate(coarse, scale_factor=2.0, mode="bilinear")
        total = total + ((band.square() + cfg.epsilon**2).sqrt() - cfg.epsilon).mean()
        difference = coarse if coarse is not None else difference
    return total / cfg.levels
