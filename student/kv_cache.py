"""The streaming memory of the causal student: references for ever, the first chunks (sink), the latest (window).

Per chunk and layer the cache holds the keys *before* RoPE and the values; positions are given anew at every call,
relative to what is visible, so chunk 300 sees the same distances as chunk 3. A cache is immutable: `push` returns a new
one that shares the tensors, eviction drops a reference. Nothing is ever written in place, hence recomputation and
gradients are safe.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

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

    def push(self, chunk: ChunkKV) -> KVCache:
        """The cache after one more chunk; the oldest of a full window is forgotten."""
        if len(self.sink) < self.sink_chunks:
            return replace(self, sink=(*self.sink, chunk), seen=self.seen + 1)
        window = (*self.window, chunk)[-self.window_chunks :] if self.window_chunks else ()
        return replace(self, window=window, seen=self.seen + 1)

    @property
    def visible(self) -> tuple[ChunkKV, ...]:
        return self.sink + self.window

    @property
    def start(self) -> int:
        """Time, in latent frames, at which the current chunk stands."""
        return len(self.visible) * self.grid[0]

    def positions(self) -> Tensor:
        """Token positions of the current chunk, [K*n, 3]."""
        return moved(grid_positions(*self.grid), self.start).to(self.refs[0][0].positions.device)

    def context(self) -> list[list[KV]]:
        """Per layer: references, then the visible chunks at their places in the window."""
        base = grid_positions(*self.grid).to(self.refs[0][0].positions.device)
        places = [moved(base, index * self.grid[0]) for index in range(len(self.visible))]
        return [
            [*refs, *(KV(*chunk[layer], place) for chunk, place in zip(self.visible, places, strict=True))]
            for layer, refs in enumerate(self.refs)
        ]
