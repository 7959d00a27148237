"""The rollout `long`: the student's own stream, many times the teacher's clip, at the memory of one chunk.

As `self` (Self-Forcing, https://arxiv.org/abs/2506.08009), and every update goes on where the last one stopped. The
stream is made without gradient; the terms score its last clip, the window; then the window's last `grad_chunks` chunks
are run again one by one, each with its slice of dL/dx0, its graph freed before the next (DynaForcing,
https://arxiv.org/abs/2608.17707). With detached keys and values that is the gradient itself. Not so with
`cross_chunk_grad`, where it flows through the history inside the window: there the window is run again as one graph.

A chunk of age a (chunks since its stream began) counts 1 + late * min(a / max_chunks, 1): its slice is scaled, so that
it holds for all terms alike. `carried` (distill/contracts.py) keeps caches, the character, heard audio, the first chunk
and the position; a stream that would grow past `max_chunks` begins anew with the batch's characters. Until then these
stay while the batch brings audio, states and texts: each piece of a clip's length is another clip's. A share `p_data`
of the streams begins with the data's own clip as history, spoiled like any other, so that the student also learns from
where motion is whole.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from distill.contracts import Clip, Roles, Roll
from distill.data.batch import Batch
from recipes.carried import Carried, keep, take, with_refs
from recipes.self_forcing import longer
from student.causal_dit import CausalDiT
from student.kv_cache import KVCache
from student.promise import Cache
from student.stream import denoise_chunk, evaluate, remember_chunk, write_chunk
from teacher.attention import KV
from teacher.conditions import AUDIO_PER_LATENT, PAST, Conditions
from teacher.draws import RowGenerator


@dataclass(frozen=True)
class Config:
    chunks: int = 8  # new ones per update
    grad_chunks: int = 4  # the last ones that carry gradient, the window's at most
    max_chunks: int = 64  # of a stream; then it begins anew
    cross_chunk_grad: bool = False
    late: float = 0.0  # how much more than the first chunk the one of age max_chunks counts
    p_data: float = 0.0  # share of the streams that begin with the data's clip

    def __post_init__(self):
        if self.chunks < 1 or not 1 <= self.grad_chunks <= self.chunks:
            raise ValueError("chunks must be at least 1 and grad_chunks lie between 1 and chunks")
        if self.max_chunks < self.chunks or self.late < 0 or not 0 <= self.p_data <= 1:
            raise ValueError("max_chunks must be at least chunks, late at least 0, p_data in [0, 1]")


def roll_long(batch: Batch, roles: Roles, cfg: Config) -> Roll:
    """The next `chunks` chunks of the stream; x0 [B, T, ...] is their last clip, a leaf."""
    student, stream, size = roles.causal("student"), roles.stream, roles.stream.chunk_frames
    clip = batch.cond.num_frames
    if clip % size or cfg.chunks < clip // size:
        raise ValueError(f"rollout.chunks {cfg.chunks} is shorter than the clip, which has {clip // size} chunks.")
    noise = roles.rows("rollout/noise")
    exit_step = int(torch.randint(len(stream.steps), (), generator=roles.generator("rollout/exit", shared=True)))
    learns, begin = torch.is_grad_enabled(), cfg.chunks - min(cfg.grad_chunks, clip // size)
    with torch.no_grad():
        before = take(roles, batch, student, cfg.max_chunks - cfg.chunks)
        fresh = before is None
        if before is None:
            before = _begin(batch, roles, student, cfg, noise)
        told = conditions_of(batch, before, roles, cfg.chunks)
        cache, chunks, first = before.cache, [], before.first
        window: list[_Again] = []
        start = cache
        for index, cond in enumerate(told):
            if index == begin:
                start = cache
            trace: list[Tensor] = []
            blank = cond.refs.new_zeros(len(cond.refs), size, *cond.refs.shape[2:])
            x0 = denoise_chunk(student, cond, cache, stream.steps, blank, noise, exit_step, trace)
            if learns and index >= begin:
                weight = 1 + cfg.late * min(cache.seen / cfg.max_chunks, 1.0)
                window.append(_Again(cond, trace[-1], x0, noise.get_state(), weight))
            cache = _kept(remember_chunk(student, x0, cond, cache, stream.history, noise))
            first = x0 if first is None else first
            chunks.append(x0)
        keep(roles, Carried(cache, before.identity, before.refs, before.ref_mask, *_heard(told[-1]), first))
    x0 = torch.cat(chunks, 1)[:, -clip:].requires_grad_(learns)
    age = torch.arange(cache.seen * size - clip, cache.seen * size, device=x0.device) // size
    scored = replace(told[-1], **_joined(told[-(clip // size) :]))
    replay = Replay(student, window, start, exit_step, noise, cfg.cross_chunk_grad) if learns else None
    logs = {"rollout/age": torch.tensor(float(cache.seen))}
    time, real = stream.steps[exit_step], batch.latents if fresh else None
    return Roll(
        x0,
        scored,
        real=real,
        age=age,
        time=time,
        first=first,
        replay=replay,
        clip=Clip(batch.latents, batch.cond),
        identity=before.identity,
        logs=logs,
    )


ROLLOUTS = {"long": (roll_long, Config)}


@dataclass(frozen=True)
class _Again:
    """What one chunk is made again from."""

    cond: Conditions
    xt: Tensor  # at the exit step
    x0: Tensor
    noise: Tensor  # state of the generator before the chunk was remembered
    weight: float


@dataclass(frozen=True)
class Replay:
    """The window again, under the same weights and the same noise: see `distill.contracts.Replay`."""

    student: CausalDiT
    window: list[_Again]
    cache: KVCache  # before the window's first chunk
    exit_step: int
    noise: RowGenerator
    joined: bool  # as one graph, through the history

    def __len__(self) -> int:
        return 1 if self.joined else len(self.window)

    def __call__(self, gradient: Tensor) -> Iterator[Tensor]:
        slices = gradient.split(self.student.stream.chunk_frames, 1)[-len(self.window) :]
        if self.joined:
            yield self._whole(slices)
            return
        cache = self.cache
        for chunk, part in zip(self.window, slices, strict=True):
            yield self._aimed(chunk, part, self._run(chunk, with_refs(cache, self._refs())))
            cache = self._remember(chunk, chunk.x0, cache)

    def _whole(self, slices: tuple[Tensor, ...]) -> Tensor:
        cache, total = with_refs(self.cache, self._refs()), slices[0].new_zeros(())
        for chunk, part in zip(self.window, slices, strict=True):
            x0 = self._run(chunk, cache)
            total = total + self._aimed(chunk, part, x0)
            self.noise.set_state(chunk.noise)
            cache = _kept(write_chunk(self.student, x0, chunk.cond, cache, self.student.stream.history, self.noise))
        return total

    def _refs(self) -> list[list[KV]]:
        """References learn too: their keys and values are made again in every graph."""
        return self.student.dit.encode_refs(self.window[0].cond)

    def _run(self, chunk: _Again, cache: KVCache) -> Tensor:
        return evaluate(
            self.student, chunk.xt, chunk.cond, cache, self.student.stream.steps, self.exit_step, self.exit_step
        )

    def _aimed(self, chunk: _Again, part: Tensor, x0: Tensor) -> Tensor:
        return (chunk.weight * part * x0).sum()

    def _remember(self, chunk: _Again, x0: Tensor, cache: KVCache) -> KVCache:
        self.noise.set_state(chunk.noise)
        return _kept(remember_chunk(self.student, x0, chunk.cond, cache, self.student.stream.history, self.noise))


# ---- the stream -------------------------------------------------------------------------------------------


def _begin(batch: Batch, roles: Roles, student: CausalDiT, cfg: Config, noise: RowGenerator) -> Carried:
    """A stream of the batch's characters, with an empty history or with the data's own clip."""
    cond, cache, size = batch.cond, student.start(batch.cond), roles.stream.chunk_frames
    begun = Carried(cache, batch.identity, cond.refs, cond.ref_mask, None, None, None)
    drawn = float(torch.rand((), generator=roles.generator("rollout/data", shared=True)))
    if batch.latents is None or drawn >= cfg.p_data:
        return begun
    for start in range(0, cond.num_frames, size):
        told = cond.frames(start, start + size)
        real = batch.latents[:, start : start + size]
        cache = _kept(remember_chunk(student, real, told, cache, roles.stream.history, noise))
    return replace(begun, cache=cache, speak=_heard(cond)[0], listen=_heard(cond)[1], first=batch.latents[:, :size])


def conditions_of(batch: Batch, before: Carried, roles: Roles, chunks: int) -> list[Conditions]:
    """Of every chunk to come: the stream's character, and of each piece of a clip's length the audio and the text of
    another clip of the batch, the row's own clip last."""
    cond, clip, size = batch.cond, batch.cond.num_frames, roles.stream.chunk_frames
    frames, rank, rows = chunks * size, int(roles.key[1]), len(batch)
    joined = longer(cond, frames, roles.whole, rank)
    for name in ("speak", "listen"):
        past, heard = getattr(before, name), getattr(joined, name)
        if past is not None:
            joined = replace(joined, **{name: torch.cat([past.to(heard), heard[:, past.shape[1] :]], 1)})
    joined = replace(joined, refs=before.refs, ref_mask=before.ref_mask)
    every, row = roles.whole or cond, torch.arange(rows) + (rank * rows if roles.whole is not None else 0)
    told = []
    for start in range(0, frames, size):
        piece = -(-(frames - start) // clip) - 1  # 0 is the row's own clip
        whose = (row - piece) % len(every.text)
        texts = {name: getattr(every, name)[whose].to(cond.text.device) for name in ("text", "text_mask")}
        told.append(replace(joined.frames(start, start + size), **texts))
    return told


def _joined(told: list[Conditions]) -> dict[str, Tensor]:
    """Audio of consecutive chunks in one piece."""
    past = AUDIO_PER_LATENT * PAST
    return {
        name: torch.cat([getattr(told[0], name)[:, :past], *(getattr(one, name)[:, past:] for one in told)], 1)
        for name in ("speak", "listen")
    }


def _heard(cond: Conditions) -> tuple[Tensor, Tensor]:
    """The end of the audio, which the next chunk has as its past."""
    past = AUDIO_PER_LATENT * PAST
    return cond.speak[:, -past:], cond.listen[:, -past:]


def _kept(cache: Cache) -> KVCache:
    """Networks that learn promise nothing: they write at once."""
    assert isinstance(cache, KVCache)
    return cache
