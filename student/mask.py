"""Who may look at whom when a whole clip goes through the student at once. True = may look.

Chunk i sees itself and the chunks a stream would still hold: the first `sink`, the latest `window`. Masks are stated
chunk by chunk (`Blocks`): attention then runs per chunk over what that chunk sees, which every back end can do.
"""

from __future__ import annotations

import torch
from torch import Tensor

from teacher.attention import Blocks


def visible_chunks(chunks: int, sink: int, window: int) -> Tensor:
    """Past chunks seen by each chunk, itself not counted: [chunks, chunks] bool, row looks at column."""
    row, column = torch.arange(chunks)[:, None], torch.arange(chunks)[None]
    return (column < row) & ((column < sink) | (column >= row - window))


def causal_mask(chunks: int, tokens: int, sink: int, window: int, refs: int) -> Blocks:
    """One stream: N queries over refs + N keys, N = chunks * tokens; references are always seen."""
    own = visible_chunks(chunks, sink, window) | torch.eye(chunks, dtype=torch.bool)
    return Blocks(own, tokens, refs)


def teacher_forcing_mask(chunks: int, tokens: int, sink: int, window: int, refs: int) -> Blocks:
    """Noisy chunk i over [references | given history | noisy chunks]: past of the history, itself of the noisy ones."""
    past = visible_chunks(chunks, sink, window)
    return Blocks(torch.cat([past, torch.eye(chunks, dtype=torch.bool)], 1), tokens, refs)
