"""What the tokens of one chunk look at, made once and used by all passes of that chunk.

Keys of references and past are rotated to their places for all layers at once; what follows from a text is made once
per text, from where audio stands in its window once per stream. Keys and values have room at their end for the
chunk's own, which every pass writes there: a scratch of this chunk, no part of any cache.

conditions of the chunk, what its cache shows  ->  per layer keys, values [B, M + N, heads, d], text, audio
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from teacher.attention import KV, RMSNorm
from teacher.blocks import Block
from teacher.conditions import PAST, Conditions
from teacher.dit import DiT
from teacher.rope import rope_angles

KEPT_BYTES = 2**30  # rotated copies of a context up to this size are kept; larger ones are made again layer by layer
Pair = tuple[Tensor, Tensor]  # keys and values
Norm = tuple[Tensor, Tensor]  # of an RMSNorm of width D: weight * sqrt(D), sqrt(D * eps)


@dataclass(frozen=True)
class Layer:
    """What one block looks at; keys are rotated. `own` and `owed` are the places [B, N, heads, d] in there of the chunk
    itself and of the chunk before it, where that is in sight and still to be written."""

    keys: Tensor
    values: Tensor
    own: Pair
    owed: Pair | None
    mask: Tensor | None  # [B, 1, 1, M + N] bool: which keys are there; None where all are
    text: Pair  # [B, L, heads, d]
    audio: Pair  # [B * K, ...]: every latent frame has its own window


@dataclass(frozen=True)
class Sight:
    """`layers()` gives them in order; turns are RoPE's factors of own and owed tokens, [N, 1, d / 2]."""

    layers: Callable[[], Iterator[Layer]]
    kept: bool  # the same ones every time, or made anew
    own_turn: Tensor
    owed_turn: Tensor | None


