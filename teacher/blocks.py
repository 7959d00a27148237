"""The DiT block and the embedders around it, in the arrangement and naming of Wan2.1, plus the audio encoder.

Time enters per latent frame, so that the causal student can hold frames at different noise levels; the teacher gives
every frame the same one.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from teacher.attention import KV, Blocks, CrossAttention, SelfAttention
from teacher.lora import Linear


def time_features(t: Tensor, dim: int = 256) -> Tensor:
    """Sinusoids of 1000 t: t [...] -> [..., dim] float32."""
    frequencies = 10000 ** -(torch.arange(dim // 2, dtype=torch.float64, device=t.device) / (dim // 2))
    angles = 1000 * t.double()[..., None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], -1).float()


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """AdaLN per frame: x [B, T*n, D] (the residual stream), shift, scale [B, T, D]; the norm has no weights."""
    frames = shift.shape[1]
    x = rearrange(F.layer_norm(x, x.shape[-1:], eps=1e-6), "b (t n) d -> b t n d", t=frames)
    return rearrange(x * (1 + scale[:, :, None]) + shift[:, :, None], "b t n d -> b (t n) d")


def gated(x: Tensor, update: Tensor, gate: Tensor) -> Tensor:
    """x + gate * update, gate [B, T, D] per frame. The residual stream stays in x's precision."""
    update = rearrange(update.to(x.dtype), "b (t n) d -> b t n d", t=gate.shape[1]) * gate[:, :, None]
    return x + rearrange(update, "b t n d -> b (t n) d")


class AudioEncoder(nn.Module):
    """Log-mel features -> tokens: `group` consecutive features make one token, [B, A, M] -> [B, frames, G, D].

    Stacking the features of a token before the first layer keeps their order, which lip sync lives on.
    `offsets` [W, G, D] says where in a frame's window a token stands.
    """

    def __init__(self, dim: int, mels: int, per_latent: int, group: int, window: int):
        super().__init__()
        if per_latent % group:
            raise ValueError(f"audio_group {group} does not divide the {per_latent} features of a latent frame.")
        self.per_latent, self.group, self.window = per_latent, group, window
        self.layers = nn.Sequential(nn.Linear(group * mels, dim), nn.GELU(approximate="tanh"), nn.Linear(dim, dim))
        self.offsets = nn.Parameter(torch.randn(window, per_latent // group, dim) / math.sqrt(dim))

    def forward(self, features: Tensor, past: int) -> Tensor:
        """Features with `past` latent frames before the first -> tokens of frames 1 - window .. T - 1."""
        tokens = self.layers(
            rearrange(features, "b (t g k) m -> b t g (k m)", g=self.per_latent // self.group, k=self.group)
        )
        return tokens[:, past + 1 - self.window :]


class LayerNorm(nn.LayerNorm):
    """Computed in the precision of the residual stream, whatever its weights are kept or gathered in."""

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.weight.to(x.dtype), self.bias.to(x.dtype)
        return F.layer_norm(x, self.normalized_shape, weight, bias, self.eps)


class Block(nn.Module):
    """Self-attention, text + audio cross-attention, feed-forward; AdaLN from time with a learned per-block table."""

    def __init__(self, dim: int, ffn_dim: int, heads: int):
        super().__init__()
        self.self_attn = SelfAttention(dim, heads)
        self.norm3 = LayerNorm(dim, eps=1e-6)
        self.cross_attn = CrossAttention(dim, heads)
        self.ffn = nn.Sequential(Linear(dim, ffn_dim), nn.GELU(approximate="tanh"), Linear(ffn_dim, dim))
        self.modulation = nn.Parameter(torch.randn(1, 6, dim) / math.sqrt(dim))

    def forward(
        self,
        x: Tensor,
        time: Tensor,
        positions: Tensor,
        context: list[KV],
        mask: Blocks | None,
        told: tuple[Tensor, Tensor, Tensor] | None,
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """x [B, T*n, D]; time [B, T, 6, D]; told = (text, audio, offsets) or None for reference images, which hear
        and read nothing. Returns x and this layer's (k, v)."""
        shift1, scale1, gate1, shift2, scale2, gate2 = (self.modulation + time).unbind(2)
        attended, kv = self.self_attn(modulate(x, shift1, scale1), positions, context, mask)
        x = gated(x, attended, gate1)
        if told is not None:
            x = x + self.cross_attn(self.norm3(x), *told)
        x = gated(x, self.ffn(modulate(x, shift2, scale2)), gate2)
        return x, kv


class Head(nn.Module):
    """Final AdaLN and projection to patches."""

    def __init__(self, dim: int, out_dim: int):
        super().__init__()
        self.head = nn.Linear(dim, out_dim)
        self.modulation = nn.Parameter(torch.randn(1, 2, dim) / math.sqrt(dim))

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """x [B, T*n, D], time [B, T, D] -> [B, T*n, out]."""
        shift, scale = (self.modulation + time[:, :, None]).unbind(2)
        return self.head(modulate(x, shift, scale))
