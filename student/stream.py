"""Streaming, chunk by chunk: the one loop that training rollouts, evaluation and the live student share.

A chunk starts as noise (or as a re-noised draft, for the refiner), is denoised in a few x0 / re-noise steps, and goes
through the network once more, at the history's noise level, to write its keys and values: at once, or, with the network
for streaming, together with the first step of the next chunk (student/fast.py).

cond of the chunk [audio of K frames + past], cache  ->  x0 [B, K, C, H, W], next cache
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor

from student.causal_dit import CausalDiT
from student.fast import FastDiT
from student.history import CLEAN, History
from student.kv_cache import KVCache
from student.promise import Cache, anew
from teacher.conditions import Conditions
from teacher.draws import gaussian
from teacher.flow import add_noise, x0_from_v

Network = CausalDiT | FastDiT
PARTS = ("draft", "refine")
Noise = Callable[[int, str], torch.Generator]  # (number of the chunk, its part) -> where its noise comes from


def denoise_chunk(
    model: Network,
    cond: Conditions,
    cache: Cache,
    steps: tuple[float, ...],
    draft: Tensor,
    generator: torch.Generator,
    exit_step: int | None = None,
    trace: list[Tensor] | None = None,
) -> Tensor:
    """Denoise one chunk. `draft` [B, K, C, H, W] is noised to steps[0] first: at t = 1 nothing of it is left. Between
    steps x0 is noised afresh; a flow map goes from time to time instead, along the path that it knows.

    With `exit_step` the loop ends there and only that evaluation carries gradient (Self-Forcing, arXiv 2506.08009).
    `trace` takes the x_t of every evaluation, from which `evaluate` makes it again.
    """
    last = len(steps) - 1 if exit_step is None else exit_step
    x = draft
    for index in range(last + 1):
        t = torch.full((len(draft),), steps[index], dtype=torch.float64, device=draft.device)
        xt = x if model.flow_map and index else add_noise(x, gaussian(draft, generator), t)
        if trace is not None:
            trace.append(xt.detach())
        with torch.set_grad_enabled(torch.is_grad_enabled() and (exit_step is None or index == exit_step)):
            x = evaluate(model, xt, cond, cache, steps, index, last)
    return x


def evaluate(
    model: Network, xt: Tensor, cond: Conditions, cache: Cache, steps: tuple[float, ...], index: int, last: int
) -> Tensor:
    """One evaluation at steps[index], of `last` + 1: x0, or of a flow map x at the next step."""
    t = torch.full((len(xt),), steps[index], dtype=torch.float64, device=xt.device)
    r = torch.full_like(t, steps[index + 1] if model.flow_map and index < last else 0.0)
    return x0_from_v(xt, model.velocity(xt, t, cond, cache.at(index), r), t - r)


def write_chunk(
    model: Network, x0: Tensor, cond: Conditions, cache: Cache, history: History, generator: torch.Generator
) -> Cache:
    """Write a finished chunk into the cache as the history says, with the gradient of x0, for those who want it to flow
    from chunk to chunk."""
    if isinstance(cache, KVCache) and history.kind == "matched":
        eps = gaussian(x0, generator)  # one noise: the levels lie on one path
        caches: list[KVCache] = []
        for index, step in enumerate(model.stream.steps):
            t = torch.full((len(x0),), step, dtype=torch.float64, device=x0.device)
            written = model.remember(add_noise(x0, eps, t), t, cond, cache.at(index))
            assert isinstance(written, KVCache)  # see CausalDiT.streaming
            caches.append(written)
        return replace(caches[0], later=tuple(caches[1:]))
    return model.remember(*history.spoiled(x0, generator), cond, cache)


@torch.no_grad()
def remember_chunk(
    model: Network, x0: Tensor, cond: Conditions, cache: Cache, history: History, generator: torch.Generator
) -> Cache:
    """`write_chunk` without gradient."""
    return write_chunk(model, x0.detach(), cond, cache, history, generator)


@torch.no_grad()
def draft_chunk(
    backbone: Network, told: Conditions, cache: Cache, generator: torch.Generator, alone: bool = False
) -> tuple[Tensor, Cache]:
    """The backbone's part of a chunk: all steps but the last (`alone`: all of them), then noisy history.

    -> draft [B, K, C, H, W], next cache
    """
    config, cache = backbone.stream, anew(cache)
    steps = config.steps if alone else config.steps[:-1]
    blank = told.refs.new_zeros(len(told.refs), config.chunk_frames, *told.refs.shape[2:])
    draft = denoise_chunk(backbone, told, cache, steps, blank, generator)
    return draft, remember_chunk(backbone, draft, told, cache, config.history, generator)


@torch.no_grad()
def refine_chunk(
    refiner: Network, told: Conditions, cache: Cache, draft: Tensor, generator: torch.Generator
) -> tuple[Tensor, Cache]:
    """The refiner's part: the last step, from the re-noised draft, then clean history -> x0 like draft, next cache."""
    cache = anew(cache)
    x0 = denoise_chunk(refiner, told, cache, refiner.stream.steps[-1:], draft, generator)
    return x0, remember_chunk(refiner, x0, told, cache, CLEAN, generator)


@torch.no_grad()
def stream(
    backbone: CausalDiT, refiner: CausalDiT | None, cond: Conditions, generator: torch.Generator | Noise
) -> Iterator[Tensor]:
    """Yield the chunks of `cond.num_frames` latent frames, each [B, K, C, H, W].

    With a refiner the backbone takes all steps but the last, under noisy history, and the refiner the last one, under
    the clean history of its own output. Without one the backbone takes all steps itself. Noise comes from one
    generator in the order of use, or from one per chunk and part, as in a live session.
    """
    size = backbone.stream.chunk_frames
    if refiner is not None and not backbone.stream.refined:
        raise ValueError("A stream of a single step has none left for a refiner.")
    if cond.num_frames % size:
        raise ValueError(
            f"A stream is made of whole chunks of {size} latent frames, the audio covers {cond.num_frames}: pad it."
        )
    fast, finish = backbone.streaming(), None if refiner is None else refiner.streaming()
    draft_cache: Cache = backbone.start(cond)
    final_cache: Cache | None = None if refiner is None else refiner.start(cond)
    for index in range(cond.num_frames // size):
        told = cond.frames(index * size, (index + 1) * size)
        sources = [generator if isinstance(generator, torch.Generator) else generator(index, p) for p in PARTS]
        x0, draft_cache = draft_chunk(fast, told, draft_cache, sources[0], alone=refiner is None)
        if finish is not None and final_cache is not None:
            x0, final_cache = refine_chunk(finish, told, final_cache, x0, sources[1])
        yield x0
