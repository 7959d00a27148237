"""Frechet distance between the motion of generated clips and of the data's.

d^2 = |m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)) (Heusel et al. 2017), computed by torchmetrics, on motion features of
one-second windows that overlap by half, in units of the data's spread. Whether a face moves as faces here do, not only
as much: levels, spreads, speeds, and how the mouth and the nod go with the sound.
tracks, data tracks, driven [N, F] -> influence values [N] (jackknife over clips; windows of a clip stay together).
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance

from evaluation.geometry import Tracks
from evaluation.statistics import jackknife

WINDOW, STRIDE = 24, 12  # frames: one second, and overlapping halves for more samples from few clips
MOVING = ("mouth", "head_x", "head_y", "roll")  # level, spread and speed of these
RESTING = ("gaze_x", "blink", "smile", "brow")  # level and spread of these
FLOOR = 0.05  # least spread of a feature, so that one which hardly varies in the data cannot rule the distance


class AsTheyAre(nn.Module):
    """The feature extractor for samples that are features already; torchmetrics asks only for `num_features`."""

    def __init__(self, num_features: int):
        super().__init__()
        self.num_features = num_features

    def forward(self, features: Tensor) -> Tensor:
        return features


def frechet_motion(tracks: Tracks, data: Tracks, driven_mouth: Tensor, driven_nod: Tensor) -> Tensor:
    """-> squared Frechet distance as influence values [N]; exactly 0 when `tracks` are the data's own."""
    ours = motion_features(tracks, driven_mouth, driven_nod)  # [N, windows, features]
    theirs = motion_features(data, driven_mouth, driven_nod)
    center, unit = theirs.mean((0, 1)), theirs.std((0, 1)).clamp(min=FLOOR)
    ours, theirs = (ours - center) / unit, (theirs - center) / unit
    every = torch.arange(len(ours))
    return jackknife(
        lambda clips: frechet_distance(ours[clips].flatten(0, 1), theirs[clips].flatten(0, 1)), every, len(ours)
    )


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """a [n, D], b [m, D] -> squared Frechet distance of the Gaussians with their means and covariances."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torchmetrics warns about the size of a buffer that this metric does not keep
        # What one of several processes scores is its own: the others may not be there to gather from.
        metric = FrechetInceptionDistance(feature=AsTheyAre(a.shape[1]), sync_on_compute=False).set_dtype(torch.float64)
    metric.update(a.double(), real=False)
    metric.update(b.double(), real=True)
    return max(metric.compute().item(), 0.0)


def motion_features(tracks: Tracks, driven_mouth: Tensor, driven_nod: Tensor) -> Tensor:
    """-> [N, windows, 22]: what the motion of each one-second window is like."""
    features = []
    for name in MOVING:
        x = windows(getattr(tracks, name))
        features += [x.mean(-1), x.std(-1), x.diff(dim=-1).abs().mean(-1)]
    for name in RESTING:
        x = windows(getattr(tracks, name))
        features += [x.mean(-1), x.std(-1)]
    for name, driven in (("mouth", driven_mouth), ("head_y", driven_nod)):
        x, y = windows(getattr(tracks, name)), windows(driven)
        covariance = ((x - x.mean(-1, keepdim=True)) * (y - y.mean(-1, keepdim=True))).mean(-1)
        features.append(covariance.sign() * covariance.abs().sqrt())  # in the units of a spread, like the others
    return torch.stack(features, dim=-1)


def windows(track: Tensor) -> Tensor:
    """track [N, F] -> [N, windows, WINDOW]"""
    return track.double().unfold(1, min(WINDOW, track.shape[1]), STRIDE)
