"""The causal student for streaming: the numbers of `CausalDiT` without gradient, without doing anything twice.

The evaluations of one chunk (its steps, and the one that writes its keys and values) have the conditions and the
context in common. What follows from these alone is made once per chunk: keys of the context rotated to their places,
keys and values of the audio. What follows from a text alone is made once per text, from a time once per stream.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from student.kv_cache import KVCache
from teacher.attention import KV, attention
from teacher.blocks import Block, time_features
from teacher.conditions import Conditions
from teacher.rope import rope_angles

if TYPE_CHECKING:
    from student.causal_dit import CausalDiT, StreamConfig

KEPT_BYTES = 2**30  # rotated copies of a context up to this size are kept; larger ones are made again layer by layer
Table = list[list[Tensor]]  # per layer: shift, 1 + scale, gate (attention), shift, 1 + scale, gate (feed-forward)


@dataclass(frozen=True)
class Layer:
    """What one block looks at besides the chunk itself; k rotated, all [B, M, heads, d], mask [B, 1, 1, M + N] bool."""

    k: Tensor
    v: Tensor
    mask: Tensor | None
    text: tuple[Tensor, Tensor]
    audio: tuple[Tensor, Tensor]  # [B * K, ...]: every latent frame has its own window


class FastDiT:
    """Stands in for a `CausalDiT` in the streaming loop. One per network and stream: it remembers the last chunk."""

    def __init__(self, model: CausalDiT):
        self.model, self.dit = model, model.dit
        self.blocks = [block for block in model.dit.blocks if isinstance(block, Block)]
        self._head = model.dit.config.dim // model.dit.config.heads
        self._times: dict[tuple[float, float | None], tuple[Tensor, Table]] = {}
        self._read: tuple[Tensor, Tensor, list[tuple[Tensor, Tensor]]] | None = None
        self._chunk: tuple[Conditions, KVCache, list[Layer] | None, Tensor] | None = None

    @property
    def stream(self) -> StreamConfig:
        return self.model.stream

    def start(self, cond: Conditions) -> KVCache:
        return self.model.start(cond)

    @property
    def flow_map(self) -> bool:
        return self.model.flow_map

    def velocity(self, xt: Tensor, t: Tensor, cond: Conditions, cache: KVCache, r: Tensor | None = None) -> Tensor:
        """v of one chunk, xt [B, K, C, H, W], t [B] and r [B] of one value each."""
        return self._run(xt, t, cond, cache, self.model.step_end(t, r))[0]

    def remember(self, x: Tensor, t: Tensor, cond: Conditions, cache: KVCache) -> KVCache:
        """The cache after the finished chunk `x`."""
        return cache.push(self._run(x, t, cond, cache)[1])

    @torch.no_grad()
    def _run(
        self, x: Tensor, t: Tensor, cond: Conditions, cache: KVCache, r: Tensor | None = None
    ) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        patch, frames, (rows, columns) = self.dit.config.patch, x.shape[1], self.dit.token_grid(x)
        layers, turn = self._prepared(cond, cache)
        time, table = self._time(t, r, x)
        tokens = rearrange(x, "b t c (h p) (w q) -> b t (h w) (p q c)", p=patch, q=patch)
        out, written = self._blocks(tokens, layers, turn, time, table)
        v = rearrange(out, "b (t h w) (p q c) -> b t c (h p) (w q)", t=frames, h=rows, w=columns, p=patch, q=patch)
        return v.to(x.dtype), written

    @torch.inference_mode()
    def _blocks(
        self, tokens: Tensor, layers: Iterable[Layer], turn: Tensor, time: Tensor, table: Table
    ) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        """Patches [B, K, n, P] -> the head's [B, K n, P] and per layer (k before RoPE, v) [B, K n, D]."""
        dit, heads, frames = self.dit, self.dit.config.heads, tokens.shape[1]
        tokens = dit.patch_embedding(tokens.to(dit.patch_embedding.weight.dtype))  # [B, K, n, D]
        tokens = tokens.to(torch.promote_types(tokens.dtype, torch.float32))
        written = []
        for block, layer, times in zip(self.blocks, layers, table, strict=True):
            shift1, scale1, gate1, shift2, scale2, gate2 = times
            own, cross = block.self_attn, block.cross_attn
            y = _modulated(tokens, shift1, scale1)
            k, v = own.norm_k(own.k(y)).flatten(1, 2), own.v(y).flatten(1, 2)  # [B, N, D]
            written.append((k, v))
            q = _turned(own.norm_q(own.q(y)).flatten(1, 2).unflatten(-1, (heads, -1)), turn)
            keys = torch.cat([layer.k.to(k.dtype), _turned(k.unflatten(-1, (heads, -1)), turn)], 1)
            values = torch.cat([layer.v.to(v.dtype), v.unflatten(-1, (heads, -1))], 1)
            seen = attention(q, keys, values, layer.mask).flatten(2).unflatten(1, (frames, -1))
            tokens = torch.addcmul(tokens, own.o(seen).to(tokens.dtype), gate1)

            q = cross.norm_q(cross.q(block.norm3(tokens))).unflatten(-1, (heads, -1))  # [B, K, n, heads, d]
            read = attention(q.flatten(1, 2), *layer.text).flatten(2).unflatten(1, (frames, -1))
            heard = attention(q.flatten(0, 1), *layer.audio).flatten(2).unflatten(0, (-1, frames))
            tokens = tokens + (cross.o(read) + cross.audio_o(heard))
            tokens = torch.addcmul(tokens, block.ffn(_modulated(tokens, shift2, scale2)).to(tokens.dtype), gate2)
        return dit.head(tokens.flatten(1, 2), time), written

    # ---- once per stream --------------------------------------------------------------------------------------

    def _time(self, t: Tensor, r: Tensor | None, x: Tensor) -> tuple[Tensor, Table]:
        """Time embedding [1, K, D] and what the blocks make of it, each [1, 1, 1, D], for times that all share."""
        key = (float(t[0]), None if r is None else float(r[0]))
        if key not in self._times:
            dit = self.dit
            dtype = torch.promote_types(dit.patch_embedding.weight.dtype, torch.float32)
            time = dit.time_embedding(time_features(t[:1, None]).to(dtype))  # [1, 1, D]
            if r is not None:
                time = time + dit.interval_embedding(time_features((t - r)[:1, None]).to(dtype))
            shared = dit.time_projection(time).unflatten(-1, (6, -1))  # [1, 1, 6, D]
            table = []
            for block in self.blocks:
                parts = [part[:, :, None] for part in (block.modulation + shared).unbind(2)]
                table.append([part + 1 if index % 3 == 1 else part for index, part in enumerate(parts)])
            self._times[key] = (time.expand(-1, x.shape[1], -1), table)
        return self._times[key]

    # ---- once per chunk ---------------------------------------------------------------------------------------

    def _prepared(self, cond: Conditions, cache: KVCache) -> tuple[Iterable[Layer], Tensor]:
        """The layers of a chunk, kept until another comes; and how its own tokens are turned."""
        known = self._chunk  # read and written whole: a draft that was thrown away may still run in another thread
        if known is None or known[0] is not cond or known[1] is not cache:
            turn = _turn(cache.positions(), self._head, self.dit.patch_embedding.weight.dtype)
            size = sum(kv.k.numel() * kv.k.element_size() for kv in cache.context()[0]) * 2 * self.dit.config.depth
            known = (cond, cache, list(self._layers(cond, cache)) if size <= KEPT_BYTES else None, turn)
            self._chunk = known
        layers, turn = known[2:]
        return (layers if layers is not None else self._layers(cond, cache)), turn

    def _layers(self, cond: Conditions, cache: KVCache) -> Iterator[Layer]:
        context = cache.context()
        places, dtype = torch.cat([kv.positions for kv in context[0]]), self.dit.patch_embedding.weight.dtype
        turn = _turn(places, self._head, dtype)
        heads, told = self.dit.config.heads, self.dit._told(cond)
        known = self._read
        if known is None or known[0] is not cond.text or known[1] is not cond.text_mask:
            known = (cond.text, cond.text_mask, [block.cross_attn.read(told[0][0]) for block in self.blocks])
            self._read = known
        mask = _mask(context[0], cache)  # the same in every layer
        for index, (block, seen) in enumerate(zip(self.blocks, context, strict=True)):
            k = torch.cat([kv.k for kv in seen], 1).unflatten(-1, (heads, -1))
            v = torch.cat([kv.v for kv in seen], 1).unflatten(-1, (heads, -1))
            heard = block.cross_attn.hear(*told[index % 2][1:])
            yield Layer(_turned(k, turn), v, mask, known[2][index], heard)


