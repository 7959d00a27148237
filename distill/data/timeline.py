"""Who talks when: states laid out over video frames, and utterances placed under them.

A timeline starts PAST_FRAMES (1.5 s) before the clip's first frame, so that a clip can begin in the middle of a
sentence or just after one. plan -> segments; lay -> waves speak, listen [S] float32 at 16 kHz and state [F] uint8.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from distill.data.speech import Utterance
from teacher.audio import SAMPLE_RATE
from teacher.codec import STRIDE
from teacher.conditions import PAST

FPS = 24
PAST_FRAMES = PAST * STRIDE[0]  # video frames of past, 36
SILENCE, SPEAK, LISTEN = 0, 1, 2
KINDS = ("speak", "listen", "silence", "switching")
_STATE = {"silence": SILENCE, "speak": SPEAK, "listen": LISTEN}
_FADE = 160  # samples, 10 ms: a cut sentence must not click


@dataclass(frozen=True)
class Segment:
    state: int
    start: int  # video frames on the timeline, the past included
    stop: int


def sample_at(frame: int) -> int:
    """First audio sample of a video frame; 16000 / 24 is not an integer, so it is rounded here and nowhere else."""
    return frame * SAMPLE_RATE // FPS


def plan(kind: str, frames: int, generator: torch.Generator) -> list[Segment]:
    """Segments of a clip of `frames` frames of one of `KINDS`, its past included.

    Three in ten clips enter their state in the past or exactly at the first frame (streams start from silence);
    a switching clip changes once inside, at least 10 frames away from either end.
    """
    total = PAST_FRAMES + frames
    if kind == "switching":
        before = _integer(0, 3, generator)
        after = (before + _integer(1, 3, generator)) % 3
        change = PAST_FRAMES + _integer(min(10, frames // 3), max(frames - 10, frames // 3 + 1), generator)
        return [Segment(before, 0, change), Segment(after, change, total)]
    state = _STATE[kind]
    chance = torch.rand((), generator=generator).item()
    if chance > 0.3:
        return [Segment(state, 0, total)]
    change = PAST_FRAMES if chance < 0.12 else _integer(6, PAST_FRAMES, generator)
    before = SILENCE if state != SILENCE else _integer(1, 3, generator)
    return [Segment(before, 0, change), Segment(state, change, total)]


def plan_stream(kind: str, frames: int, generator: torch.Generator) -> list[Segment]:
    """Segments of a long stream: one state throughout, or for "mix" turns of 3-6 s with pauses of about a second.

    The past is silent: a stream starts from nothing.
    """
    total = PAST_FRAMES + frames
    if kind in _STATE:
        return [Segment(SILENCE, 0, PAST_FRAMES), Segment(_STATE[kind], PAST_FRAMES, total)]
    segments, at, state = [Segment(SILENCE, 0, PAST_FRAMES)], PAST_FRAMES, _integer(1, 3, generator)
    while at < total:
        for what, length in ((state, _integer(3 * FPS, 6 * FPS, generator)), (SILENCE, _integer(12, 36, generator))):
            segments.append(Segment(what, at, min(at + length, total)))
            at = min(at + length, total)
        state = SPEAK + LISTEN - state
    return [segment for segment in segments if segment.start < segment.stop]


def lay(
    segments: list[Segment], utterances: dict[int, list[Utterance]], generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """Waves speak, listen [S] of the whole timeline and state [F] of the clip (past cut off), F = frames - PAST_FRAMES.

    `utterances` maps SPEAK and LISTEN to what may be said. Level varies by +-2 dB per segment.
    """
    total = segments[-1].stop
    waves = {state: torch.zeros(sample_at(total)) for state in (SPEAK, LISTEN)}
    track = torch.zeros(total, dtype=torch.uint8)
    for segment in segments:
        track[segment.start : segment.stop] = segment.state
        if segment.state != SILENCE:
            start, stop = sample_at(segment.start), sample_at(segment.stop)
            wave = _talk(utterances[segment.state], stop - start, segment.start == 0, generator)
            decibel = 4 * torch.rand((), generator=generator).item() - 2
            waves[segment.state][start:stop] = (wave * 10 ** (decibel / 20)).clamp(-1, 1)
    return waves[SPEAK], waves[LISTEN], track[PAST_FRAMES:]


def _talk(utterances: list[Utterance], samples: int, midway: bool, generator: torch.Generator) -> Tensor:
    """[samples] of sentences in random order with short pauses; `midway` enters the first one at a random place."""
    order = torch.randperm(len(utterances), generator=generator).tolist()
    parts, filled, i = [], 0, 0
    while filled < samples:
        wave = utterances[order[i % len(order)]].wave
        if midway and i == 0:
            wave = wave[_integer(0, wave.numel() * 3 // 4, generator) :].clone()
            wave[:_FADE] *= torch.linspace(0, 1, _FADE)
        pause = torch.zeros(_integer(SAMPLE_RATE // 8, SAMPLE_RATE * 9 // 20, generator))
        parts += [wave, pause]
        filled += wave.numel() + pause.numel()
        i += 1
    result = torch.cat(parts)[:samples]
    result[-_FADE:] *= torch.linspace(1, 0, _FADE)
    return result


def _integer(low: int, high: int, generator: torch.Generator) -> int:
    """Uniform in [low, high)."""
    return int(torch.randint(low, high, (), generator=generator).item())
