"""Audio as it arrives -> the features of one chunk after the other, the same numbers as `log_mel` of the whole wave.

Kept of the past is what the next chunk needs and nothing more: the features that its networks look back on, and the
samples that its first windows reach back to (between 1000 and 1666: windows repeat with period 1000). Immutable, so
that a chunk can be prepared ahead and thrown away again.

samples [2, S] (speak, listen) at 16 kHz  ->  features [2, 8 * (PAST + K), M]
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from teacher.audio import ENDS, MEL_RATE, PERIOD, SAMPLE_RATE, log_mel
from teacher.conditions import AUDIO_PER_LATENT, PAST, SILENCE

LATENT_RATE = MEL_RATE / AUDIO_PER_LATENT  # latent frames per second
LOUD = 0.01  # root mean square of a chunk that holds speech; a quiet room is below 0.003


def border(latent_frames: int) -> int:
    """The sample at which the features of that many latent frames are complete."""
    return -(-latent_frames * AUDIO_PER_LATENT * PERIOD // len(ENDS))


def whole_frames(heard: Heard, samples: int) -> int:
    """Latent frames that are complete once so many samples follow those heard."""
    return (border(heard.frames) + samples) * len(ENDS) // (AUDIO_PER_LATENT * PERIOD) - heard.frames


@dataclass(frozen=True)
class Heard:
    """What is kept of everything heard in `frames` latent frames so far."""

    features: Tensor  # [2, 8 * PAST, M]
    samples: Tensor  # [2, 1000 ... 1666], up to the border
    frames: int = 0

    @classmethod
    def nothing(cls, mels: int) -> Heard:
        """Before the first sample: silence."""
        return cls(torch.full((2, AUDIO_PER_LATENT * PAST, mels), SILENCE), torch.zeros(2, PERIOD))

    def missing(self, frames: int) -> int:
        """Samples that `frames` more latent frames need."""
        return border(self.frames + frames) - border(self.frames)

    def listen(self, samples: Tensor, frames: int) -> tuple[Tensor, Heard]:
        """`frames` more latent frames, samples [2, missing(frames)] -> their features with the past in front, and what
        is kept for the next."""
        wave = torch.cat([self.samples, samples], 1)
        known = self.frames * AUDIO_PER_LATENT % len(ENDS) + len(ENDS)  # features of the kept samples, made before
        features = torch.cat([self.features, log_mel(wave)[:, known:]], 1)
        total = self.frames + frames
        start = total * AUDIO_PER_LATENT // len(ENDS) * PERIOD - PERIOD  # where the samples for the next begin
        kept = wave[:, wave.shape[1] - (border(total) - start) :].clone()  # a view would hold on to the chunk
        return features, Heard(features[:, -AUDIO_PER_LATENT * PAST :].clone(), kept, total)


class Waiting:
    """Samples [2, S] that were pushed and not yet played, in the pieces they came in: nothing is copied twice."""

    def __init__(self) -> None:
        self._pieces: deque[Tensor] = deque()
        self.length = 0

    def push(self, samples: Tensor) -> None:
        self._pieces.append(samples)
        self.length += samples.shape[1]

    def look(self, start: int, stop: int) -> Tensor:
        """A copy of samples [start, stop)."""
        found, at = [torch.zeros(2, 0)], 0
        for piece in self._pieces:
            if at >= stop:
                break
            found.append(piece[:, max(start - at, 0) : stop - at])
            at += piece.shape[1]
        return torch.cat(found, 1)

    def drop(self, count: int) -> None:
        """Forget the first `count` samples."""
        self.length -= count
        while self._pieces and count >= self._pieces[0].shape[1]:
            count -= self._pieces.popleft().shape[1]
        if count:
            self._pieces[0] = self._pieces[0][:, count:]


def state_of(samples: Tensor) -> str:
    """Who is heard in samples [2, S]: "speak", "listen" or "silence"; who speaks is not said to listen."""
    for name, wave in zip(("speak", "listen"), samples, strict=True):
        if wave.square().mean().sqrt() > LOUD:
            return name
    return "silence"


def paired(speak: Any, listen: Any) -> Tensor:
    """One or both waves [S], float at 16 kHz, tensor or array -> samples [2, S], clipped to [-1, 1]; a missing one
    (None) is silence.

    ValueError when a wave is not that, or the two differ in length.
    """
    waves = {name: torch.as_tensor(w) for name, w in (("speak", speak), ("listen", listen)) if w is not None}
    for name, wave in waves.items():
        if wave.ndim != 1 or not wave.is_floating_point():
            raise ValueError(
                f"The audio '{name}' must be one channel of float samples [S] at {SAMPLE_RATE} Hz, it is "
                f"{str(wave.dtype).removeprefix('torch.')} {list(wave.shape)}."
            )
        if not torch.isfinite(wave).all():
            raise ValueError(f"The audio '{name}' holds samples that are not finite.")
    if not waves:
        raise ValueError("push needs speak or listen audio.")
    lengths = [len(wave) for wave in waves.values()]
    if len(set(lengths)) > 1:
        raise ValueError(f"speak and listen must have one length, they have {lengths[0]} and {lengths[1]} samples.")
    silence = torch.zeros(lengths[0])
    pair = torch.stack([waves.get(name, silence).detach().cpu().float() for name in ("speak", "listen")])
    return pair.clamp(-1, 1)  # louder is no sound, and its power would overflow
