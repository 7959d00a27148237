"""The causal student for streaming: the numbers of `CausalDiT` without gradient, without doing anything twice.

The pass that writes the keys and values of chunk n rides along with the first step of chunk n + 1: one pass over
[chunk n at the history's noise level | chunk n + 1 at its t], each with its own time, conditions and context. In every
layer chunk n + 1 looks at the keys that chunk n has just made there. Until then the cache is a promise
(student/promise.py). What a chunk looks at is made once per chunk (student/sight.py), what follows from a time once
per stream.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from student.kv_cache import ChunkKV, KVCache
from student.promise import Cache, Promise
from student.sight import Norm, Sight, Sights, blocks_of, norm_of, normed, turned
from teacher.attention import KV, attention
from teacher.blocks import Block, time_features
from teacher.conditions import Conditions

if TYPE_CHECKING:
    from student.causal_dit import CausalDiT, StreamConfig

Time = tuple[float, float | None]  # t and r of a pass
Table = list[list[Tensor]]  # per layer: shift, 1 + scale, gate (attention), shift, 1 + scale, gate (feed-forward)


@dataclass(frozen=True)
class Part:
    """A chunk in a pass: x [B, K, C, H, W] at its time, and what it looks at."""

    x: Tensor
    time: Time
    sight: Sight


Affine = tuple[Tensor, Tensor]  # weight and bias


@dataclass(frozen=True)
class Weights:
    """The weights of a block at hand: asking modules for them takes as long as a small product."""

    q: Affine
    k: Affine
    v: Affine
    o: Affine
    cross_q: Affine
    cross_o: Affine
    audio_o: Affine
    up: Affine
    down: Affine
    norm_qk: Norm  # weight [2, 1, 1, 1, D]
    norm_cross: Norm
    norm: nn.Module

    @classmethod
    def of(cls, block: Block) -> Weights:
        own, cross = block.self_attn, block.cross_attn
        (q, floor), (k, _) = norm_of(own.norm_q), norm_of(own.norm_k)
        return cls(
            q=_affine(own.q), k=_affine(own.k), v=_affine(own.v), o=_affine(own.o),
            cross_q=_affine(cross.q), cross_o=_affine(cross.o), audio_o=_affine(cross.audio_o),
            up=_affine(block.ffn[0]), down=_affine(block.ffn[2]),
            norm_qk=(torch.stack([q, k])[:, None, None, None], floor), norm_cross=norm_of(cross.norm_q),
            norm=block.norm3,
        )  # fmt: skip


def _affine(layer: nn.Module) -> Affine:
    return layer.get_parameter("weight"), layer.get_parameter("bias")


class FastDiT:
    """Stands in for a `CausalDiT` in the streaming loop. One per network and stream: it remembers the last chunk."""

    def __init__(self, model: CausalDiT):
        self.model, self.dit = model, model.dit
        self._sights, self._blocks = Sights(model.dit), [Weights.of(block) for block in blocks_of(model.dit)]
        self._times: dict[Time, tuple[list[Tensor], Table]] = {}
        self._pairs: dict[tuple[Time, Time], Table] = {}
        # Read and written whole: a draft that was thrown away may still run in another thread.
        self._chunk: tuple[Conditions, KVCache, Sight] | None = None

    @property
    def stream(self) -> StreamConfig:
        return self.model.stream

    @torch.no_grad()
    def start(self, cond: Conditions) -> KVCache:
        """As CausalDiT.start; what follows from the text and the steps is made here, before there is audio."""
        self._sights.read(cond)
        for step in self.stream.steps if not self.flow_map else ():
            self._time((step, None))
        return self.model.start(cond)

    @property
    def flow_map(self) -> bool:
        return self.model.flow_map

    @torch.no_grad()
    def velocity(self, xt: Tensor, t: Tensor, cond: Conditions, cache: Cache, r: Tensor | None = None) -> Tensor:
        """v of one chunk, xt [B, K, C, H, W], t [B] and r [B] of one value each. A promise of this network is kept in
        the same pass."""
        time = _single(t, self.model.step_end(t, r))
        if isinstance(cache, Promise) and cache.written is None and cache.network.model is self.model:
            v = self._ride(cache, xt, time, cond)
            if v is not None:
                return v
        kept = cache.kept() if isinstance(cache, Promise) else cache
        return self._pass(None, Part(xt, time, self._sight(xt, cond, kept)))[0]

    def remember(self, x: Tensor, t: Tensor, cond: Conditions, cache: Cache) -> Promise:
        """The cache after the finished chunk `x`, whose keys and values the next chunk's first step will write."""
        # A copy: x itself is what the stream hands out, and whoever gets it may change it.
        return Promise(self, x.clone(), t, cond, cache.kept() if isinstance(cache, Promise) else cache)

    @torch.no_grad()
    def write(self, promise: Promise) -> ChunkKV:
        """Keys and values of a promised chunk, in a pass of their own."""
        return self._pass(self._owed(promise), None)[1]

    def _ride(self, promise: Promise, xt: Tensor, time: Time, cond: Conditions) -> Tensor | None:
        """Keep the promise and make a step of the next chunk in one pass. None, with the promise kept, where the step
        saw something else than is now in the cache: one that makes new keys out of what it is given."""
        gap = self._gap(xt, promise.before)
        after = promise.before.push([(gap, gap)] * len(self._blocks))
        context = after.context()
        sight = self._sights.make(cond, context, after.positions(), gap)
        v, written = self._pass(self._owed(promise), Part(xt, time, sight))
        promise.written = promise.before.push(written)
        if not _same(context, promise.written.context(), gap, written):
            return None
        if sight.kept:
            self._chunk = (cond, promise.written, sight)
        return v

    # ---- the pass ---------------------------------------------------------------------------------------------

    def _pass(self, owed: Part | None, step: Part | None) -> tuple[Tensor, ChunkKV]:
        """v like x of the part that makes a step, and per layer (k before RoPE, v) [B, K n, D] of the one that is owed.
        Nothing more is asked of that one: it ends with the keys and values of the last layer."""
        out, written = self._run(owed, step)
        if step is None:
            return out, written
        patch, (rows, columns) = self.dit.config.patch, self.dit.token_grid(step.x)
        v = rearrange(out, "b t (h w) (p q c) -> b t c (h p) (w q)", h=rows, w=columns, p=patch, q=patch)
        return v.to(step.x.dtype), written

    @torch.inference_mode()
    def _run(self, owed: Part | None, step: Part | None) -> tuple[Tensor, ChunkKV]:
        """The passes proper; tokens [B, F, n, D] of the F frames of all parts, N = F n. -> the head's [B, K, n, P]."""
        dit, parts = self.dit, [part for part in (owed, step) if part is not None]
        patch, heads, frames = dit.config.patch, dit.config.heads, [part.x.shape[1] for part in parts]
        patches = "b t c (h p) (w q) -> b t (h w) (p q c)"
        tokens = rearrange(_joined([part.x for part in parts]), patches, p=patch, q=patch)
        tokens = dit.patch_embedding(tokens.to(dit.patch_embedding.weight.dtype))
        tokens = tokens.to(torch.promote_types(tokens.dtype, torch.float32))
        head, table = self._table(parts)
        sights, turn = [part.sight.layers() for part in parts], _joined([part.sight.own_turn for part in parts], 0)
        written: ChunkKV = []
        for block, times in zip(self._blocks, table, strict=True):
            shift1, scale1, gate1, shift2, scale2, gate2 = times
            layers = [next(layers) for layers in sights]
            y = _modulated(tokens, shift1, scale1)
            qk = normed(torch.stack([F.linear(y, *block.q), F.linear(y, *block.k)]), *block.norm_qk)  # [2, B, F, n, D]
            v = F.linear(y, *block.v)
            if owed is not None:
                pair = qk[1, :, : frames[0]].flatten(1, 2).clone(), v[:, : frames[0]].flatten(1, 2).clone()
                written.append(pair)
                if step is not None:
                    _fill(layers[1].owed, pair, step.sight.owed_turn)
                if len(written) == len(table):  # nothing more is owed
                    if step is None:
                        break
                    tokens, qk, v = tokens[:, frames[0] :], qk[:, :, frames[0] :], v[:, frames[0] :]
                    turn, frames, layers = step.sight.own_turn, frames[1:], layers[1:]
            q, k = turned(qk.flatten(2, 3).unflatten(-1, (heads, -1)), turn).unbind()  # [B, N, heads, d]
            v = v.flatten(1, 2).unflatten(-1, (heads, -1))
            seen, sizes = [], [frame * tokens.shape[2] for frame in frames]
            for layer, *mine in zip(layers, q.split(sizes, 1), k.split(sizes, 1), v.split(sizes, 1), strict=True):
                layer.own[0].copy_(mine[1])
                layer.own[1].copy_(mine[2])
                seen.append(attention(mine[0], layer.keys, layer.values, layer.mask))
            y = F.linear(_joined(seen).flatten(2).unflatten(1, (sum(frames), -1)), *block.o)
            tokens = torch.addcmul(tokens, y.to(tokens.dtype), gate1)

            q = normed(F.linear(block.norm(tokens), *block.cross_q), *block.norm_cross).unflatten(-1, (heads, -1))
            read, heard = [], []
            for layer, mine in zip(layers, q.split(frames, 1), strict=True):
                read.append(attention(mine.flatten(1, 2), *layer.text).flatten(2).unflatten(1, (mine.shape[1], -1)))
                heard.append(attention(mine.flatten(0, 1), *layer.audio).flatten(2).unflatten(0, mine.shape[:2]))
            told = F.linear(_joined(read), *block.cross_o) + F.linear(_joined(heard), *block.audio_o)
            tokens = tokens + told
            y = F.gelu(F.linear(_modulated(tokens, shift2, scale2), *block.up), approximate="tanh")
            tokens = torch.addcmul(tokens, F.linear(y, *block.down).to(tokens.dtype), gate2)
        else:
            tokens = dit.head.head(_modulated(tokens, *head))
        return tokens, written

    # ---- once per stream --------------------------------------------------------------------------------------

    def _table(self, parts: list[Part]) -> tuple[list[Tensor], Table]:
        """What the head and the blocks make of the times of a pass: [1, 1, 1, D] each, or [1, F, 1, D] for two parts;
        of the last layer only the step's, from where the owed chunk has ended."""
        known = [self._time(part.time) for part in parts]
        if len(parts) == 1:
            return known[0]
        times = parts[0].time, parts[1].time
        if times not in self._pairs:
            frames = [(1, part.x.shape[1], 1, 1) for part in parts]
            table = [
                [
                    torch.cat([x.repeat(n) for x, n in zip(pair, frames, strict=True)], 1)
                    for pair in zip(*layer, strict=True)
                ]
                for layer in zip(known[0][1], known[1][1], strict=True)
            ]
            table[-1][2:] = known[1][1][-1][2:]
            self._pairs[times] = table
        return known[1][0], self._pairs[times]

    def _time(self, time: Time) -> tuple[list[Tensor], Table]:
        """Of one time: shift and 1 + scale of the head, and the table."""
        if time not in self._times:
            dit, (t, r) = self.dit, time
            weight = dit.patch_embedding.weight
            dtype = torch.promote_types(weight.dtype, torch.float32)
            at = torch.tensor([[t]], dtype=torch.float64, device=weight.device)
            embedded = dit.time_embedding(time_features(at).to(dtype))  # [1, 1, D]
            if r is not None:
                embedded = embedded + dit.interval_embedding(time_features(at - r).to(dtype))
            shared = dit.time_projection(embedded).unflatten(-1, (6, -1))  # [1, 1, 6, D]
            table = [_modulation(block.modulation + shared) for block in blocks_of(dit)]
            self._times[time] = (_modulation(dit.head.modulation + embedded[:, :, None]), table)
        return self._times[time]

    # ---- once per chunk ---------------------------------------------------------------------------------------

    def _owed(self, promise: Promise) -> Part:
        # Two drafts may keep copies of a promise at the same time, in one sight: they write the same bits there.
        sight = self._sight(promise.x, promise.cond, promise.before)
        return Part(promise.x, _single(promise.t, None), sight)

    def _sight(self, x: Tensor, cond: Conditions, cache: KVCache) -> Sight:
        """What a chunk looks at, kept until another comes."""
        known = self._chunk
        if known is None or known[0] is not cond or known[1] is not cache:
            sight = self._sights.make(cond, cache.context(), cache.positions(), self._gap(x, cache))
            self._chunk = known = (cond, cache, sight)
        return known[2]

    def _gap(self, x: Tensor, cache: KVCache) -> Tensor:
        """Stands for keys and values that are still to come, [B, N, D]."""
        zero = self.dit.patch_embedding.weight.new_zeros(1, 1, 1)
        return zero.expand(len(x), len(cache.positions()), self.dit.config.dim)


