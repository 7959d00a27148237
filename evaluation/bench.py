"""Generate what is measured: clips and long streams of teacher and student, for the same characters and audio.

Every generator takes conditions of N clips and returns latents on the CPU with the seconds they took; noise is keyed by
row and batch, so any row can be made again alone.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from evaluation.sync import FPS
from student.causal_dit import CausalDiT
from student.stream import stream
from teacher.codec import STRIDE, PCACodec
from teacher.conditions import Conditions
from teacher.dit import DiT
from teacher.flow import schedule
from teacher.guidance import Guidance, guided_velocity
from teacher.sampler import SAMPLERS

LATENT_FPS = FPS / STRIDE[0]


@dataclass(frozen=True)
class BenchConfig:
    """How the rows of the table are made."""

    teacher_steps: int = 50
    sampler: str = "euler"  # or heun
    shift: float = 3.0
    text: float = 1.0  # guidance of the teacher: of text it costs motion in silence (docs/LOG.md)
    audio: float = 1.5
    batch_size: int = 16
    clips: int = 64
    stream_seconds: float = 60.0
    stream_characters: int = 8
    teacher_stream_seconds: float = 20.0  # clip after clip: the teacher does not stream
    seed: int = 1234

    def __post_init__(self):
        if min(self.teacher_steps, self.batch_size, self.clips, self.stream_characters) < 1:
            raise ValueError("teacher_steps, batch_size, clips and stream_characters must be at least 1")

        if self.sampler not in SAMPLERS:
            raise ValueError(f"sampler {self.sampler!r} must be one of {', '.join(SAMPLERS)}")

    @property
    def guidance(self) -> Guidance:
        return Guidance(self.text, self.audio)


Generate = Callable[[Conditions, torch.Generator], Tensor]  # conditions of some clips -> latents [B, T, C, H, W]


def teacher_sampler(teacher: DiT, config: BenchConfig, steps: int, channels: int) -> Generate:
    """The guided sampler with `steps` steps."""

    @torch.no_grad()
    def generate(cond: Conditions, generator: torch.Generator) -> Tensor:
        shape = (len(cond.refs), cond.num_frames, channels, *cond.refs.shape[-2:])
        noise = torch.randn(shape, generator=generator)
        refs = teacher.encode_refs(cond)
        times = schedule(steps, config.shift)
        sample = SAMPLERS[config.sampler]
        return sample(lambda x, t: guided_velocity(teacher, x, t, cond, config.guidance, refs), noise, times)[-1]

    return generate


def student_sampler(backbone: CausalDiT, refiner: CausalDiT | None) -> Generate:
    """Chunk by chunk, with the refiner for the last step if there is one."""

    def generate(cond: Conditions, generator: torch.Generator) -> Tensor:
        return torch.cat(list(stream(backbone, refiner, cond, generator)), 1)

    return generate


def make_clips(generate: Generate, cond: Conditions, config: BenchConfig, seed: int = 0) -> tuple[Tensor, float]:
    """All clips of `cond`, in batches -> (latents [N, T, C, H, W], seconds per second of video)."""
    parts, began = [], time.perf_counter()
    for start in range(0, len(cond.refs), config.batch_size):
        generator = torch.Generator().manual_seed(config.seed + start + 100_000 * seed)
        parts.append(generate(cond.select(slice(start, start + config.batch_size)), generator))
    seconds = time.perf_counter() - began
    latents = torch.cat(parts)
    return latents, seconds / (len(latents) * latents.shape[1] / LATENT_FPS)


@torch.no_grad()
def decode(codec: PCACodec, latents: Tensor, batch_size: int = 8) -> Tensor:
    """Latents [N, T, C, H, W] -> frames float [N, F, 3, S, S]."""
    return torch.cat([codec.decode(part) for part in latents.split(batch_size)])


@torch.no_grad()
def student_stream(
    backbone: CausalDiT, refiner: CausalDiT | None, codec: PCACodec, cond: Conditions, config: BenchConfig
) -> Tensor:
    """A long stream of all characters of `cond` -> uint8 frames [N, F, 3, S, S]."""
    generator = torch.Generator().manual_seed(config.seed)
    chunks = stream(backbone, refiner, cond, generator)
    return torch.cat([(codec.decode(chunk) * 255).round().to(torch.uint8) for chunk in chunks], 1)


def teacher_stream(generate: Generate, codec: PCACodec, cond: Conditions, config: BenchConfig, clip: int) -> Tensor:
    """What the teacher has instead of a stream: clips of `clip` latent frames, one after the other."""
    starts = range(0, cond.num_frames - clip + 1, clip)
    pieces = [cond.frames(start, start + clip) for start in starts]
    rows = [make_clips(generate, piece, config, k)[0] for k, piece in enumerate(pieces)]
    return torch.cat([(decode(codec, row) * 255).round().to(torch.uint8) for row in rows], 1)
