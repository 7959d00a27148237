"""Motion of the puppet from speech, conversation state and text: the rules that the teacher has to learn.

mouth(i) = sum_j w_j level_speak(i - j), j = 0..2;  nod(i) = tanh(g (fast - slow)) of level_listen, 8 frames late;
level = clip((dB - FLOOR) / RANGE, 0, 1) of the 64 ms of sound that end with the frame: causal, fixed constants.
Waves [S] with 1.5 s of past before frame 0, state [F] (0 silence, 1 speak, 2 listen) -> motion [F, 10], driven {[F]}.
Everything else (sway, blinks, glances) is random, drawn from the generator that is passed in.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from distill.data.puppet import MOTION

Array = NDArray[np.float32]

SAMPLE_RATE, VIDEO_RATE, PAST_SAMPLES, PAST_FRAMES = 16000, 24, 24000, 36
WINDOW = 1024  # samples of sound behind a frame's level, 64 ms
FLOOR_DB, RANGE_DB = -42.0, 31.0  # speech at RMS 0.1 (-20 dB) swings from about -40 to -12 dB from frame to frame
MOUTH_TAPS = (0.30, 0.30, 0.20, 0.12, 0.08)  # current video frame and four past ones: what 4-frame latents can carry
NOD_DELAY, NOD_FAST, NOD_SLOW, NOD_GAIN = 8, 11, 25, 3.6  # frames; the slowest tap is 8 + 24 = 32 frames (1.33 s) back
FADE = 4  # frames over which the amplitudes of a new state fade in

LABELS: dict[str, tuple[str, ...]] = {
    "expression": ("neutral", "happy", "sad", "surprised"),
    "gaze": ("ahead", "left", "right"),
    "pose": ("straight", "tilted left", "tilted right"),
}
EXPRESSIONS = ((0.0, 0.0), (0.75, 0.15), (-0.75, -0.35), (0.0, 0.85))  # (smile, brow)
GAZES = (0.0, -0.75, 0.75)
POSES = (0.0, -0.60, 0.60)
SWAY = {  # amplitude of the idle sway by state: silence, speak, listen
    "head_x": (0.42, 0.26, 0.22),
    "head_y": (0.34, 0.16, 0.08),
    "roll": (0.22, 0.16, 0.12),
    "brow": (0.10, 0.12, 0.06),
    "smile": (0.06, 0.08, 0.08),
}
BLINK = (0.35, 0.90, 1.00, 0.85, 0.50, 0.20)

_EXPRESSION_WORDS = (
    ("neutral", "calm", "relaxed"),
    ("happy", "cheerful", "smiling"),
    ("sad", "unhappy", "gloomy"),
    ("surprised", "astonished", "amazed"),
)
_GAZE_WORDS = (
    ("looking ahead", "looking forward", "facing the viewer"),
    ("glancing left", "eyes toward the left", "looking left"),
    ("glancing right", "eyes toward the right", "looking right"),
)
_POSE_WORDS = (
    ("head straight", "head upright", "head level"),
    ("head tilted left", "head leaning left", "a left tilt"),
    ("head tilted right", "head leaning right", "a right tilt"),
)
_FORMS = ("a {e} person, {g}, {p}", "{e} character with {p}, {g}", "someone {e}, {p}, {g}", "{g}, {p}, {e} face")


@dataclass(frozen=True)
class Attributes:
    """What a caption says: indices into LABELS."""

    expression: int
    gaze: int
    pose: int


def sample_attributes(generator: np.random.Generator) -> Attributes:
    """Attributes drawn uniformly and independently."""
    expression, gaze, pose = (int(generator.integers(len(names))) for names in LABELS.values())
    return Attributes(expression, gaze, pose)


def caption(attributes: Attributes, generator: np.random.Generator) -> str:
    """One of the phrasings (at most 11 words) of these attributes."""

    def pick(options: tuple[str, ...]) -> str:
        return options[int(generator.integers(len(options)))]

    return pick(_FORMS).format(
        e=pick(_EXPRESSION_WORDS[attributes.expression]),
        g=pick(_GAZE_WORDS[attributes.gaze]),
        p=pick(_POSE_WORDS[attributes.pose]),
    )


def _windows(wave: Array, frames: int) -> Array:
    """The sound behind each video frame, past frames included: [PAST_FRAMES + F, WINDOW]."""
    ends = np.round(np.arange(1, PAST_FRAMES + frames + 1) * SAMPLE_RATE / VIDEO_RATE).astype(np.int64)
    need = int(ends[-1])
    padded = np.zeros(WINDOW + need, dtype=np.float32)
    padded[WINDOW : WINDOW + min(need, len(wave))] = wave[:need]
    return padded[ends[:, None] + np.arange(WINDOW)[None, :]]


def level(wave: Array, frames: int) -> Array:
    """Loudness in [0, 1] of each frame's sound, past included: [PAST_FRAMES + F]."""
    power = np.mean(_windows(wave, frames) ** 2, axis=1)
    decibels = 10.0 * np.log10(power + 1e-9)
    return np.clip((decibels - FLOOR_DB) / RANGE_DB, 0.0, 1.0).astype(np.float32)


def _balance(wave: Array, frames: int) -> Array:
    """High (above 1.5 kHz) against low (below 900 Hz) band energy in [-1, 1]: [PAST_FRAMES + F]."""
    taper = np.hanning(WINDOW).astype(np.float32)
    spectrum = np.abs(np.fft.rfft(_windows(wave, frames) * taper, axis=1)) ** 2
    hertz = np.fft.rfftfreq(WINDOW, 1.0 / SAMPLE_RATE)
    low = spectrum[:, (hertz > 80) & (hertz < 900)].sum(axis=1)
    high = spectrum[:, (hertz > 1500) & (hertz < 5000)].sum(axis=1)
    return np.tanh((np.log10(high + 1e-4) - np.log10(low + 1e-4) + 0.9) / 0.8).astype(np.float32)


