"""Train the identity embedder of a data set: pairs of frames from different clips of one character, InfoNCE.

Mouth, blink and pose differ between the clips of a pair, so the embedder learns to overlook them. A little noise on the
latents keeps it from reading the codec's finest channels, which generated clips do not reproduce.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from distill.data import dataset
from distill.data.batch import keyed_generator
from distill.tracking import progress
from teacher.embedder import IdentityEmbedder, contrastive_loss

STEPS, CHARACTERS, NOISE = 300, 64, 0.3


def ensure_embedder(data: Path, seed: int = 0) -> Path:
    """The embedder folder of a data set, trained first if it is missing."""
    folder = data / "embedder"
    if not (folder / "embedder.json").is_file():
        train_embedder(data, seed).save(folder)
    return folder


def train_embedder(data: Path, seed: int) -> IdentityEmbedder:
    """A few hundred steps on the train split; `natural` is measured on the validation split."""
    latents, clips = _by_character(data, "train")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = IdentityEmbedder(*latents.shape[-3:])
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3, weight_decay=0.05)
    for step in progress(range(STEPS), "identity embedder"):
        generator = keyed_generator(seed, "embedder", step)
        who = torch.randperm(len(clips), generator=generator)[:CHARACTERS]
        a, b = _pairs(latents, clips[who], generator)
        loss = contrastive_loss(model(a)[:, 0], model(b)[:, 0])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.requires_grad_(False).eval()
    held_out, pairs = _by_character(data, "validation")
    faces = model(held_out)  # [N, T, E]
    model.natural = float((faces[pairs[:, 0]] * faces[pairs[:, 1]].flip(1)).sum(-1).mean())
    return model


def _by_character(data: Path, split: str) -> tuple[Tensor, Tensor]:
    """Latents [N, T, C, H, W] and the rows of each character's clips [characters, clips]."""
    batch = dataset.load(data, split).all()
    assert batch.latents is not None
    order = batch.identity.argsort(stable=True)
    return batch.latents, order.unflatten(0, (batch.identity.unique().numel(), -1))


def _pairs(latents: Tensor, clips: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Two noised frames of different clips of each character, each [B, 1, C, H, W]."""
    which = torch.rand(clips.shape, generator=generator).argsort(1)[:, :2]
    rows = clips.gather(1, which)  # [B, 2]
    frames = torch.randint(latents.shape[1], rows.shape, generator=generator)
    chosen = latents[rows, frames]  # [B, 2, C, H, W]
    chosen = chosen + NOISE * torch.randn(chosen.shape, generator=generator)
    return chosen[:, :1], chosen[:, 1:]
