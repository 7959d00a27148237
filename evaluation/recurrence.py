"""Measures of drift over the returns of one utterance: who it is, how it moves, how it follows, what it repeats.

Every curve has one value per character and return, [N, R]. Means over characters are statistics of the drawing of
characters, so they come with intervals that resample characters. A window is one part of a return (silence, speak,
listen); a return's value is the mean over its parts.
Windows (kept), Layout, Heard, Anchor -> Measured
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from evaluation.bootstrap import slope_per_minute
from evaluation.judge import face_distance
from evaluation.motion import RELEVANT, STATES
from evaluation.residual import without_confounds
from evaluation.statistics import ratio_of_sums
from evaluation.survival import Lifetimes, time_to_failure
from evaluation.sync import follow, open_unasked
from evaluation.windows import HALF, TRACKS, Anchor, Windows

CONFOUNDS = ("head_x", "head_y", "roll", "mouth", "blink")
COPIES = 0.01  # of the data's own frames that count as copies, by the choice of the distance


@dataclass(frozen=True)
class Layout:
    """Where windows lie. parts: name -> frames within A; minutes [R, P] of their middles; horizon in minutes; clip:
    video frames of what a teacher samples at once."""

    parts: Mapping[str, slice]
    minutes: Tensor
    horizon: float
    clip: int = 48

    @property
    def returns(self) -> Tensor:
        """Minute of each return [R]."""
        return self.minutes.mean(1)

    def within(self, first: float, last: float) -> Tensor:
        """Which returns lie between two minutes [R] bool."""
        return (self.returns >= first) & (self.returns < last)


@dataclass(frozen=True)
class Truth:
    """What rows are judged by: driven mouth and nod [N, A], references, the data's own windows, and the distances
    beyond which the geometry and the judge take somebody for a stranger."""

    driven_mouth: Tensor
    driven_nod: Tensor
    anchor: Anchor
    data: Windows
    limits: Mapping[str, float]


@dataclass(frozen=True)
class Measured:
    """curves [N, R] by name; lives by "identity" and "judge"."""

    curves: dict[str, Tensor]
    lives: dict[str, Lifetimes]

    def slope(self, name: str, minutes: Tensor) -> Tensor:
        """Per character and minute [N]."""
        return slope_per_minute(minutes, self.curves[name])


def measure_row(windows: Windows, layout: Layout, truth: Truth) -> Measured:
    """All measures of one row; a row may have fewer returns than the data."""
    count = windows.identity.shape[1]
    distance = {
        "identity": identity_windows(windows.identity, truth.anchor.identity, layout),
        "judge": face_windows(windows.face, truth.anchor.face, layout),
    }
    curves = {name: values.mean(2) for name, values in distance.items()}
    curves["residual"] = residual_curve(windows, truth.anchor, layout)
    curves |= {f"motion_{state}": curve for state, curve in motion_curves(windows, truth.data, layout).items()}
    curves |= follow_curves(windows, truth, layout)
    curves["unasked"] = unasked_curve(windows, truth)
    curves["copy"] = (windows.nearest < copy_distance(truth.data)).double().mean(2)
    color = windows.color.double()
    curves["color"] = (color - color[:, :1]).square().mean(-1).sqrt().mean(2) * 255
    unit = truth.data.sharpness.double().mean()
    curves["sharpness"] = windows.sharpness.double().mean(2) / unit
    curves["seam"] = pooled(windows.border.double().mean(2), windows.inner.double().mean(2))
    minutes = layout.minutes[:count].flatten()
    lives = {}
    if len(minutes) >= 3 and count == len(layout.minutes):
        lives = {
            name: time_to_failure(minutes, values.flatten(1), truth.limits[name], layout.horizon)
            for name, values in distance.items()
        }
    return Measured(curves, lives)


def identity_windows(identity: Tensor, anchor: Tensor, layout: Layout) -> Tensor:
    """identity [N, R, C, D] per half second, anchor [N, D] -> distance of each window's mean identity [N, R, P]."""
    gaps = [identity[:, :, halves(part)].double().mean(2) - anchor[:, None].double() for part in layout.parts.values()]
    return torch.stack([gap.square().mean(-1).sqrt() for gap in gaps], 2)


def face_windows(face: Tensor, anchor: Tensor, layout: Layout) -> Tensor:
    """The same for the judge: face [N, R, C, E], anchor [N, E] -> 1 - cosine [N, R, P]."""
    return torch.stack(
        [face_distance(face[:, :, halves(part)].double().mean(2), anchor[:, None]) for part in layout.parts.values()], 2
    )


