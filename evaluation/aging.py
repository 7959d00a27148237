"""Does a stream get slower or larger with age? One session of a single character, at chunk 100 and at chunk 10,000.

Time is told from the machine's moods by pairs: when the old session is at its age, a young one has come to chunk 100,
and the two take turns. Memory is the most that was resident up to each age, before the young session exists.
model, references, audio -> numbers for drift.json
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator

from torch import Tensor

from evaluation.latency import Track, step
from student.online import OnlineLPM

YOUNG, OLD, PAIRS = 100, 10_000, 100
Audio = Iterator[tuple[Tensor, Tensor]]


def age(
    model: OnlineLPM,
    references: Tensor,
    text: str,
    audio: Audio,
    over: Callable[[range], Iterator[int]],
    young: int = YOUNG,
    old: int = OLD,
    pairs: int = PAIRS,
) -> dict[str, float]:
    """{"chunk_seconds_100", "chunk_seconds_10000", "peak_mb_100", "peak_mb_10000", ...}: medians by the clock and in
    CPU seconds of `pairs` chunks around each age; `over` shows progress. Ages may be lower to try it."""
    session, track = model.stream(references, text, look_ahead=0), Track()
    for _ in over(range(old - pairs // 2)):
        step(session, audio, track)
    other, unseen = model.stream(references, text, seed=1, look_ahead=0), Track()
    for _ in range(young - pairs // 2):
        step(other, audio, unseen)
    ages = {OLD: Track(), YOUNG: Track()}
    for _ in range(pairs):
        step(session, audio, ages[OLD])
        step(other, audio, ages[YOUNG])
    out: dict[str, float] = {"chunks": float(old), "young_chunks": float(young)}
    for name, one in ages.items():
        out[f"chunk_seconds_{name}"] = statistics.median(one.wall)
        out[f"chunk_cpu_seconds_{name}"] = statistics.median(one.cpu)
    out[f"peak_mb_{YOUNG}"] = max(track.resident[:young]) / 2**20
    out[f"peak_mb_{OLD}"] = max(track.resident) / 2**20
    both = zip(ages[OLD].cpu, ages[YOUNG].cpu, strict=True)
    return {**out, "cpu_growth": statistics.median(a / b for a, b in both) - 1}
