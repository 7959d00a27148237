"""Streaming, chunk by chunk: the one loop that training rollouts, evaluation and the live student share.

A chunk starts as noise (or as a re-noised draft, for the refiner), is denoised in a few x0 / re-noise steps, and is
then run once more, at the history's noise level, to write its keys and values.

cond of the chunk [audio of K frames + past], cache  ->  x0 [B, K, C, H, W], next cache
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from student.causal_dit import CausalDiT
from student.kv_cache import KVCache
from teacher.conditions import Conditions
from teacher.flow import add_noise, x0_from_v


def gaussian(like: Tensor, generator: torch.Generator) -> Tensor:
    """Fresh noise of the shape of `like`, drawn on the generator's device so that seeds mean the same everywhere."""
    noise = torch.randn(like.shape, generator=generator, device=generator.device)
    return noise.to(like.device, like.dtype)


def denoise_chunk(
    model: CausalDiT,
    cond: Conditions,
    cache: KVCache,
    steps: tuple[float, ...],
    draft: Tensor,
    generator: torch.Generator,
    exit_step: int | None = None,
) -> Tensor:
    """Denoise one chunk. `draft` [B, K, C, H, W] is noised to steps[0] first: at t = 1 nothing of it is left. Between
    steps x0 is noised afresh; a flow map goes from time to time instead, along the path that it knows.

    With `exit_step` the loop ends there and only that evaluation carries gradient (Self-Forcing, arXiv 2506.08009).
    """
    last = len(steps) - 1 if exit_step is None else exit_step
    x = draft
    for index in range(last + 1):
        t = torch.full((len(draft),), steps[index], dtype=torch.float64, device=draft.device)
        r = torch.full_like(t, steps[index + 1] if model.flow_map and index < last else 0.0)
        xt = x if model.flow_map and index else add_noise(x, gaussian(draft, generator), t)
        with torch.set_grad_enabled(torch.is_grad_enabled() and (exit_step is None or index == exit_step)):
            x = x0_from_v(xt, model.velocity(xt, t, cond, cache, r), t - r)  # x_r
    return x


@torch.no_grad()
def remember_chunk(
    model: CausalDiT, x0: Tensor, cond: Conditions, cache: KVCache, noise: float, generator: torch.Generator
) -> KVCache:
    """Write a finished chunk into the cache as history at noise level `noise`, without gradient."""
    t = torch.full((len(x0),), noise, dtype=torch.float64, device=x0.device)
    x = add_noise(x0, gaussian(x0, generator), t) if noise else x0
    return model.remember(x.detach(), t, cond, cache)


@torch.no_grad()
def stream(
    backbone: CausalDiT, refiner: CausalDiT | None, cond: Conditions, generator: torch.Generator
) -> Iterator[Tensor]:
    """Yield the chunks of `cond.num_frames` latent frames, each [B, K, C, H, W].

    With a refiner the backbone takes all steps but the last, under noisy history, and the refiner the last one, under
    the clean history of its own output. Without one the backbone takes all steps itself.
    """
    config = backbone.stream
    size = config.chunk_frames
    if refiner is not None and not config.refined:
        raise ValueError("A stream of a single step has none left for a refiner.")
    if cond.num_frames % size:
        raise ValueError(
            f"A stream is made of whole chunks of {size} latent frames, the audio covers {cond.num_frames}: pad it."
        )
    blank = cond.refs.new_zeros(len(cond.refs), size, *cond.refs.shape[2:])
    draft_cache = backbone.start(cond)
    final_cache = refiner.start(cond) if refiner is not None else None
    steps = config.steps if refiner is None else config.steps[:-1]
    for start in range(0, cond.num_frames, size):
        told = cond.frames(start, start + size)
        draft = denoise_chunk(backbone, told, draft_cache, steps, blank, generator)
        draft_cache = remember_chunk(backbone, draft, told, draft_cache, config.history_noise, generator)
        if refiner is None or final_cache is None:
            yield draft
            continue
        x0 = denoise_chunk(refiner, told, final_cache, config.steps[-1:], draft, generator)
        final_cache = remember_chunk(refiner, x0, told, final_cache, 0.0, generator)
        yield x0
