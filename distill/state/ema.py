"""Exponential moving average of a network's parameters, kept in fp32 beside the trained copy.

ema <- decay * ema + (1 - decay) * parameter after every step from `start_step` on; before it the average is a plain
copy, so that the first wild steps leave no trace. Names and shapes are those of `module.named_parameters()`.
"""

from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor


class Named(Protocol):
    """A module, or what of it lies in this process (distill.engine.Pieces)."""

    def named_parameters(self) -> Iterator[tuple[str, Tensor]]: ...


class EMA:
    """Moving average of every parameter of `module`."""

    def __init__(self, module: Named, decay: float, start_step: int = 0) -> None:
        self.decay, self.start_step = decay, start_step
        self.average = {name: p.detach().float().clone() for name, p in module.named_parameters()}

    @torch.no_grad()
    def update(self, module: Named, step: int) -> None:
        """Take in the parameters after optimizer step `step` (the first one is 1)."""
        for name, parameter in module.named_parameters():
            if step <= self.start_step:
                self.average[name].copy_(parameter)
            else:
                self.average[name].lerp_(parameter.float(), 1.0 - self.decay)

    @torch.no_grad()
    def copy_to(self, module: Named) -> None:
        """Write the average into `module`, in the module's own precision."""
        for name, parameter in module.named_parameters():
            parameter.copy_(self.average[name])

    def state(self) -> dict[str, Tensor]:
        """The tensors to save, fp32."""
        return dict(self.average)

    def load(self, state: dict[str, Tensor]) -> None:
        """Take back what `state` returned; the names must be the same."""
        if state.keys() != self.average.keys():
            odd = sorted(state.keys() ^ self.average.keys())
            raise ValueError(f"The saved average does not fit the network, for example {odd[0]}.")
        for name, value in state.items():
            self.average[name].copy_(value)