def _mask(seen: list[KV], cache: KVCache) -> Tensor | None:
    """[B, 1, 1, M + N] bool: which keys are there; None where all are."""
    if all(kv.mask is None or bool(kv.mask.all()) for kv in seen):
        return None
    there = [torch.ones(kv.k.shape[:2], dtype=torch.bool) if kv.mask is None else kv.mask.cpu() for kv in seen]
    own = torch.ones(len(there[0]), math.prod(cache.grid), dtype=torch.bool)
    return torch.cat([*there, own], 1)[:, None, None].to(seen[0].k.device)


def _modulated(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """AdaLN; `scale` has its 1 added already."""
    return torch.addcmul(shift, F.layer_norm(x, x.shape[-1:], eps=1e-6), scale)


def _turn(positions: Tensor, head_dim: int, dtype: torch.dtype) -> Tensor:
    """RoPE as complex factors, one per pair of channels: [N, 1, d / 2]."""
    angles = rope_angles(positions, head_dim)
    turn = torch.polar(torch.ones_like(angles), angles)[:, None]
    return turn if dtype == torch.float64 else turn.to(torch.complex64)


def _turned(x: Tensor, turn: Tensor) -> Tensor:
    """`teacher.rope.rotate` with what `_turn` made: x [B, N, heads, d]."""
    pairs = x.to(turn.real.dtype).unflatten(-1, (-1, 2))
    return torch.view_as_real(torch.view_as_complex(pairs) * turn).flatten(-2).to(x.dtype)
