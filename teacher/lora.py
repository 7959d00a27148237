"""Low-rank adapters (LoRA, arXiv 2106.09685): several networks on one frozen set of base weights.

A view (`teacher/adapted.py`) is a DiT to all who use it and owns nothing but its adapters: it computes
y = W x + alpha / rank * B A x, W the base's weight, A random, B zero, so it starts as the base. Student, critic and
teacher on one base are three views of the same tensors. A view says which adapters count for the length of one call,
and again when activation checkpointing repeats a block in the backward pass, when another view may have run last.

adapters [rank, in], [out, rank] per target  ->  merged(): the plain weights W + alpha / rank * B A
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

TARGETS = (
    *(f"self_attn.{name}" for name in "qkvo"),
    *(f"cross_attn.{name}" for name in ("q", "k", "v", "o", "audio_k", "audio_v", "audio_o")),
    "ffn.0",
    "ffn.2",
)


@dataclass(frozen=True)
class LoRAConfig:
    """Adapters of one role: `targets` are the layers of a block that get one."""

    rank: int = 64
    alpha: float = 64.0
    targets: tuple[str, ...] = TARGETS

    def __post_init__(self):
        unknown = [name for name in self.targets if name not in TARGETS]
        if self.rank < 1 or self.alpha <= 0:
            raise ValueError(f"rank {self.rank} must be at least 1, alpha {self.alpha} above 0")
        if unknown or not self.targets:
            raise ValueError(f"targets: {', '.join(unknown) or 'none'}; at least one is needed, out of {TARGETS}")


class Adapter(nn.Module):
    """What one view adds to one layer. A module of its own: engines that gather weights by module gather it."""

    def __init__(self, layer: Linear, config: LoRAConfig):
        super().__init__()
        self.scale = config.alpha / config.rank
        # Masters of fp32 or better, whatever the base is kept in.
        dtype = torch.promote_types(layer.weight.dtype, torch.float32)
        down = layer.weight.new_empty(config.rank, layer.in_features, dtype=dtype)
        if down.is_meta and not torch.empty(0).is_meta:  # on a base that is yet to be filled
            down = torch.empty(config.rank, layer.in_features, dtype=dtype)
        if not down.is_meta:
            nn.init.kaiming_uniform_(down, a=math.sqrt(5))
        self.down = nn.Parameter(down)
        self.up = nn.Parameter(down.new_zeros(layer.out_features, config.rank))

    def forward(self, x: Tensor) -> Tensor:
        """What is added to the layer's output for its input x [..., in] -> [..., out]."""
        low = F.linear(x, self.down.to(x.dtype))
        return self.scale * F.linear(low, self.up.to(low.dtype))

    def update(self) -> Tensor:
        """What is added to the layer's weight, fp32 or better [out, in]."""
        return self.scale * self.up @ self.down


class Adapters(nn.Module):
    """What one view adds to a network: down [rank, in] and up [out, rank] for every adapted layer, by its name."""

    def __init__(self, layers: dict[str, Linear], config: LoRAConfig):
        super().__init__()
        # Dots stand in names of layers, but may not in names of modules.
        self.slots = {layer: name.replace(".", "-") for name, layer in layers.items()}
        self.layers = nn.ModuleDict({slot: Adapter(layer, config) for layer, slot in self.slots.items()})

    def add(self, layer: Linear, x: Tensor, y: Tensor) -> Tensor:
        """y plus what this view adds to `layer` of x."""
        slot = self.slots.get(layer)
        return y if slot is None else y + self.layers[slot](x).to(y.dtype)

    def of(self, layer: Linear) -> Adapter:
        """The adapter of an adapted layer."""
        adapter = self.layers[self.slots[layer]]
        assert isinstance(adapter, Adapter)
        return adapter


_in_use: list[Adapters | None] = [None]


@dataclass(frozen=True)
class using(AbstractContextManager[None]):  # noqa: N801
    """Within the block every adapted layer adds what `adapters` say. May be entered any number of times."""

    adapters: Adapters | None

    def __enter__(self) -> None:
        _in_use.append(self.adapters)

    def __exit__(self, *error: object) -> None:
        _in_use.pop()


def in_use() -> Adapters | None:
    """The adapters that count now."""
    return _in_use[-1]


class Linear(nn.Linear):
    """nn.Linear that may be adapted."""

    def forward(self, x: Tensor) -> Tensor:
        return self.product(x, self.bias)

    def product(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """W x + bias, the adapters in use included."""
        y, adapters = F.linear(x, self.weight, bias), _in_use[-1]
        return y if adapters is None else adapters.add(self, x, y)
