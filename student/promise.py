"""A cache whose last chunk is promised: its keys and values are written by the first step of the chunk after it.

Writing and stepping are passes of the same network over the same weights; in one pass (`student/fast.py`) they cost
less than in two. Whoever asks a promise for its contents before that gets them written at once.

the finished chunk x [B, K, C, H, W] at its time t [B], its conditions, the cache before it  ->  the cache after it
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from torch import Tensor

from student.kv_cache import ChunkKV, KVCache
from teacher.attention import KV
from teacher.conditions import Conditions

if TYPE_CHECKING:
    from student.fast import FastDiT


@dataclass(eq=False)
class Promise:
    """Stands for `before.push(keys and values of x)`. `written` is filled in once."""

    network: FastDiT
    x: Tensor
    t: Tensor
    cond: Conditions
    before: KVCache
    written: KVCache | None = field(default=None, init=False)

    def kept(self) -> KVCache:
        """The cache itself."""
        if self.written is None:
            self.written = self.before.push(self.network.write(self))
        return self.written

    def push(self, chunk: ChunkKV) -> KVCache:
        return self.kept().push(chunk)

    def at(self, step: int) -> Promise:
        """The same for every step: a network that promises has one history for all."""
        return self

    def context(self) -> list[list[KV]]:
        return self.kept().context()

    def positions(self) -> Tensor:
        return self.kept().positions()

    @property
    def visible(self) -> tuple[ChunkKV, ...]:
        return self.kept().visible


Cache = KVCache | Promise


def anew(cache: Cache) -> Cache:
    """The same cache, its promise not yet kept: what is then added to it is thrown away with the chunk that did."""
    return replace(cache) if isinstance(cache, Promise) else cache
