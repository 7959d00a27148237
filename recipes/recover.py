"""Recover after K: the student learns to find back from a past that went wrong (as Avatar-Forever does, by plain flow
matching, https://arxiv.org/abs/2210.02747).

A true chunk, spoiled, is remembered; K chunks of the student's own follow, without gradient; then the true next chunk
is noised to a random time and

    L = mean (v - (eps - x0))^2        v the student's under that past

No critic and no teacher take part. It makes its own short rollout from the batch's clip, whatever the stage's is.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from distill.contracts import Roles, Roll, Term
from student.history import History
from student.promise import Cache
from student.stream import denoise_chunk, remember_chunk
from teacher.flow import add_noise, sample_time, velocity


@dataclass(frozen=True)
class Config:
    chunks: int = 2  # K, of the student's own
    spoiled: History = field(default_factory=lambda: History("random", 0.3))  # how the true chunk before them is
    shift: float = 2.0  # of the times
    low: float = 0.0
    high: float = 1.0

    def __post_init__(self):
        if self.chunks < 2:
            raise ValueError("chunks must be at least 2: after one there is little to recover from")
        if self.spoiled.kind == "matched":
            raise ValueError("spoiled.kind must be clean, fixed or random")
        if not 0 <= self.low < self.high <= 1 or self.shift <= 0:
            raise ValueError("times need 0 <= low < high <= 1 and a shift above 0")


def term(roll: Roll, roles: Roles, cfg: Config) -> Term:
    """Flow-matching loss of the student on the true chunk after its own ones."""
    student, stream, clip = roles.causal("student"), roles.stream, roll.data()
    size, x0 = stream.chunk_frames, clip.latents
    assert x0 is not None
    chunks = x0.shape[1] // size
    if stream.history.kind == "matched":
        raise ValueError("recover asks at any time, a matched history has been written for the student's steps alone.")
    if chunks < cfg.chunks + 2:
        raise ValueError(f"recover.chunks {cfg.chunks} needs clips of {cfg.chunks + 2} chunks, the data has {chunks}.")
    # Where the true chunk stands in the clip, alike in all processes.
    begin = int(torch.randint(chunks - cfg.chunks - 1, (), generator=roles.generator("recover/begin", shared=True)))
    noise = roles.rows("recover/noise")
    cache: Cache = student.start(clip.cond)
    with torch.no_grad():
        for index in range(begin, begin + cfg.chunks + 1):
            told, real = clip.cond.frames(index * size, (index + 1) * size), x0[:, index * size : (index + 1) * size]
            history = stream.history
            if index > begin:
                real = denoise_chunk(student, told, cache, stream.steps, torch.zeros_like(real), noise)
            else:
                history = cfg.spoiled
            cache = remember_chunk(student, real, told, cache, history, noise)
    index = begin + cfg.chunks + 1
    true = x0[:, index * size : (index + 1) * size]
    t = sample_time((len(true),), cfg.shift, roles.rows("recover/time"), cfg.low, cfg.high).to(true.device)
    eps = roles.noise(true, "recover/noise of the aim")
    told = clip.cond.frames(index * size, (index + 1) * size)
    v = student.velocity(add_noise(true, eps, t), t, told, cache)
    return Term((v - velocity(true, eps)).square().mean())