def residual_curve(windows: Windows, anchor: Anchor, layout: Layout) -> Tensor:
    """Identity distance [N, R] once what pose, mouth and lids explain is removed."""
    tracks = windows.tracks.unflatten(2, (-1, HALF)).mean(3)  # [N, R, C, 8]
    confounds = tracks[..., [TRACKS.index(name) for name in CONFOUNDS]]
    rest = without_confounds(windows.identity, confounds, layout.returns[: tracks.shape[1]])
    return identity_windows(rest, anchor.identity, layout).mean(2)


def motion_curves(windows: Windows, data: Windows, layout: Layout) -> dict[str, Tensor]:
    """{state: motion relative to the data's in that state} [N, R], ratios of sums over characters: standard deviation
    of the tracks that count in it, each in units of the data's mean over all returns. Taken over pieces of a teacher's
    clip: its row joins clips, and the jump from one to the next is no motion."""
    out = {}
    for state in STATES:
        ours, theirs = [], []
        for name in RELEVANT[state]:
            at = TRACKS.index(name)
            a, b = (liveliness(w.tracks[:, :, layout.parts[state], at], layout.clip) for w in (windows, data))
            ours.append(a / b.mean())
            theirs.append(b / b.mean())
        usual = torch.stack(theirs).mean(0).mean(1, keepdim=True)  # [N, 1]
        out[state] = pooled(torch.stack(ours).mean(0), usual)
    return out


def liveliness(track: Tensor, piece: int) -> Tensor:
    """track [N, R, F] -> mean over its whole pieces of the standard deviation within each [N, R]."""
    piece = min(piece, track.shape[2])
    whole = track[:, :, : track.shape[2] // piece * piece].double().unflatten(2, (-1, piece))
    return whole.std(3, correction=0).mean(2)


def follow_curves(windows: Windows, truth: Truth, layout: Layout) -> dict[str, Tensor]:
    """Lip sync (correlation) [N, R], and how late the mouth and the nod follow in ms, read from the mean over
    characters and spread over them as influence values [N, R]."""
    made: dict[str, list[Tensor]] = {"sync": [], "mouth_delay": [], "nod": [], "nod_delay": []}
    pairs = (("speak", "mouth", truth.driven_mouth, "sync", "mouth_delay"),
             ("listen", "head_y", truth.driven_nod, "nod", "nod_delay"))  # fmt: skip
    for state, track, driven, corr, delay in pairs:
        part = layout.parts[state]
        there = torch.ones(len(driven), part.stop - part.start, dtype=torch.bool)
        for index in range(windows.tracks.shape[1]):
            found = follow(windows.tracks[:, index, part, TRACKS.index(track)], driven[:, part], there)
            made[corr].append(found.corr)
            still = found.corr.nansum() == 0  # what never moves is neither early nor late
            made[delay].append(torch.where(still, math.nan, found.lag_ms))
    return {name: torch.stack(values, 1) for name, values in made.items()}


def unasked_curve(windows: Windows, truth: Truth) -> Tensor:
    """Share of frames far from speech whose mouth is open [N, R], spread over characters as influence values."""
    mouth = windows.tracks[..., TRACKS.index("mouth")]
    return torch.stack([open_unasked(one, truth.driven_mouth) for one in mouth.unbind(1)], 1)


def copy_distance(data: Windows) -> float:
    """The distance to the nearest reference or sink frame that only COPIES of the data's own frames fall below."""
    return data.nearest.flatten().double().quantile(COPIES).item()


def pooled(numerator: Tensor, denominator: Tensor) -> Tensor:
    """[N, R], [N, R] or [N, 1] -> influence values [N, R] of the ratio of sums of each return."""
    wide = denominator.expand_as(numerator)
    return torch.stack([ratio_of_sums(a, b) for a, b in zip(numerator.T, wide.T, strict=True)], 1)


def halves(part: slice) -> slice:
    """Frames within A -> half seconds within A."""
    return slice(part.start // HALF, part.stop // HALF)


def over(curve: Tensor, returns: Tensor) -> Tensor:
    """curve [N, R], returns [R] bool -> mean of each character over them [N], NaN where there is none."""
    chosen = curve[:, returns[: curve.shape[1]]]
    return chosen.nanmean(1) if chosen.shape[1] else torch.full((len(curve),), math.nan, dtype=torch.float64)
