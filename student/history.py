"""What of a finished chunk is remembered: one schedule for training rollouts and for streaming.

clean    as it was made
fixed    noised to the level `noise` (what was seen clean in training has drifted when streamed)
matched  noised to the time of the step that will look at it: keys and values per step (Live Avatar, HiAR)
random   every frame spoiled in one of three ways: noised to a level below `noise`, made coarse by down- and
         up-sampling, or over- or under-exposed, x (1 + u) (Helios); for a linear codec that is contrast about its mean

x0 [B, T, C, H, W]  ->  what is run through the network, the same shape, and its noise level [B], or [B, T] for random
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from teacher.draws import draw_rows, gaussian
from teacher.flow import add_noise

KINDS = ("clean", "fixed", "matched", "random")


@dataclass(frozen=True)
class History:
    """The backbone's; the refiner's is `CLEAN`."""

    kind: str = "fixed"
    noise: float = 0.1  # level of fixed, highest level of random
    coarse: int = 2  # random: factor of the down-sampling
    exposure: float = 0.3  # random: largest u

    def __post_init__(self):
        if self.kind not in KINDS:
            raise ValueError(f"history.kind {self.kind!r} must be one of {', '.join(KINDS)}")
        if not 0 <= self.noise < 1 or self.coarse < 1 or not 0 <= self.exposure < 1:
            raise ValueError("history needs noise and exposure in [0, 1), coarse of at least 1")

    @property
    def uniform(self) -> bool:
        """One level for all frames and steps: what the network for streaming (student/fast.py) can write."""
        return self.kind in ("clean", "fixed")

    def times(self, steps: tuple[float, ...]) -> tuple[float, ...]:
        """Of the memories to be kept: one per step for matched, else a single one, whose step is of no account."""
        return steps if self.kind == "matched" else (0.0,)

    def spoiled(self, x0: Tensor, generator: torch.Generator, step: Tensor | float = 0.0) -> tuple[Tensor, Tensor]:
        """x0 as it is remembered, and its level; `step`: the time(s) [B] of the step that will look, for matched."""
        if self.kind == "random":
            return self._random(x0, generator)
        level = {"clean": 0.0, "fixed": self.noise, "matched": step}[self.kind]
        t = torch.as_tensor(level, dtype=torch.float64).to(x0.device).expand(len(x0))
        return (add_noise(x0, gaussian(x0, generator), t) if t.any() else x0), t

    def _random(self, x0: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        frames = x0.shape[1]
        drawn = draw_rows(lambda n: torch.rand(n, frames, 3, generator=generator), len(x0), generator)
        mode, level, u = drawn.double().to(x0.device).unbind(-1)  # [B, T] each
        noisy, coarse = mode < 1 / 3, (mode >= 1 / 3) & (mode < 2 / 3)
        t = torch.where(noisy, self.noise * level, 0.0)
        exposed = x0 * (1 + self.exposure * (2 * u - 1)).to(x0.dtype)[..., None, None, None]
        spoiled = torch.where(coarse[..., None, None, None], blurred(x0, self.coarse), exposed)
        noised = add_noise(x0, gaussian(x0, generator), t)
        return torch.where(noisy[..., None, None, None], noised, spoiled), t


CLEAN = History("clean")


def blurred(x: Tensor, factor: int) -> Tensor:
    """[B, T, C, H, W] without what is finer than `factor` latent pixels: averaged, then interpolated back."""
    flat = x.flatten(0, 1)
    size = (max(1, flat.shape[-2] // factor), max(1, flat.shape[-1] // factor))
    coarse = F.interpolate(F.adaptive_avg_pool2d(flat, size), flat.shape[-2:], mode="bilinear")
    return coarse.unflatten(0, x.shape[:2])
