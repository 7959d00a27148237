"""How fast an Online LPM streams, for how long, in how much memory; and how it compares with the teacher.

One session is driven through simulated turns (speech, listening, silence) up to the longest horizon, and read off at
all of them. Growth is told from the machine's moods in two ways: medians over many chunks of CPU time, and a young
session that takes turns with the old one at the end. model, references, recordings -> plain numbers for latency.json
"""

from __future__ import annotations

import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import psutil
import torch
from torch import Tensor

from student.hearing import border
from student.online import OnlineLPM
from student.session import Session
from teacher.audio import SAMPLE_RATE
from teacher.conditions import Conditions
from teacher.dit import DiT

HORIZONS = {"10 s": 10.0, "1 min": 60.0, "10 min": 600.0, "1 h": 3600.0}
WARM = 8  # chunks before anything is counted: by then the window of the cache is full
PAIRED = 60  # chunks of the old and of the young session that take turns
GROWTH = 0.02
BLOCK = 320  # samples of a live source, 20 ms
Sample = Callable[[Conditions, torch.Generator], Tensor]  # the teacher: conditions of a clip -> latents


@dataclass
class Track:
    """One entry per chunk: seconds by the clock, seconds of CPU, resident bytes; `index` is the chunk's number."""

    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    resident: list[int] = field(default_factory=list)

    def add(self, wall: float, cpu: float) -> None:
        self.wall.append(wall)
        self.cpu.append(cpu)
        self.resident.append(psutil.Process().memory_info().rss)


