"""What the page's meters show, measured cheaply beside the stream.

Drift: the distance 1 - cosine between the current pictures and the character's references, seen through the small
frozen identity embedder that comes with the model (teacher/embedder.py); it overlooks mouth, blink and pose. `natural`
is the distance that two clips of one real character have: below it, the character is as like as can be.
Load: seconds of computing per second of video, over the latest chunks. Memory: resident size of the server, MiB.

frames uint8 [F, H, W, 3], references [R, 3, H, W] in [0, 1] -> float
"""

from __future__ import annotations

from collections import deque

import numpy as np
import psutil
import torch
from torch import Tensor
from torch.nn import functional

from teacher.codec import Codec
from teacher.embedder import IdentityEmbedder

RECENT = 10  # chunks behind the real-time factor


class IdentityMeter:
    """How far a character's pictures are from its references."""

    def __init__(self, codec: Codec, embedder: IdentityEmbedder, references: Tensor) -> None:
        self.codec, self.embedder = codec, embedder
        latents = codec.encode_image(references)[None]  # [1, R, C, H/8, W/8]
        self.anchor = self._direction(latents)
        self.natural = 1.0 - embedder.natural

    @torch.no_grad()
    def distance(self, frames: np.ndarray) -> float:
        """1 - cosine of the chunk's mean identity to the references', from 0 (the same) to 2."""
        video = torch.from_numpy(frames).permute(0, 3, 1, 2)[None].float() / 255  # [1, F, 3, H, W]
        return 1.0 - float(self._direction(self.codec.encode(video.to(self.anchor.device))) @ self.anchor)

    @torch.no_grad()
    def _direction(self, latents: Tensor) -> Tensor:
        return functional.normalize(self.embedder(latents)[0].mean(0), dim=0)  # [E]


class Load:
    """Computing time per second of video over the latest chunks: below 1 is faster than real time."""

    def __init__(self) -> None:
        self.recent: deque[tuple[float, float]] = deque(maxlen=RECENT)

    def add(self, compute_seconds: float, seconds: float) -> float:
        self.recent.append((compute_seconds, seconds))
        return sum(spent for spent, _ in self.recent) / sum(length for _, length in self.recent)


def memory_mib() -> float:
    """Resident memory of this process."""
    return psutil.Process().memory_info().rss / 2**20
