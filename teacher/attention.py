"""Attention: one function over the back ends, and the self-attention that reads tokens kept from elsewhere.

`KV` holds keys *before* RoPE and values of tokens computed earlier (references, past chunks) with the positions they
shall have in this call. Nothing here writes into them.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from teacher.lora import Linear
from teacher.rope import rope_angles, rotate


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Softmax attention. q [B, N, heads, d], k, v [B, M, heads, d], mask bool, True = may look, broadcastable to
    [B, heads, N, M] -> [B, N, heads, d]. On a GPU flash-attn serves where it is installed, in half precision and
    without a mask; all else goes to torch, which picks among its own kernels."""
    if mask is None and q.is_cuda and (flash := _flash_attn()) is not None and q.dtype in (torch.bfloat16, torch.half):
        return flash(q, k, v)
    # On a CPU the backward pass of SDPA is about seven times slower in bf16 than in fp32 (torch 2.13).
    compute = torch.float32 if q.device.type == "cpu" and q.dtype == torch.bfloat16 else q.dtype
    casts = torch.is_autocast_enabled(q.device.type)  # to enter the block for nothing costs as much as a small product
    with torch.autocast(q.device.type, enabled=False) if casts else nullcontext():
        heads_first = [x.transpose(1, 2).to(compute) for x in (q, k, v)]
        out = F.scaled_dot_product_attention(heads_first[0], heads_first[1], heads_first[2], attn_mask=mask)
    return out.transpose(1, 2).to(q.dtype)


@dataclass(frozen=True)
class Blocks:
    """A mask by equal blocks of tokens: query block i may look at key block j where visible[i, j]; `free` keys in front
    may be looked at by all. visible [rows, columns] bool, on the CPU; `size` tokens per block."""

    visible: Tensor
    size: int
    free: int = 0

    def spans(self, row: int) -> list[slice]:
        """The keys that query block `row` sees, neighbors joined."""
        spans = [slice(0, self.free)] if self.free else []
        for column in self.visible[row].nonzero()[:, 0].tolist():
            start = self.free + column * self.size
            if spans and spans[-1].stop == start:
                spans[-1] = slice(spans[-1].start, start + self.size)
            else:
                spans.append(slice(start, start + self.size))
        return spans

    def dense(self) -> Tensor:
        """The same as a mask of single tokens, bool [N, M]."""
        mask = self.visible.repeat_interleave(self.size, 0).repeat_interleave(self.size, 1)
        return torch.cat([torch.ones(len(mask), self.free, dtype=torch.bool), mask], 1)


def block_attention(q: Tensor, k: Tensor, v: Tensor, blocks: Blocks, padding: Tensor | None = None) -> Tensor:
    """`attention` under `blocks`, one query block after the other over the keys that it sees: nothing hidden is
    computed, no [N, M] mask exists, and flash-attn can serve. padding [B, 1, 1, M] hides further keys."""
    out = []
    for row, query in enumerate(q.split(blocks.size, 1)):
        spans = blocks.spans(row)
        keys, values = (torch.cat([x[:, span] for span in spans], 1) for x in (k, v))
        hidden = None if padding is None else torch.cat([padding[..., span] for span in spans], -1)
        out.append(attention(query, keys, values, hidden))
    return torch.cat(out, 1)


def _flash_attn():
    try:
        from flash_attn import flash_attn_func
    except ImportError:
        return None
    return flash_attn_func


@dataclass(frozen=True)
class KV:
    """Tokens of one layer that may be looked at: k (before RoPE), v [B, n, D]; positions [n, 3]; mask [B, n] bool."""

    k: Tensor
    v: Tensor
    positions: Tensor
    mask: Tensor | None = None


class RMSNorm(nn.Module):
    """Root-mean-square norm over the full width, computed in fp32."""

    def __init__(self, dim: int, eps: float = 1e-6):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        dtype = torch.promote_types(x.dtype, torch.float32)
        return F.rms_norm(x.to(dtype), self.weight.shape, self.weight.to(dtype), self.eps).to(x.dtype)


