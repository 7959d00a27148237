"""One batch of training data, and the generator that draws it.

`Batch` holds latents, conditions and the ground truth that the renderer knows (motion, driven mouth and nod, labels);
a batch for streams has no latents. Every draw comes from a generator keyed by words and numbers, never the global one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from teacher.conditions import Conditions
from teacher.randomness import keyed_generator

__all__ = ["Batch", "keyed_generator"]


@dataclass(frozen=True)
class Batch:
    """F video frames = 4 T latent frames; audio in `cond` covers PAST + T latent frames."""

    latents: Tensor | None  # [B, T, C, H, W] float32; None where no clean video exists (streams)
    cond: Conditions
    state: Tensor  # [B, F] uint8: 0 silence, 1 speak, 2 listen
    motion: Tensor  # [B, F, P] float32
    driven_mouth: Tensor  # [B, F] float32, the mouth opening that the speak audio asks for
    driven_nod: Tensor  # [B, F] float32, the nod that the listen audio asks for
    labels: Tensor  # [B, 3] int64: expression, gaze, pose; -1 = unknown
    identity: Tensor  # [B] int64, unique over all splits
    index: Tensor  # [B] int64, row in the split

    def __len__(self) -> int:
        return len(self.index)

    def to(self, device: torch.device | str) -> Batch:
        return self._map(lambda value: value.to(device))

    def select(self, index: Tensor | slice) -> Batch:
        """Rows of the batch, from an index, a mask or a slice."""
        return self._map(lambda value: value.select(index) if isinstance(value, Conditions) else value[index])

    def _map(self, change: Callable[[Any], Any]) -> Batch:
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        changed: dict[str, Any] = {name: None if value is None else change(value) for name, value in values.items()}
        return Batch(**changed)
