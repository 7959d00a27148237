"""The cheapest baseline for drift: means and spreads of every chunk's channels are held at the stream's first chunk's.

    L = mean_i,c relu(|mu_ic - mu_1c| - margin) + relu(|sigma_ic - sigma_1c| - margin)

over frames, rows and columns of chunk i; the first chunk's are constants. It knows nothing of faces: colors, brightness
and sharpness drift in these statistics (adaptive instance normalization matches them, https://arxiv.org/abs/1703.06868).
Latents [B, T, C, H, W] -> scalar.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor

from distill.contracts import Roles, Roll, Term


@dataclass(frozen=True)
class Config:
    margin: float = 0.0  # difference that is nobody's business
    high: float = 1.0  # noise level of the evaluation above which nothing is said

    def __post_init__(self):
        if self.margin < 0 or not 0 < self.high <= 1:
            raise ValueError("margin must be at least 0, high lie in (0, 1]")


def term(roll: Roll, roles: Roles, cfg: Config) -> Term:
    """Hinged distance of the statistics; without a known first chunk the clip's own first counts as that."""
    if roll.time is not None and roll.time > cfg.high:
        return Term(0 * roll.x0.sum())
    size = roles.stream.chunk_frames
    first = roll.x0[:, :size] if roll.first is None else roll.first
    found, wanted = statistics(roll.x0, size), statistics(first.detach(), size)  # [2, B, chunks, C]
    gap = (found - wanted).abs()
    return Term((gap - cfg.margin).relu().sum(0).mean(), {"mean": gap[0].mean(), "spread": gap[1].mean()})


def statistics(x: Tensor, size: int) -> Tensor:
    """Mean and standard deviation of every channel in every chunk: [2, B, chunks, C]."""
    values = rearrange(x, "b (i k) c h w -> b i c (k h w)", k=size)
    return torch.stack([values.mean(-1), values.var(-1, unbiased=False).add(1e-8).sqrt()])