def _single(t: Tensor, r: Tensor | None) -> Time:
    return float(t[0]), None if r is None else float(r[0])


def _same(shown: list[list[KV]], kept: list[list[KV]], gap: Tensor, written: ChunkKV) -> bool:
    """Is what was shown, with `written` in the place of the gap, what the cache now has?"""
    for ours, theirs, pair in zip(shown, kept, written, strict=True):
        if len(ours) != len(theirs):
            return False
        for mine, other in zip(ours, theirs, strict=True):
            k, v = pair if mine.k is gap else (mine.k, mine.v)
            if not (k is other.k and v is other.v) and not (torch.equal(k, other.k) and torch.equal(v, other.v)):
                return False
    return True


def _fill(place: tuple[Tensor, Tensor] | None, pair: tuple[Tensor, Tensor], turn: Tensor | None) -> None:
    """Show the keys and values just made, [B, N, D], to the next chunk, which may not see that far."""
    if place is not None and turn is not None:
        k, v = (x.unflatten(-1, place[0].shape[2:]) for x in pair)
        place[0].copy_(turned(k, turn))
        place[1].copy_(v)


def _joined(parts: list[Tensor], dim: int = 1) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)


def _modulation(parts: Tensor) -> list[Tensor]:
    """[1, 1, P, D] -> P tensors [1, 1, 1, D]: shift, scale, gate, shift, ...; a scale has its 1 added."""
    return [part[:, :, None] + (index % 3 == 1) for index, part in enumerate(parts.unbind(2))]


def _modulated(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """AdaLN; `scale` has its 1 added already."""
    return torch.addcmul(shift, F.layer_norm(x, x.shape[-1:], eps=1e-6), scale)
