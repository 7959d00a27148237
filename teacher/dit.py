"""The video DiT (Wan2.1's arrangement) with LPM's parts: interleaved dual audio and reference images.

Reference images are encoded first, each for itself, at t = 0: they hear and read nothing and never look at the video,
so their keys and values are the same for every step, guidance branch and chunk, and can be kept for a whole stream.
The video then attends to itself and to them.

x [B, T, C, H, W], t [B] or [B, T], Conditions  ->  v [B, T, C, H, W]
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from teacher.attention import KV, Blocks
from teacher.blocks import AudioEncoder, Block, Head, time_features
from teacher.conditions import AUDIO_PER_LATENT, PAST, Conditions
from teacher.lora import Adapters, in_use, using
from teacher.rope import grid_positions, moved, reference_times


@dataclass(frozen=True)
class DiTConfig:
    """Sizes of the network. The defaults are the tiny scale."""

    dim: int = 192
    depth: int = 6
    heads: int = 6
    ffn_dim: int = 512
    channels: int = 32  # latent channels
    patch: int = 2  # latent rows and columns per token
    text_dim: int = 64
    mels: int = 32
    audio_group: int = 4  # log-mel features per audio token
    speak_window: int = 3  # latent frames, the current one included
    listen_window: int = 10
    references: tuple[str, ...] = ("global", "expression", "expression")  # kind of each reference slot
    flow_map: bool = False  # a second time input r, the time at which a step ends (recipes/flow_map.py)
    checkpoint_blocks: bool = False  # recompute activations in the backward pass

    def __post_init__(self):
        if self.dim % self.heads or (self.dim // self.heads) % 2:
            raise ValueError(f"model.dim {self.dim} must be an even multiple of model.heads {self.heads}.")
        if max(self.speak_window, self.listen_window) > PAST + 1:
            raise ValueError(f"model.speak_window and listen_window reach back {PAST + 1} latent frames at most.")


def config_from(values: dict[str, Any]) -> DiTConfig:
    """The configuration back from JSON, where tuples have become lists."""
    read: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in values.items()}
    return DiTConfig(**read)


def interval_embedding(dim: int) -> nn.Sequential:
    """What a flow map hears of where its step ends; silent at its start: weights without it do what they did."""
    last = nn.Linear(dim, dim)
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)
    return nn.Sequential(nn.Linear(256, dim), nn.SiLU(), last)


class DiT(nn.Module):
    """Teacher, critic, and (inside `student.causal_dit`) student: one set of weights, three uses."""

    def __init__(self, config: DiTConfig):
        super().__init__()
        self.config = config
        dim, patch_dim = config.dim, config.channels * config.patch**2
        self.patch_embedding = nn.Linear(patch_dim, dim)
        self.text_embedding = nn.Sequential(
            nn.Linear(config.text_dim, dim), nn.GELU(approximate="tanh"), nn.Linear(dim, dim)
        )
        self.time_embedding = nn.Sequential(nn.Linear(256, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.time_projection = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))
        audio = (dim, config.mels, AUDIO_PER_LATENT, config.audio_group)
        self.speak_embedding = AudioEncoder(*audio, window=config.speak_window)
        self.listen_embedding = AudioEncoder(*audio, window=config.listen_window)
        self.blocks = nn.ModuleList(Block(dim, config.ffn_dim, config.heads) for _ in range(config.depth))
        self.head = Head(dim, patch_dim)
        nn.init.zeros_(self.head.head.weight)
        nn.init.zeros_(self.head.head.bias)
        if config.flow_map:
            self.interval_embedding = interval_embedding(dim)

    def forward(self, x: Tensor, t: Tensor, cond: Conditions, refs: list[list[KV]] | None = None) -> Tensor:
        """Bidirectional velocity. `refs` may carry `encode_refs(cond)` from an earlier call."""
        refs = self.encode_refs(cond) if refs is None else refs
        positions = grid_positions(x.shape[1], *self.token_grid(x)).to(x.device)
        return self.run(x, t, cond, positions, refs, keep=False)[0]

    def token_grid(self, x: Tensor) -> tuple[int, int]:
        """Token rows and columns of latents [..., H, W]."""
        return x.shape[-2] // self.config.patch, x.shape[-1] // self.config.patch

    def encode_refs(self, cond: Conditions) -> list[list[KV]]:
        """Reference images -> per layer a one-element context of R*n tokens.

        Slots that no item of the batch fills are left out, and where all items fill the others no mask is needed: then
        flash-attn serves. Otherwise absent images are masked.
        """
        batch, slots = cond.refs.shape[:2]
        if slots > len(self.config.references):
            raise ValueError(f"{slots} reference images were given, the model has {len(self.config.references)} slots.")
        rows, columns = self.token_grid(cond.refs)
        there = cond.ref_mask.any(0).nonzero()[:, 0].tolist()
        times = reference_times(self.config.references[:slots])
        if not there:
            nothing = cond.refs.new_zeros(batch, 0, self.config.dim)
            return [[KV(nothing, nothing, nothing.new_zeros(0, 3).double())] for _ in range(self.config.depth)]
        present = cond.ref_mask[:, there]
        images = cond.refs[:, there].flatten(0, 1)[:, None]  # [B*R, 1, C, H, W]
        t = torch.zeros(len(images), 1, dtype=torch.float64, device=images.device)
        base = grid_positions(1, rows, columns).to(images.device)
        # An image looks at itself alone, so its own time cancels; it matters where the video looks at it.
        _, layers = self.run(images, t, None, base, None)
        positions = torch.cat([moved(base, time) for time in (times[slot] for slot in there)])
        mask = None if present.all() else present[:, :, None].expand(-1, -1, rows * columns).flatten(1)
        join = "(b r) n d -> b (r n) d"
        return [[KV(rearrange(k, join, b=batch), rearrange(v, join, b=batch), positions, mask)] for k, v in layers]

    def run(
        self,
        x: Tensor,
        t: Tensor,
        cond: Conditions | None,
        positions: Tensor,
        context: list[list[KV]] | None,
        mask: Blocks | None = None,
        r: Tensor | None = None,
        keep: bool = True,
    ) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        """The network proper: tokens of `x` at `positions` [T*n, 3], looking at each other (through `mask`) and at the
        per-layer `context`. Returns v like x and the per-layer (k before RoPE, v) of these tokens, which are let go
        layer by layer unless `keep`: of a long clip they are larger than the network. A flow map with r (like t, at
        most t) gives the mean velocity of the path from t to r; references and history have no r."""
        frames, patch = x.shape[1], self.config.patch
        rows, columns = self.token_grid(x)
        tokens = rearrange(x, "b t c (h p) (w q) -> b (t h w) (p q c)", p=patch, q=patch)
        tokens = self.patch_embedding(tokens.to(self.patch_embedding.weight.dtype))  # [B, T*n, D]
        # The residual stream is kept in fp32 (or better): sums of many small updates are what bf16 loses.
        tokens = tokens.to(torch.promote_types(tokens.dtype, torch.float32))
        t = t[:, None].expand(-1, frames) if t.ndim == 1 else t
        time = self.time_embedding(time_features(t).to(tokens.dtype))  # [B, T, D]
        if r is not None:
            r = r[:, None].expand(-1, frames) if r.ndim == 1 else r
            time = time + self.interval_embedding(time_features(t - r).to(tokens.dtype))
        table = self.time_projection(time).unflatten(-1, (6, -1))  # [B, T, 6, D]
        told, adapters = self._told(cond), in_use()
        layers = []
        for index, block in enumerate(self.blocks):
            arguments = (tokens, table, positions, context[index] if context else [], mask, told and told[index % 2])
            if self.config.checkpoint_blocks and torch.is_grad_enabled():
                # By the time of the backward pass other adapters may have been in use.
                again = partial(_contexts, adapters)
                tokens, kv = checkpoint(block, *arguments, use_reentrant=False, context_fn=again)
            else:
                tokens, kv = block(*arguments)
            if keep:
                layers.append(kv)
        out = self.head(tokens, time)
        v = rearrange(out, "b (t h w) (p q c) -> b t c (h p) (w q)", t=frames, h=rows, w=columns, p=patch, q=patch)
        return v.to(x.dtype), layers

    def _told(self, cond: Conditions | None):
        """(text, audio, offsets) for even blocks (speak) and odd ones (listen)."""
        if cond is None:
            return None
        dtype = self.patch_embedding.weight.dtype
        text = self.text_embedding((cond.text * cond.text_mask[..., None]).to(dtype))
        speak = self.speak_embedding(cond.speak.to(dtype), PAST)
        listen = self.listen_embedding(cond.listen.to(dtype), PAST)
        return (text, speak, self.speak_embedding.offsets), (text, listen, self.listen_embedding.offsets)


def _contexts(adapters: Adapters | None) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """What checkpointing holds open in the forward pass, and while it repeats it."""
    return nullcontext(), using(adapters)
