"""Does the character stay who it is over a long stream?

Unit = character. Identity distance to its reference images per time window, and its slope per minute by least squares:
the target is a slope indistinguishable from zero. Beside it, over the same windows, the two ways of cheating: standing
still (motion) and a creeping color. Content of the windows differs, so feed every row the same audio and characters.
frames [N, F, 3, H, W] (uint8 or float in [0, 1]) -> Drift, curves [N, W] over windows of `seconds`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from evaluation.geometry import measure
from evaluation.identity import identity_distance, stills_identity
from evaluation.motion import spread
from evaluation.quality import mean_color
from evaluation.statistics import mean_se
from evaluation.sync import FPS


@dataclass(frozen=True)
class Drift:
    """minutes [W] (middle of each window); distance, motion, color [N, W]; slope [N] of distance per minute.

    color = root mean square distance of the mean color to the first window's, in 1/255.
    """

    minutes: Tensor
    distance: Tensor
    motion: Tensor
    color: Tensor
    slope: Tensor

    def values(self) -> dict[str, Tensor]:
        """Per-character vectors for the table of scores."""
        return {
            "drift_slope_per_min": self.slope,
            "identity_first": self.distance[:, 0],
            "identity_last": self.distance[:, -1],
            "color_drift": self.color[:, -1],
        }

    def curve(self, what: str) -> dict[str, list[float]]:
        """`what` = distance | motion | color -> {"minutes", "mean", "se"} for the report, as lists."""
        points = [mean_se(column) for column in getattr(self, what).T]
        return {
            "minutes": self.minutes.tolist(),
            "mean": [point["mean"] for point in points],
            "se": [point["se"] for point in points],
        }


def measure_drift(frames: Tensor, references: Tensor, reference_mask: Tensor, seconds: float = 5.0) -> Drift:
    """frames [N, F, 3, H, W], references [N, R, 3, H, W] in [0, 1], reference_mask [N, R] bool -> Drift."""
    length = round(seconds * FPS)
    num_windows = frames.shape[1] // length
    if num_windows < 2:
        raise ValueError(
            f"A stream of {frames.shape[1]} frames has fewer than two windows of {length}; make it longer."
        )
    anchor = stills_identity(references, reference_mask)  # [N, D]
    distance, motion, color = [], [], []
    for w in range(num_windows):  # one window at a time: a minute of float frames for all characters is gigabytes
        piece = as_float(frames[:, w * length : (w + 1) * length])
        tracks = measure(piece)
        distance.append(identity_distance(tracks.identity, anchor))
        motion.append(spread(tracks, torch.ones(piece.shape[:2], dtype=torch.bool)))
        color.append(mean_color(piece).mean(1))  # [N, 3]
    minutes = (torch.arange(num_windows, dtype=torch.float64) + 0.5) * length / FPS / 60
    distances, colors = torch.stack(distance, dim=1), torch.stack(color, dim=1)  # [N, W], [N, W, 3]
    return Drift(
        minutes=minutes,
        distance=distances,
        motion=torch.stack(motion, dim=1),
        color=(colors - colors[:, :1]).square().mean(-1).sqrt() * 255,
        slope=least_squares_slope(minutes, distances),
    )


def least_squares_slope(x: Tensor, y: Tensor) -> Tensor:
    """x [W], y [N, W] -> slope of the line through each row [N]."""
    x = x - x.mean()
    return ((y - y.mean(1, keepdim=True)) * x).sum(1) / x.square().sum()


def as_float(frames: Tensor) -> Tensor:
    """uint8 frames become float in [0, 1]; float frames stay as they are."""
    return frames.float() / 255 if frames.dtype == torch.uint8 else frames
