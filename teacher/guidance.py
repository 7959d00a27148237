"""Classifier-free guidance per modality, in one convention everywhere:

    v = u + w_text (text - u) + w_audio (text+audio - text)

u hears silence and reads nothing; references are kept in every branch. With w_text = w_audio the middle branch
cancels and is not evaluated. Self-Forcing's `guidance_scale: s` is `c + s (c - u)`, which is w = s + 1 here.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from teacher.attention import KV
from teacher.conditions import Conditions
from teacher.dit import DiT


@dataclass(frozen=True)
class Guidance:
    """Weights per modality; 1.0 = plain conditional, no extra evaluation."""

    text: float = 1.0
    audio: float = 1.0

    @property
    def evaluations(self) -> int:
        """Network evaluations per guided velocity."""
        return len(_branch_weights(self))


def guided_velocity(
    model: DiT, x: Tensor, t: Tensor, cond: Conditions, guidance: Guidance, refs: list[list[KV]] | None = None
) -> Tensor:
    """Guided velocity of the bidirectional model, [B, T, C, H, W].."""
    refs = model.encode_refs(cond) if refs is None else refs
    # Conditional and unconditional passes one after the other: a joint batch would double the peak memory at 17B.
    out = torch.zeros_like(x)
    for weight, told in branches(cond, guidance):
        out = out + weight * model(x, t, told, refs)
    return out


def branches(cond: Conditions, guidance: Guidance) -> list[tuple[float, Conditions]]:
    """(weight, conditions) of every velocity that the guided one is a sum of."""
    told = {"full": cond, "text": cond.drop(audio=True), "none": cond.drop(audio=True, text=True)}
    return [(weight, told[name]) for name, weight in _branch_weights(guidance).items()]


def _branch_weights(guidance: Guidance) -> dict[str, float]:
    """Coefficient of each branch that has to be evaluated."""
    weights = {"full": guidance.audio, "text": guidance.text - guidance.audio, "none": 1 - guidance.text}
    return {name: weight for name, weight in weights.items() if weight != 0}
