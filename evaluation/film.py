"""An mp4 that is written piece by piece: pictures and sound go in as they come, memory stays the same at any length.

h264 + AAC through PyAV; a film appears under its name when it is whole, and not at all when writing fails.
frames uint8 [F, 3, H, W], wave [S] float32 mono 16 kHz  ->  file or buffer
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import IO

import av
import numpy as np
import torch
from torch import Tensor

from evaluation.sync import FPS

SAMPLE_RATE = 16000
BLOCK = 16000  # samples that go to the encoder at once


class Film:
    """An open film. Sound starts with the first picture; `close` fills the shorter of the two up."""

    def __init__(self, target: str | IO[bytes], height: int, width: int):
        """height and width are cut to even numbers: yuv420p halves both."""
        self.height, self.width = height // 2 * 2, width // 2 * 2
        self.num_frames = self.num_samples = 0
        self._container = av.open(target, "w", format="mp4")
        self._video = self._container.add_stream("libx264", rate=FPS, options={"crf": "20", "preset": "veryfast"})
        self._video.width, self._video.height, self._video.pix_fmt = self.width, self.height, "yuv420p"
        self._audio = self._container.add_stream("aac", rate=SAMPLE_RATE, layout="mono")

    def show(self, frames: Tensor) -> None:
        """Add pictures, uint8 [F, 3, H, W]."""
        for picture in frames[:, :, : self.height, : self.width].permute(0, 2, 3, 1).contiguous().numpy():
            self._container.mux(self._video.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        self.num_frames += len(frames)

    def sound(self, wave: Tensor) -> None:
        """Add sound, [S] float."""
        for block in wave.detach().float().cpu().clamp(-1, 1).split(BLOCK):
            if len(block):
                heard = av.AudioFrame.from_ndarray(block.numpy()[None].astype(np.float32), format="fltp", layout="mono")
                heard.sample_rate, heard.pts = SAMPLE_RATE, self.num_samples
                heard.time_base = Fraction(1, SAMPLE_RATE)
                self._container.mux(self._audio.encode(heard))
                self.num_samples += len(block)

    def close(self) -> None:
        """Silence up to the end of the picture, then the rest of both streams."""
        missing = round(self.num_frames * SAMPLE_RATE / FPS) - self.num_samples
        self.sound(torch.zeros(max(0, missing)))
        for stream in (self._video, self._audio):
            self._container.mux(stream.encode())
        self._container.close()

    def abandon(self) -> None:
        """Let go of the file without an end."""
        self._container.close()


@contextmanager
def open_film(path: Path, height: int, width: int) -> Iterator[Film]:
    """A film that becomes `path` when the block ends well; otherwise nothing is left."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".part")
    film = Film(str(temporary), height, width)
    try:
        yield film
        film.close()
    except BaseException:
        try:
            film.abandon()
        finally:
            temporary.unlink(missing_ok=True)
        raise
    temporary.replace(path)
