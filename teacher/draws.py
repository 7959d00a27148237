"""Random numbers for a batch that several processes share: each draws the whole and keeps its own rows.

So N processes with a part of a batch each see exactly what one process with the whole batch sees, whatever N is. The
price is N times the draws, which cost little beside a network.

generator.share = (rank, processes); a plain torch.Generator, or share (0, 1), means that all rows are one's own.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


class RowGenerator(torch.Generator):
    """A generator that every process seeds alike, of whose rows this process takes its own."""

    share: tuple[int, int] = (0, 1)


def draw_rows(sample: Callable[[int], Tensor], count: int, generator: torch.Generator, dim: int = 0) -> Tensor:
    """`sample(rows of the whole batch)`, cut along `dim` to the `count` rows of this process."""
    rank, processes = getattr(generator, "share", (0, 1))
    return sample(count * processes).narrow(dim, rank * count, count)


def gaussian(like: Tensor, generator: torch.Generator) -> Tensor:
    """Fresh noise of the shape of `like` [B, ...], drawn on the generator's device so that seeds mean the same
    everywhere."""
    shape, device = like.shape[1:], generator.device
    noise = draw_rows(lambda n: torch.randn((n, *shape), generator=generator, device=device), len(like), generator)
    return noise.to(like.device, like.dtype)
