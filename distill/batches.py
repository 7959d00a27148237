"""Batches of the right shapes for work that needs no data: plans, checks of a machine, tests of recipes.

Clip -> Batch with latents [B, T, C, H, W], audio, text and every reference present
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from distill.data.batch import Batch, keyed_generator
from teacher.codec import STRIDE
from teacher.conditions import AUDIO_PER_LATENT, PAST, TEXT_LENGTH, Conditions
from teacher.dit import DiTConfig


@dataclass(frozen=True)
class Clip:
    """What a clip of a prepared data set measures: latent frames, rows, columns; text tokens."""

    frames: int = 12
    rows: int = 8
    columns: int = 8
    text_length: int = TEXT_LENGTH

    def __post_init__(self):
        if min(self.frames, self.rows, self.columns, self.text_length) < 1:
            raise ValueError("frames, rows, columns and text_length must be at least 1")


def clip_of(data: Any) -> Clip:
    """The clips of a recipe's data set: as stated under `data.clip`, else those that `make data` prepares."""
    if data.clip is not None:
        return data.clip
    prepare = data.prepare
    return Clip(prepare.clip_frames // STRIDE[0], prepare.size // STRIDE[1], prepare.size // STRIDE[2])


def batch_like(model: DiTConfig, clip: Clip, size: int, seed: int = 0, device: str = "cpu") -> Batch:
    """`size` clips of noise under noisy conditions, the same for the same seed."""
    generator = keyed_generator("batch of noise", seed)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(size, *shape, generator=generator)

    features = AUDIO_PER_LATENT * (PAST + clip.frames)
    text = noise(clip.text_length, model.text_dim)
    refs = noise(len(model.references), model.channels, clip.rows, clip.columns)
    cond = Conditions(
        speak=noise(features, model.mels),
        listen=noise(features, model.mels),
        text=text,
        text_mask=torch.ones(text.shape[:2], dtype=torch.bool),
        refs=refs,
        ref_mask=torch.ones(refs.shape[:2], dtype=torch.bool),
    )
    rows = torch.arange(size)
    nothing = torch.zeros(size, 4 * clip.frames)
    labels = torch.zeros(size, 3, dtype=torch.long)
    latents = noise(clip.frames, model.channels, clip.rows, clip.columns)
    batch = Batch(latents, cond, nothing, nothing[..., None], nothing, nothing, labels, rows, rows)
    return batch.to(device)
