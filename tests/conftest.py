"""Small networks with every weight random (what starts at zero included), random conditions, and roles made of them.

At their start the head and the audio branch give zero, and a test of zeros proves nothing. float64 unless asked:
equalities of the mathematics then hold to 1e-10.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from distill.contracts import Roles
from distill.data.batch import Batch
from student.causal_dit import CausalDiT, StreamConfig
from teacher.codec import PCACodec
from teacher.conditions import AUDIO_PER_LATENT, PAST, Conditions
from teacher.dit import DiT, DiTConfig

SMALL = {
    "dim": 32,
    "depth": 2,
    "heads": 2,
    "ffn_dim": 24,
    "channels": 4,
    "text_dim": 6,
    "mels": 4,
    "references": ("global", "expression"),
}
SIDE = 4  # latent rows and columns


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def randomize(module: nn.Module, seed: int = 0) -> None:
    """Every parameter random, none at its special start, activations of order one."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        values = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        if parameter.ndim > 1:
            parameter.data.copy_(values / parameter.shape[-1] ** 0.5)
        else:
            parameter.data.copy_(0.1 * values + name.endswith("weight"))  # weights of norms stay around one


def small_dit(seed: int = 0, dtype: torch.dtype = torch.float64, **changes: Any) -> DiT:
    model = DiT(DiTConfig(**{**SMALL, **changes})).to(dtype)
    randomize(model, seed)
    return model


def small_student(stream: StreamConfig, seed: int = 0, dtype: torch.dtype = torch.float64, **changes: Any) -> CausalDiT:
    return CausalDiT(small_dit(seed, dtype, **changes), stream)


def conditions(
    frames: int, batch: int = 2, present: tuple[int, ...] = (1, 1), seed: int = 0, dtype: torch.dtype = torch.float64
) -> Conditions:
    """Random conditions; `present` says which reference slots hold an image."""
    features = AUDIO_PER_LATENT * (PAST + frames)
    return Conditions(
        speak=normal(batch, features, 4, seed=10 * seed + 1, dtype=dtype),
        listen=normal(batch, features, 4, seed=10 * seed + 2, dtype=dtype),
        text=normal(batch, 3, 6, seed=10 * seed + 3, dtype=dtype),
        text_mask=torch.tensor([[True, True, False]]).expand(batch, -1).clone(),
        refs=normal(batch, len(present), 4, SIDE, SIDE, seed=10 * seed + 4, dtype=dtype),
        ref_mask=torch.tensor([present]).bool().expand(batch, -1).clone(),
    )


def latents(frames: int, batch: int = 2, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return normal(batch, frames, 4, SIDE, SIDE, seed=seed + 500, dtype=dtype)


def small_codec() -> PCACodec:
    basis, _ = torch.linalg.qr(normal(768, 4, seed=7))
    return PCACodec(torch.full((768,), 0.5), basis, torch.tensor([2.0, 1.5, 1.0, 0.5]))


def batch_of(cond: Conditions, x0: Tensor | None = None) -> Batch:
    rows = len(cond.speak)
    nothing = torch.zeros(rows, 1)
    return Batch(
        latents=x0,
        cond=cond,
        state=nothing,
        motion=nothing,
        driven_mouth=nothing,
        driven_nod=nothing,
        labels=torch.zeros(rows, 3, dtype=torch.long),
        identity=torch.arange(rows),
        index=torch.arange(rows),
    )


def small_roles(stream: StreamConfig, models: dict[str, nn.Module] | None = None, **changes: Any) -> Roles:
    """Teacher, critic and student with different weights, key (seed, rank, step, micro-step, phase) of zeros."""
    known: dict[str, nn.Module] = {
        "teacher": small_dit(1).requires_grad_(False),
        "critic": small_dit(2),
        "student": small_student(stream, 3),
    }
    return Roles({**known, **(models or {})}, stream, small_codec(), key=(0, 0, 1, 0, 0), **changes)


def at_step(roles: Roles, step: int, rank: int = 0) -> Roles:
    return replace(roles, key=(0, rank, step, 0, 0), processes=rank + 1)


def gradients(module: nn.Module) -> list[Tensor | None]:
    return [parameter.grad for parameter in module.parameters()]


def has_gradient(module: nn.Module) -> bool:
    return any(gradient is not None and bool(gradient.abs().sum() > 0) for gradient in gradients(module))
