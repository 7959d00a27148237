"""On-policy rollouts (Self-Forcing, https://arxiv.org/abs/2506.08009): the student trains on what it itself produced.

`self`    a clip or longer, chunk by chunk. One exit step per rollout, the same for every chunk and rank; only that
          evaluation carries gradient; the finished chunk is run again, without gradient, to write its K/V as noisy
          history. Of rollouts longer than the teacher's clip the last clip is scored.
`refine`  the same for the refiner: drafts come from the frozen backbone under its own noisy history, are re-noised to
          the last step and refined in one evaluation under the refiner's own clean history.

Rollouts longer than the data's clip hear other clips of the batch first and their own clip last: the conditions change
in mid-run, as they do in a conversation.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from distill.contracts import Roles, Roll
from distill.data.batch import Batch
from student.history import CLEAN
from student.promise import Cache
from student.stream import denoise_chunk, remember_chunk
from teacher.conditions import AUDIO_PER_LATENT, PAST, Conditions


@dataclass(frozen=True)
class Config:
    chunks: int = 4  # chunks of the longest rollout; each one's length is drawn between the clip's and this
    grad_chunks: int = 4  # the last ones that carry gradient

    def __post_init__(self):
        if self.chunks < 1 or self.grad_chunks < 1:
            raise ValueError("chunks and grad_chunks must be at least 1")


def roll_self(batch: Batch, roles: Roles, cfg: Config) -> Roll:
    """The student's own rollout; x0 [B, T, ...] is its last clip."""
    student, stream = roles.causal("student"), roles.stream
    plan = _plan(batch, roles, cfg)
    exit_step = int(torch.randint(len(stream.steps), (), generator=roles.generator("rollout/exit", shared=True)))
    noise = roles.rows("rollout/noise")
    cache: Cache = student.start(plan.cond)
    chunks: list[Tensor] = []
    for index in range(plan.chunks):
        told, blank = _chunk(plan.cond, index, stream.chunk_frames)
        with torch.set_grad_enabled(torch.is_grad_enabled() and index >= plan.chunks - cfg.grad_chunks):
            x0 = denoise_chunk(student, told, cache, stream.steps, blank, noise, exit_step)
        cache = remember_chunk(student, x0.detach(), told, cache, stream.history, noise)
        chunks.append(x0)
    return _scored(chunks, plan, stream.steps[exit_step])


def roll_refine(batch: Batch, roles: Roles, cfg: Config) -> Roll:
    """The refiner on the backbone's drafts; x0 [B, T, ...] is its last clip."""
    backbone, refiner, stream = roles.causal("backbone"), roles.causal("refiner"), roles.stream
    plan = _plan(batch, roles, cfg)
    noise = roles.rows("rollout/noise")
    with torch.no_grad():
        draft_cache: Cache = backbone.start(plan.cond)
    cache: Cache = refiner.start(plan.cond)
    chunks: list[Tensor] = []
    for index in range(plan.chunks):
        told, blank = _chunk(plan.cond, index, stream.chunk_frames)
        with torch.no_grad():
            draft = denoise_chunk(backbone, told, draft_cache, stream.steps[:-1], blank, noise)
        draft_cache = remember_chunk(backbone, draft, told, draft_cache, stream.history, noise)
        with torch.set_grad_enabled(torch.is_grad_enabled() and index >= plan.chunks - cfg.grad_chunks):
            x0 = denoise_chunk(refiner, told, cache, stream.steps[-1:], draft, noise)
        cache = remember_chunk(refiner, x0.detach(), told, cache, CLEAN, noise)
        chunks.append(x0)
    return _scored(chunks, plan, stream.steps[-1])


ROLLOUTS = {"self": roll_self, "refine": roll_refine}


@dataclass(frozen=True)
class _Plan:
    cond: Conditions  # of the whole rollout
    chunks: int
    clip: int  # latent frames that the teacher scores
    real: Tensor | None  # the data's clip under the same conditions


def _plan(batch: Batch, roles: Roles, cfg: Config) -> _Plan:
    """Draw the rollout's length, the same on all ranks, and join the audio for it."""
    clip, size = batch.cond.num_frames, roles.stream.chunk_frames
    shortest = clip // size
    if cfg.chunks < shortest:
        raise ValueError(f"rollout.chunks {cfg.chunks} is shorter than the clip, which has {shortest} chunks.")
    chunks = int(torch.randint(shortest, cfg.chunks + 1, (), generator=roles.generator("rollout/length", shared=True)))
    cond = longer(batch.cond, chunks * size, roles.whole, int(roles.key[1]))
    return _Plan(cond, chunks, clip, batch.latents)


def longer(cond: Conditions, frames: int, whole: Conditions | None = None, rank: int = 0) -> Conditions:
    """Conditions of `frames` latent frames: each character hears its own clip last, other clips of the batch before.

    whole: conditions of all clips of a batch that several processes share; cond is the rank-th part of it.
    """
    clip, rows = cond.num_frames, len(cond.speak)
    pieces = -(-frames // clip)
    audio = {}
    for name in ("speak", "listen"):
        own, every = getattr(cond, name), getattr(whole or cond, name)
        row = torch.arange(rows) + rank * rows if whole is not None else torch.arange(rows)
        # Piece k is that of the k-th neighbor in the batch; the own clip stays last, where it is scored.
        other = [every[(row - k) % len(every)].to(own.device) for k in range(pieces - 1, 0, -1)]
        first = (other[0] if other else own)[:, : AUDIO_PER_LATENT * PAST]
        bodies = [heard[:, AUDIO_PER_LATENT * PAST :] for heard in (*other, own)]
        audio[name] = torch.cat([first, *bodies], 1)[:, -AUDIO_PER_LATENT * (frames + PAST) :]
    return replace(cond, **audio)


def _chunk(cond: Conditions, index: int, size: int) -> tuple[Conditions, Tensor]:
    """Conditions of a chunk and the blank it starts from."""
    blank = cond.refs.new_zeros(len(cond.refs), size, *cond.refs.shape[2:])
    return cond.frames(index * size, (index + 1) * size), blank


def _scored(chunks: list[Tensor], plan: _Plan, time: float) -> Roll:
    x0 = torch.cat(chunks, 1)[:, -plan.clip :]
    total = sum(chunk.shape[1] for chunk in chunks)
    size = chunks[0].shape[1]
    age = torch.arange(total - plan.clip, total, device=x0.device) // size
    return Roll(
        x0, plan.cond.frames(total - plan.clip, total), real=plan.real, age=age, time=time, first=chunks[0].detach()
    )
