"""A small Online LPM of random weights, and what is put into it: 32 x 32 pixels, the real audio features."""

from __future__ import annotations

import torch
from conftest import small_codec, small_dit
from torch import Tensor

from student.causal_dit import CausalDiT, StreamConfig
from student.online import OnlineLPM
from teacher.audio import MELS


def small_model(chunk: int = 3, seed: int = 0, **changes) -> OnlineLPM:
    """Backbone and refiner with different weights."""
    stream = StreamConfig(chunk_frames=chunk, **changes)
    nets = [CausalDiT(small_dit(seed + i, torch.float32, mels=MELS), stream) for i in range(2)]
    return OnlineLPM(nets[0], nets[1], small_codec())


def tone(samples: int, seed: int = 0) -> Tensor:
    """Noise that comes and goes, about as loud as speech."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(samples, generator=generator) * 0.1 * torch.linspace(0, 40, samples).sin()


def images(count: int = 2, seed: int = 0) -> Tensor:
    return torch.rand(count, 3, 32, 32, generator=torch.Generator().manual_seed(seed))
