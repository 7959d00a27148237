"""Audio files of any kind, piece by piece: whatever PyAV decodes, mixed to mono 16 kHz.

path -> waves [S] float32 in [-1, 1]; ValueError, in one sentence, where there is no sound to be had.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from pathlib import Path

import av
import torch
from torch import Tensor

SAMPLE_RATE = 16000


def read_audio(path: Path | str) -> Iterator[Tensor]:
    """The pieces of a file in their order, a few hundred milliseconds at most each; together the whole."""
    found = False
    try:
        with av.open(str(path)) as container:
            if not container.streams.audio:
                raise ValueError(f"{path} has no sound: give a file with an audio track.")
            resampler = av.AudioResampler(format="fltp", rate=SAMPLE_RATE)
            for frame in chain(container.decode(audio=0), (None,)):  # None: what the resampler still holds
                for piece in resampler.resample(frame):
                    # The mean of the channels; ffmpeg's own mix makes a voice in the middle 3 dB louder.
                    wave = torch.from_numpy(piece.to_ndarray()).mean(0)
                    found = found or len(wave) > 0
                    yield wave
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror or error}.") from None
    except av.FFmpegError as error:
        raise ValueError(f"{path} cannot be read as audio ({error.strerror}).") from None
    if not found:
        raise ValueError(f"{path} holds no audio: it is empty.")


def seconds_of(path: Path | str) -> float | None:
    """How long a file says it is; None when it does not say or cannot be read."""
    try:
        with av.open(str(path)) as container:
            return container.duration / 1_000_000 if container.duration else None  # AV_TIME_BASE
    except (OSError, av.FFmpegError):
        return None
