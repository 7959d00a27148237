"""The streaming memory of the causal student: references for ever, the first chunks (sink), the latest (window).

Per chunk and layer the cache holds the keys *before* RoPE and the values; positions are given anew at every call,
relative to what is visible, so chunk 300 sees the same distances as chunk 3. A cache is immutable: `push` returns a new
one that shares the tensors, eviction drops a reference. Nothing is ever written in place, hence recomputation and
gradients are safe.

Sinks are the first chunks as they were, or one moving average of what left the window, begun with the first chunk
(Reward Forcing): s <- decay s + (1 - decay) evicted, keys before RoPE. Without any (`sink_chunks` 0) the references are
all that is permanent. `absolute` positions, from the beginning of the stream, are there to be compared with. Where the
history is noised to the time of the step that looks at it, every step has a cache of its own (`at`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from teacher.attention import KV
from teacher.rope import grid_positions, moved

ChunkKV = list[tuple[Tensor, Tensor]]  # per layer (k before RoPE, v), each [B, K*n, D]


@dataclass(frozen=True)
class KVCache:
    """What a chunk may look at besides itself. `grid` = (latent frames per chunk, token rows, token columns)."""

    refs: list[list[KV]]
    grid: tuple[int, int, int]
    sink_chunks: int
    window_chunks: int
    sink: tuple[ChunkKV, ...] = ()
    window: tuple[ChunkKV, ...] = ()
    seen: int = 0  # chunks pushed so far
    decay: float | None = None  # of the sink's moving average; None = the first chunks stay as they are
    absolute: bool = False
    later: tuple[KVCache, ...] = ()  # of the second step, the third, ..., where these see another history

    def push(self, chunk: ChunkKV) -> KVCache:
        """The cache after one more chunk; the oldest of a full window is forgotten."""
        if len(self.sink) < self.sink_chunks:
            return replace(self, sink=(*self.sink, chunk), seen=self.seen + 1)
        window = (*self.window, chunk)[-self.window_chunks :] if self.window_chunks else ()
        sink = self.sink
        if self.decay is not None:
            for gone in (*self.window, chunk)[: len(self.window) + 1 - len(window)]:
                sink = (_average(sink[0], gone, self.decay),)
        return replace(self, sink=sink, window=window, seen=self.seen + 1)

    def at(self, step: int) -> KVCache:
        """What the step of this number looks at."""
        return self.later[step - 1] if self.later and step else self

    @property
    def visible(self) -> tuple[ChunkKV, ...]:
        return self.sink + self.window

    @property
    def start(self) -> int:
        """Time, in latent frames, at which the current chunk stands."""
        return (self.seen if self.absolute else len(self.visible)) * self.grid[0]

    def positions(self) -> Tensor:
        """Token positions of the current chunk, [K*n, 3]."""
        return moved(grid_positions(*self.grid), self.start).to(self.refs[0][0].positions.device)

    def context(self) -> list[list[KV]]:
        """Per layer: references, then the visible chunks at their places in the window."""
        base = grid_positions(*self.grid).to(self.refs[0][0].positions.device)
        places = [moved(base, index * self.grid[0]) for index in self._places()]
        return [
            [*refs, *(KV(*chunk[layer], place) for chunk, place in zip(self.visible, places, strict=True))]
            for layer, refs in enumerate(self.refs)
        ]

    def _places(self) -> list[int]:
        """Where the visible chunks stand, counted in chunks."""
        first = self.seen - len(self.window) if self.absolute else len(self.sink)
        return [*range(len(self.sink)), *range(first, first + len(self.window))]


def _average(sink: ChunkKV, gone: ChunkKV, decay: float) -> ChunkKV:
    """In fp32 at least: in bf16 a hundredth of a difference is rounded away."""
    return [(_mix(a[0], b[0], decay), _mix(a[1], b[1], decay)) for a, b in zip(sink, gone, strict=True)]


def _mix(kept: Tensor, new: Tensor, decay: float) -> Tensor:
    dtype = torch.promote_types(kept.dtype, torch.float32)
    return decay * kept.to(dtype) + (1 - decay) * new.to(dtype)