def turns(recordings: Sequence[tuple[str, Tensor]], size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Simulated conversation without end: (role, wave) in turn, a second of silence after each, in pieces of `size`."""
    silence = torch.zeros(SAMPLE_RATE)
    waiting = torch.zeros(2, 0)
    for role, wave in itertools.cycle(recordings):
        said = torch.cat([wave, silence])
        waiting = torch.cat([waiting, torch.stack([said, 0 * said] if role == "speak" else [0 * said, said])], 1)
        while waiting.shape[1] >= size:
            yield waiting[0, :size], waiting[1, :size]
            waiting = waiting[:, size:]


def step(session: Session, audio: Iterator[tuple[Tensor, Tensor]], track: Track) -> None:
    """One chunk more, pushing what it needs."""
    while not session.ready:
        speak, listen = next(audio)
        session.push(speak=speak, listen=listen)
    wall, cpu = time.perf_counter(), time.process_time()
    session.next_chunk()
    track.add(time.perf_counter() - wall, time.process_time() - cpu)


def read_off(track: Track, chunk_seconds: float) -> dict[str, dict[str, float]]:
    """{horizon: figures} for every horizon that the track reaches, and for its end."""
    reached = {
        name: round(s / chunk_seconds) for name, s in HORIZONS.items() if round(s / chunk_seconds) <= len(track.wall)
    }
    if len(track.wall) not in reached.values():
        reached[f"{len(track.wall) * chunk_seconds:g} s"] = len(track.wall)
    found = {}
    for name, count in reached.items():
        wall = sorted(track.wall[:count])
        found[name] = {
            "chunks": count,
            "p50_s": quantile(wall, 0.50),
            "p95_s": quantile(wall, 0.95),
            "p99_s": quantile(wall, 0.99),
            "cpu_p50_s": statistics.median(track.cpu[:count]),
            "cpu_p95_s": quantile(sorted(track.cpu[:count]), 0.95),
            "real_time_factor": sum(wall) / (count * chunk_seconds),
            "peak_memory_mib": max(track.resident[:count]) / 2**20,
        }
    return found


def quantile(ordered: Sequence[float], q: float) -> float:
    """The smallest value that at least the fraction q does not exceed (nearest rank)."""
    return ordered[max(0, min(len(ordered) - 1, -int(-q * len(ordered) // 1) - 1))]


def growth(track: Track) -> dict[str, float]:
    """Late against early: median of the last tenth over that of the first (after the start), minus 1."""
    n = max(1, (len(track.cpu) - WARM) // 10)
    early, late = slice(WARM, WARM + n), slice(len(track.cpu) - n, None)
    parts: dict[str, Sequence[float]] = {"cpu": track.cpu, "memory": track.resident}
    return {name: statistics.median(x[late]) / statistics.median(x[early]) - 1 for name, x in parts.items()}


def against_young(old: Session, young: Session, audio: Iterator[tuple[Tensor, Tensor]]) -> float:
    """CPU time per chunk of a session that has run long over that of a new one, minus 1: median over pairs of
    neighbors, which the load of the machine meets alike."""
    ages = (Track(), Track())
    for _ in range(WARM):
        step(young, audio, Track())
    for _ in range(PAIRED):
        for session, track in zip((old, young), ages, strict=True):
            step(session, audio, track)
    return statistics.median(a / b for a, b in zip(ages[0].cpu, ages[1].cpu, strict=True)) - 1


def first_frames(
    model: OnlineLPM, references: Tensor, text: str, wave: Tensor, trials: int = 5, later: int = 4
) -> list[dict[str, Any]]:
    """New sessions that hear live audio, 20 ms at a time: seconds from the first sample to the first frame, the compute
    in it, and that of `later` chunks to come, against which it is held: a machine that has waited for audio computes
    slower than a busy one. The session is opened before, as a server does while the line is being set up."""
    size, found = model.backbone.stream.chunk_frames, []
    wave = wave.repeat(-(-border((1 + later) * size) // len(wave)))
    for seed in range(trials + 1):  # the first one warms the process up
        session = model.stream(references, text, seed=seed, look_ahead=0)
        began, seconds = time.perf_counter(), []
        for index in range(1 + later):
            start, stop = border(index * size), border((index + 1) * size)
            for at in range(start, stop, BLOCK):
                end = min(at + BLOCK, stop)
                time.sleep(max(0.0, began + end / SAMPLE_RATE - time.perf_counter()))
                session.push(speak=wave[at:end])
            chunk = session.next_chunk()
            assert chunk is not None
            seconds.append(chunk.compute_seconds)
            if index == 0:
                first = time.perf_counter() - began
        found.append({"first_frame_s": first, "compute_s": seconds[0], "later_s": seconds[1:]})
    return found[1:]


@dataclass
class Count:
    """Passes through a network, and the tokens that went through them."""

    calls: int = 0
    tokens: int = 0


@contextmanager
def counted(*networks: DiT) -> Iterator[Count]:
    """Count what enters these networks, whatever leaves them: a pass may make a picture, keys and values, or both."""
    count = Count()

    def note(_: Any, given: tuple[Tensor]) -> None:
        count.calls += 1
        count.tokens += given[0].shape[:-1].numel()  # [..., P]

    hooks = [network.patch_embedding.register_forward_pre_hook(note) for network in networks]
    try:
        yield count
    finally:
        for hook in hooks:
            hook.remove()


def compare(
    model: OnlineLPM, references: Tensor, text: str, teacher: DiT, sample: Sample, cond: Conditions,
    audio: Iterator[tuple[Tensor, Tensor]], rounds: int = 3,
) -> dict[str, Any]:  # fmt: skip
    """Student and teacher take turns at the same seconds of video, decoded frames included; medians of `rounds`.

    cond: one clip for the teacher. Evaluations are counted, not asserted, by the latent frames that pass: a chunk that
    makes its keys and values in one call with another chunk's step has been evaluated; "writes" are these evaluations.
    """
    stream, frames = model.backbone.stream, cond.num_frames
    session = model.stream(references, text, look_ahead=0)
    ours, theirs, generator = Track(), Track(), torch.Generator().manual_seed(0)
    for _ in range(WARM):
        step(session, audio, Track())
    for _ in range(rounds):
        with counted(*(net.dit for net in model.networks().values())) as made:
            clip = Track()
            for _ in range(frames // stream.chunk_frames):
                step(session, audio, clip)
        ours.add(sum(clip.wall), sum(clip.cpu))
        with counted(teacher) as needed:
            wall, cpu = time.perf_counter(), time.process_time()
            model.pictures(sample(cond, generator))
            theirs.add(time.perf_counter() - wall, time.process_time() - cpu)
    references_seen = cond.refs.shape[1]  # encoded once per clip
    seconds = frames / stream.chunk_frames * session.chunk_seconds
    tokens = frames * math.prod(teacher.token_grid(cond.refs))
    passes = made.tokens / tokens  # of every latent frame
    steps, full = len(stream.steps), needed.tokens / tokens - references_seen / frames
    return {
        "video_seconds": seconds,
        "student": {"evaluations": steps, "with_writes": passes, "calls": made.calls, **_costs(ours, seconds)},
        "teacher": {"evaluations": full, "calls": needed.calls - 1, **_costs(theirs, seconds)},
        "evaluations_ratio": full / steps,
        "evaluations_ratio_with_writes": full / passes,
        "calls_ratio": (needed.calls - 1) / made.calls,
        "time_ratio": statistics.median(theirs.wall) / statistics.median(ours.wall),
        "cpu_ratio": statistics.median(theirs.cpu) / statistics.median(ours.cpu),
    }


def _costs(track: Track, seconds: float) -> dict[str, float]:
    return {
        "seconds_per_video_second": statistics.median(track.wall) / seconds,
        "cpu_per_video_second": statistics.median(track.cpu) / seconds,
    }