class Sights:
    """Makes them, for one network and stream."""

    def __init__(self, dit: DiT):
        self.dit, self.heads, self.blocks = dit, dit.config.heads, blocks_of(dit)
        self._norms = [norm_of(block.cross_attn.norm_k) for block in self.blocks]
        # Read and written whole: a draft that was thrown away may still run in another thread.
        self._text: tuple[Tensor, Tensor, list[Pair]] | None = None
        self._places: tuple[Tensor, Tensor] | None = None
        self._offsets: list[Pair] | None = None

    def make(self, cond: Conditions, context: list[list[KV]], positions: Tensor, gap: Tensor) -> Sight:
        """Of a chunk with `cond` whose tokens stand at `positions` [N, 3] and look at the per-layer `context`. `gap`
        [B, N, D] stands for keys and values that are still to come: the chunk's own, and in the context those of the
        chunk before."""
        turn = self._turn(torch.cat([*(kv.positions for kv in context[0]), positions]), gap.dtype)
        owed = _place(context[0], gap)
        made = partial(self._layers, cond, context, gap, turn, owed)
        size = 2 * len(context) * len(gap) * len(turn) * gap.shape[2] * gap.element_size()
        if kept := size <= KEPT_BYTES:
            layers: Callable[[], Iterator[Layer]] = partial(iter, list(made(len(context))))
        else:
            layers = partial(made, 1)
        return Sight(layers, kept, turn[-gap.shape[1] :], None if owed is None else turn[owed])

    def _layers(
        self, cond: Conditions, context: list[list[KV]], gap: Tensor, turn: Tensor, owed: slice | None, together: int
    ) -> Iterator[Layer]:
        """`together`: layers whose keys are turned in one operation."""
        own, device = slice(len(turn) - gap.shape[1], None), gap.device.type
        # The precision in which the blocks make theirs.
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else gap.dtype
        mask, text, heard = _mask(context[0], gap), self.read(cond), self._heard(cond)
        for first in range(0, len(context), together):
            some = context[first : first + together]
            k, v = (
                torch.cat(parts, 1).to(dtype).unflatten(1, (-1, len(turn))).unflatten(-1, (self.heads, -1))
                for parts in (
                    [x for seen in some for x in (*(kv.k for kv in seen), gap)],
                    [x for seen in some for x in (*(kv.v for kv in seen), gap)],
                )
            )  # [B, layers, M + N, heads, d]
            for index, keys, values in zip(itertools.count(first), turned(k, turn).unbind(1), v.unbind(1)):
                before = None if owed is None else (keys[:, owed], values[:, owed])
                yield Layer(keys, values, (keys[:, own], values[:, own]), before, mask, text[index], next(heard))

    def _turn(self, places: Tensor, dtype: torch.dtype) -> Tensor:
        """RoPE as complex factors, one per pair of channels, [M + N, 1, d / 2]; a full window keeps its own."""
        known = self._places
        if known is None or not torch.equal(known[0], places):
            angles = rope_angles(places, self.dit.config.dim // self.heads)
            turn = torch.polar(torch.ones_like(angles), angles)[:, None]
            self._places = known = (places, turn if dtype == torch.float64 else turn.to(torch.complex64))
        return known[1]

    def read(self, cond: Conditions) -> list[Pair]:
        """Keys and values of the text for every block."""
        known = self._text
        if known is None or known[0] is not cond.text or known[1] is not cond.text_mask:
            given = (cond.text * cond.text_mask[..., None]).to(self.dit.patch_embedding.weight.dtype)
            text = self.dit.text_embedding(given)
            self._text = known = (cond.text, cond.text_mask, [block.cross_attn.read(text) for block in self.blocks])
        return known[2]

    def _heard(self, cond: Conditions) -> Iterator[Pair]:
        """Keys and values of every frame's window of audio [B K, W G, heads, d] for block after block."""
        encoders = self.dit.speak_embedding, self.dit.listen_embedding
        if self._offsets is None:
            layers = [(block.cross_attn, encoders[index % 2].offsets) for index, block in enumerate(self.blocks)]
            self._offsets = [(a.audio_k.product(offsets), a.audio_v.product(offsets)) for a, offsets in layers]
        dtype = self.dit.patch_embedding.weight.dtype
        tokens = [e(x.to(dtype), PAST) for e, x in zip(encoders, (cond.speak, cond.listen), strict=True)]
        for index, (block, norm, offsets) in enumerate(zip(self.blocks, self._norms, self._offsets, strict=True)):
            cross, audio, window = block.cross_attn, tokens[index % 2], encoders[index % 2].window
            k, v = (
                layer(audio).unfold(1, window, 1).movedim(-1, 2) + offset  # [B, K, W, G, D]
                for layer, offset in zip((cross.audio_k, cross.audio_v), offsets, strict=True)
            )
            k, v = (x.flatten(0, 1).flatten(1, 2).unflatten(-1, (self.heads, -1)) for x in (normed(k, *norm), v))
            yield k, v


def blocks_of(dit: DiT) -> list[Block]:
    """Its blocks, by their type."""
    return [block for block in dit.blocks if isinstance(block, Block)]


def norm_of(norm: RMSNorm) -> Norm:
    """What `normed` needs, fp32 or better."""
    weight = norm.weight.detach().to(torch.promote_types(norm.weight.dtype, torch.float32))
    width = len(weight)
    return weight * math.sqrt(width), weight.new_tensor(math.sqrt(width * norm.eps))


def normed(x: Tensor, weight: Tensor, floor: Tensor) -> Tensor:
    """`RMSNorm` in four operations, of which F.rms_norm makes ten on a CPU: with |x| the length of a token of width D,
    x / sqrt(|x|^2 / D + eps) = sqrt(D) x / hypot(|x|, sqrt(D eps))."""
    values = x.to(weight.dtype)
    length = torch.linalg.vector_norm(values, dim=-1, keepdim=True)
    return (values / torch.hypot(length, floor)).mul_(weight).to(x.dtype)


def _place(seen: list[KV], gap: Tensor) -> slice | None:
    """Where among the keys `gap` stands."""
    at = 0
    for kv in seen:
        if kv.k is gap:
            return slice(at, at + gap.shape[1])
        at += kv.k.shape[1]
    return None


def _mask(seen: list[KV], gap: Tensor) -> Tensor | None:
    """[B, 1, 1, M + N] bool: which keys are there; None where all are."""
    if all(kv.mask is None or bool(kv.mask.all()) for kv in seen):
        return None
    there = [kv.k.new_ones(kv.k.shape[:2], dtype=torch.bool) if kv.mask is None else kv.mask for kv in seen]
    return torch.cat([*there, gap.new_ones(gap.shape[:2], dtype=torch.bool)], 1)[:, None, None]


def turned(x: Tensor, turn: Tensor) -> Tensor:
    """`teacher.rope.rotate` by complex factors: x [..., N, heads, d], turn [N, 1, d / 2]."""
    pairs = x.to(turn.real.dtype).unflatten(-1, (-1, 2))
    return torch.view_as_real(torch.view_as_complex(pairs) * turn).flatten(-2).to(x.dtype)