class SelfAttention(nn.Module):
    """Wan2.1's self-attention (q and k RMS-normed over the full width, 3-D RoPE) with a context of kept tokens."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.o = (Linear(dim, dim) for _ in range(4))
        self.norm_q, self.norm_k = RMSNorm(dim), RMSNorm(dim)

    def forward(
        self, x: Tensor, positions: Tensor, context: list[KV], mask: Blocks | None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """x [B, N, D]; mask over the M = context + own keys, in that order.

        Returns the attended tokens [B, N, D] and this call's own (k before RoPE, v), each [B, N, D].
        """
        q, k, v = self.norm_q(self.q(x)), self.norm_k(self.k(x)), self.v(x)
        keys = torch.cat([*(kv.k.to(k.dtype) for kv in context), k], 1)
        values = torch.cat([*(kv.v.to(v.dtype) for kv in context), v], 1)
        angles = rope_angles(torch.cat([*(kv.positions for kv in context), positions]), x.shape[-1] // self.heads)
        q, keys, values = (rearrange(y, "b n (h d) -> b n h d", h=self.heads) for y in (q, keys, values))
        q, keys, padding = rotate(q, angles[-x.shape[1] :]), rotate(keys, angles), _padding(context, x)
        if mask is None:
            out = attention(q, keys, values, padding)
        else:
            out = block_attention(q, keys, values, mask, padding)
        return self.o(out.flatten(2)), (k, v)


def _padding(context: list[KV], x: Tensor) -> Tensor | None:
    """[B, 1, 1, M] bool, which keys are there; None where all are."""
    if all(kv.mask is None for kv in context):
        return None
    own = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
    kept = [kv.mask if kv.mask is not None else own.new_ones(kv.k.shape[:2]) for kv in context]
    return torch.cat([*kept, own], 1)[:, None, None]


class CrossAttention(nn.Module):
    """Text cross-attention with an audio branch on the same query (LPM 1.0): `Wo A_text + Wo_audio A_audio`.

    Text is attended by all video tokens. Audio is attended frame by frame through a window of past frames; its place
    in the window comes from a table shared by all blocks, pushed through K and V (both are linear in it).
    """

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.o = (Linear(dim, dim) for _ in range(4))
        self.norm_q, self.norm_k = RMSNorm(dim), RMSNorm(dim)
        self.audio_k, self.audio_v, self.audio_o = (Linear(dim, dim) for _ in range(3))
        # The audio branch starts silent: loaded video weights work unchanged at the first step.
        nn.init.zeros_(self.audio_o.weight)
        nn.init.zeros_(self.audio_o.bias)

    def forward(self, x: Tensor, text: Tensor, audio: Tensor, offsets: Tensor) -> Tensor:
        """x [B, N, D] with N = T * tokens per frame; text [B, L, D]; audio [B, T + W - 1, G, D] where frame t looks
        at audio frames t .. t + W - 1 (its own is the last); offsets [W, G, D] -> [B, N, D]."""
        heads = "b n (h d) -> b n h d"
        q = rearrange(self.norm_q(self.q(x)), heads, h=self.heads)
        attended = attention(q, *self.read(text))
        frames = audio.shape[1] - offsets.shape[0] + 1
        heard = attention(rearrange(q, "b (t n) h d -> (b t) n h d", t=frames), *self.hear(audio, offsets))
        heard = rearrange(heard, "(b t) n h d -> b (t n) (h d)", t=frames)
        return self.o(attended.flatten(2)) + self.audio_o(heard)

    def read(self, text: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of the text, each [B, L, heads, d]."""
        k, v = self.norm_k(self.k(text)), self.v(text)
        return k.unflatten(-1, (self.heads, -1)), v.unflatten(-1, (self.heads, -1))

    def hear(self, audio: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of every frame's window of audio, each [B T, W G, heads, d]."""
        window = offsets.shape[0]
        k, v = (
            rearrange(layer(audio).unfold(1, window, 1), "b t g d w -> b t w g d") + layer.product(offsets)
            for layer in (self.audio_k, self.audio_v)
        )
        k, v = (rearrange(y, "b t w g (h d) -> (b t) (w g) h d", h=self.heads) for y in (self.norm_k(k), v))
        return k, v
