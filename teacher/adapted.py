"""A network as a view of another one: the base's weights, which are shared and never change, plus adapters of its own.

The view owns its adapters (and the heads that terms put on it) and nothing else: parameters(), optimizers, averages,
checkpoints and copies see these alone. Views and base may take turns at no cost.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from teacher.attention import KV, Blocks
from teacher.conditions import Conditions
from teacher.dit import DiT
from teacher.lora import Adapters, Linear, LoRAConfig, using

PREFIX = "adapters."


class AdaptedDiT(DiT):
    """A DiT that is `base` plus adapters; it starts as the base to the last bit."""

    def __init__(self, base: DiT, lora: LoRAConfig):
        nn.Module.__init__(self)  # no weights of its own
        if isinstance(base, AdaptedDiT):
            raise ValueError("A view of a view would lose the adapters between: merge them first.")
        self.config, self.lora = base.config, lora
        self._hidden = (base,)  # in a tuple: not a part of this module
        layers = {
            name: layer
            for name, layer in base.named_modules()
            if isinstance(layer, Linear) and name.startswith("blocks.") and name.split(".", 2)[2] in lora.targets
        }
        self.adapters = Adapters(layers, lora)

    @property
    def base(self) -> DiT:
        """The network whose weights this one shares."""
        return self._hidden[0]

    def run(
        self,
        x: Tensor,
        t: Tensor,
        cond: Conditions | None,
        positions: Tensor,
        context: list[list[KV]] | None,
        mask: Blocks | None = None,
        r: Tensor | None = None,
        keep: bool = True,
    ) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        with using(self.adapters):
            return self.base.run(x, t, cond, positions, context, mask, r, keep)

    def merged(self) -> dict[str, Tensor]:
        """The plain weights that give the same network without adapters, by the names of a DiT (and the heads')."""
        return self.state_dict_without_adapters() | merge(self.base.state_dict(), self.adapters)

    def state_dict_without_adapters(self) -> dict[str, Tensor]:
        """What terms have put on this view."""
        return {name: t for name, t in self.state_dict().items() if not name.startswith(PREFIX)}

    def __deepcopy__(self, memo: dict[int, Any]) -> AdaptedDiT:
        """A copy has adapters of its own and the same base."""
        import copy

        twin = AdaptedDiT(self.base, self.lora)
        for name, child in self.named_children():
            if name != "adapters":
                twin.add_module(name, copy.deepcopy(child, memo))
        twin.load_state_dict(self.state_dict())
        for ours, theirs in zip(twin.parameters(), self.parameters(), strict=True):
            ours.requires_grad_(theirs.requires_grad)
        return twin.train(self.training)


@torch.no_grad()
def merge(base: dict[str, Tensor], adapters: Adapters) -> dict[str, Tensor]:
    """Tensors of a DiT with the adapters' updates added, computed in the adapters' precision, kept in the base's."""
    merged = dict(base)
    for layer, slot in adapters.slots.items():
        name = f"{slot.replace('-', '.')}.weight"
        update = adapters.of(layer).update()
        merged[name] = (base[name].to(update) + update).to(base[name].dtype)
    return merged
