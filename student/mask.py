"""Who may look at whom when a whole clip goes through the student at once. True = may look.

Chunk i sees itself and the chunks a stream would still hold: the first `sink`, the latest `window`.
"""

from __future__ import annotations

import torch
from torch import Tensor


def visible_chunks(chunks: int, sink: int, window: int) -> Tensor:
    """Past chunks seen by each chunk, itself not counted: [chunks, chunks] bool, row looks at column."""
    row, column = torch.arange(chunks)[:, None], torch.arange(chunks)[None]
    return (column < row) & ((column < sink) | (column >= row - window))


def causal_mask(chunks: int, tokens: int, sink: int, window: int, refs: int) -> Tensor:
    """One stream: [N, refs + N] over N = chunks * tokens; references are always seen."""
    own = visible_chunks(chunks, sink, window) | torch.eye(chunks, dtype=torch.bool)
    return _with_refs(_per_token(own, tokens), refs)


def teacher_forcing_mask(chunks: int, tokens: int, sink: int, window: int, refs: int) -> Tensor:
    """Noisy chunk i over [references | given history | noisy chunks]: past of the history, itself of the noisy ones."""
    past = visible_chunks(chunks, sink, window)
    return _with_refs(_per_token(torch.cat([past, torch.eye(chunks, dtype=torch.bool)], 1), tokens), refs)


def _per_token(mask: Tensor, tokens: int) -> Tensor:
    return mask.repeat_interleave(tokens, 0).repeat_interleave(tokens, 1)


def _with_refs(mask: Tensor, refs: int) -> Tensor:
    return torch.cat([torch.ones(len(mask), refs, dtype=torch.bool), mask], 1)