def _filter(signal: Array, taps: Array, delay: int = 0) -> Array:
    """Causal filter of a signal that carries the past, returned for the clip's own frames: [F]."""
    start = len(taps) - 1 + delay
    padded = np.concatenate([np.zeros(start, dtype=np.float32), signal])  # before the past: silence
    full = np.convolve(padded, taps)[start - delay : start - delay + len(signal)]
    return full[PAST_FRAMES:].astype(np.float32)


def _hann(length: int) -> Array:
    taps = np.hanning(length + 2)[1:-1]
    return (taps / taps.sum()).astype(np.float32)


def mouth(speak: Array, frames: int) -> tuple[Array, Array]:
    """Opening [F] in [0, 1] and width [F] in [-1, 1] from the spoken wave."""
    loud = level(speak, frames)
    taps = np.array(MOUTH_TAPS, dtype=np.float32)
    wide = _filter(_balance(speak, frames) * np.minimum(1.0, 3.0 * loud), taps)
    return np.clip(1.2 * _filter(loud, taps) - 0.08, 0.0, 1.0) ** 1.2, np.clip(1.2 * wide, -1.0, 1.0)


def nod(listen: Array, frames: int) -> Array:
    """Vertical head response [F] in [-1, 1] (+ is down) to the heard wave."""
    loud = level(listen, frames)
    slow = np.full(NOD_SLOW, 1.0 / NOD_SLOW, dtype=np.float32)
    change = _filter(loud, _hann(NOD_FAST), NOD_DELAY) - _filter(loud, slow, NOD_DELAY)
    return np.tanh(NOD_GAIN * change).astype(np.float32)


def _waves(frames: int, generator: np.random.Generator) -> Array:
    """Smooth random curve [F] of unit amplitude: three sines between 0.3 and 0.6 Hz."""
    time = np.arange(frames) / VIDEO_RATE
    hertz = generator.uniform(0.3, 0.6, size=3)
    phase = generator.uniform(0.0, 2.0 * np.pi, size=3)
    return (np.sin(2.0 * np.pi * np.outer(time, hertz) + phase) @ np.array([0.5, 0.3, 0.2])).astype(np.float32)


def _blinks(frames: int, generator: np.random.Generator) -> Array:
    """Lid closure [F]: a blink every 2 to 4 s."""
    curve = np.zeros(frames + len(BLINK), dtype=np.float32)
    at = int(generator.uniform(0.0, 3.0) * VIDEO_RATE)
    while at < frames:
        curve[at : at + len(BLINK)] = BLINK
        at += int(generator.uniform(2.0, 4.0) * VIDEO_RATE)
    return curve[:frames]


def _glances(frames: int, size: float, generator: np.random.Generator) -> Array:
    """Small jumps of the eyes [F], held for 0.5 to 1.5 s each."""
    curve = np.zeros(frames, dtype=np.float32)
    at = 0
    while at < frames:
        hold = int(generator.uniform(0.5, 1.5) * VIDEO_RATE)
        curve[at : at + hold] = generator.uniform(-size, size)
        at += hold
    return np.convolve(np.pad(curve, (2, 0), mode="edge"), np.full(3, 1.0 / 3.0), mode="valid").astype(np.float32)


def drive(
    speak: Array, listen: Array, state: NDArray[np.uint8], attributes: Attributes, generator: np.random.Generator
) -> tuple[Array, dict[str, Array]]:
    """Motion [F, 10] and its purely audio-driven parts {"mouth": [F], "nod": [F]}, any number of frames."""
    frames = len(state)
    onehot = np.eye(3, dtype=np.float32)[state]  # [F, 3]
    padded = np.concatenate([np.repeat(onehot[:1], FADE - 1, axis=0), onehot])
    weight = sum(padded[k : k + frames] for k in range(FADE)) / FADE  # [F, 3] cross-faded states
    opening, wide = mouth(speak, frames)
    heard = nod(listen, frames)
    slow = np.full(12, 1.0 / 12.0, dtype=np.float32)
    stress = _filter(level(speak, frames), _hann(9)) - 0.5 * _filter(level(speak, frames), slow)
    interest = _filter(level(listen, frames), slow, NOD_DELAY)

    smile, brow = EXPRESSIONS[attributes.expression]
    track = {name: np.zeros(frames, dtype=np.float32) for name in MOTION}
    for name, amplitude in SWAY.items():
        track[name] += _waves(frames, generator) * (weight @ np.array(amplitude, dtype=np.float32))
    track["mouth_open"] += opening
    track["mouth_wide"] += wide
    track["head_x"] += 0.35 * stress * (1.0 if generator.random() < 0.5 else -1.0)
    track["head_y"] += 0.92 * heard + 0.30 * stress
    track["roll"] += POSES[attributes.pose] + generator.uniform(-0.08, 0.08)
    track["gaze_x"] += GAZES[attributes.gaze] + _glances(frames, 0.16, generator)
    track["gaze_y"] += _glances(frames, 0.25, generator)
    track["blink"] += _blinks(frames, generator)
    track["smile"] += smile + generator.uniform(-0.08, 0.08) + 0.12 * interest
    track["brow"] += brow + generator.uniform(-0.08, 0.08) + 0.15 * interest
    motion = np.stack([track[name] for name in MOTION], axis=1)
    low = np.array([0.0 if name in ("mouth_open", "blink") else -1.0 for name in MOTION], dtype=np.float32)
    return np.clip(motion, low, 1.0).astype(np.float32), {"mouth": opening, "nod": heard}
