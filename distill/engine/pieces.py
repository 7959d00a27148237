"""What of a network this process holds: for every parameter one contiguous run of its flattened elements.

DDP holds all of each, FSDP2 some rows, ZeRO-3 an equal slice, ZeRO-1 and 2 whatever falls into their part of one long
buffer. Said in this one way, the moving average, the optimizer's moments and checkpoints need not know the engine.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Piece:
    """Elements [start, start + len(tensor)) of the flattened parameter `name` of `shape`; `tensor` [n] is a view of
    the fp32 master, or of a moment of it."""

    name: str
    shape: tuple[int, ...]
    start: int
    tensor: Tensor


class Pieces(list[Piece]):
    """All pieces of one network; stands in for a module where only `named_parameters` is asked for."""

    def named_parameters(self) -> Iterator[tuple[str, Tensor]]:
        return ((piece.name, piece.tensor) for piece in self)
