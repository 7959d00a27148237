"""How well, and how promptly, a measured track follows the one that the audio drives.

Lip sync: mouth opening against the mouth that the *speak* audio drives, over speaking frames. Listening reaction:
vertical head position against the nod that the *listen* audio drives, over listening frames. Mouth unasked: open in
frames far from anything to say, which no correlation over speaking frames sees. Correlation is
Pearson's at lag zero, so being late costs; the lag is the peak of the cross-correlation. measured [N, F], driven
[N, F], mask [N, F] bool -> per-clip vectors [N].
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import max_pool1d

from evaluation.statistics import jackknife, masked_std, ratio_of_sums

FPS = 24
MAX_LAG = 10  # frames, 417 ms: beyond that a mouth reads as another sentence's
LEAST_FRAMES = 18  # 0.75 s: a shorter stretch says little about correlation
LEAST_DRIVE = 0.02  # spread of the driven track under which there is nothing to follow
NOTHING_TO_SAY = 0.05  # driven mouth opening below which the audio asks for none
AROUND = 6  # frames, 250 ms, before and after: an early or late mouth is a matter of lag
OPEN = 0.2  # of a full opening; the widest mouth of the data far from speech has 0.1


@dataclass(frozen=True)
class Following:
    """Per-clip vectors [N]; `corr` at lag zero, `lag_ms` positive when the track is late, `amplitude` ratio."""

    corr: Tensor
    lag_ms: Tensor
    amplitude: Tensor


def follow(measured: Tensor, driven: Tensor, mask: Tensor, max_lag: int = MAX_LAG) -> Following:
    """Judge `measured` [N, F] against `driven` [N, F] on the frames of `mask` [N, F].

    A clip applies when its drive moves. A measured track that stands still there scores correlation 0, not NaN: a
    frozen face must not be left out of the mean.
    """
    measured, driven = measured.double(), driven.double()
    spread = masked_std(driven, mask, least=LEAST_FRAMES)
    applies = spread > LEAST_DRIVE  # NaN compares false
    curves = cross_correlation(measured, driven, mask, max_lag)  # [N, 2 max_lag + 1]
    nan = torch.full_like(spread, math.nan)
    corr = torch.where(applies, curves[:, max_lag], nan)
    answer = masked_std(measured, mask)
    # The lag is read from the clips' mean curve: the peak of one two-second clip is often an accident of its sway.
    clips = applies.nonzero()[:, 0]
    lag = jackknife(lambda chosen: peak(curves[chosen].mean(0), max_lag), clips, num_clips=len(applies))
    amplitude = ratio_of_sums(torch.where(applies, answer, nan), torch.where(applies, spread, nan))
    return Following(corr=corr, lag_ms=lag * 1000.0 / FPS, amplitude=amplitude)


def open_unasked(measured: Tensor, driven: Tensor) -> Tensor:
    """measured, driven mouth [N, F] -> share of the frames far from speech whose mouth is open, influence values [N].

    Far from speech: the drive asks for no opening within AROUND frames of F. NaN where no clip has such a frame.
    """
    near = max_pool1d(driven.double()[:, None], 2 * AROUND + 1, stride=1, padding=AROUND)[:, 0] > NOTHING_TO_SAY
    opened = (measured > OPEN) & ~near
    return ratio_of_sums(opened.sum(1), (~near).sum(1))


def cross_correlation(measured: Tensor, driven: Tensor, mask: Tensor, max_lag: int) -> Tensor:
    """-> [N, 2 max_lag + 1]: Pearson of measured[t + lag] with driven[t], over the frames where both are in `mask`."""
    num_frames = measured.shape[1]
    columns = []
    for lag in range(-max_lag, max_lag + 1):
        late, early = slice(max(lag, 0), num_frames + min(lag, 0)), slice(max(-lag, 0), num_frames - max(lag, 0))
        columns.append(pearson(measured[:, late], driven[:, early], mask[:, late] & mask[:, early]))
    return torch.stack(columns, dim=1)


def pearson(a: Tensor, b: Tensor, mask: Tensor) -> Tensor:
    """a, b, mask [N, F] -> Pearson correlation over the masked frames [N], 0 where one of the two stands still."""
    weight = mask.double() / mask.sum(1, keepdim=True).clamp(min=1)
    a = a - (a * weight).sum(1, keepdim=True)
    b = b - (b * weight).sum(1, keepdim=True)
    scale = ((a * a * weight).sum(1) * (b * b * weight).sum(1)).sqrt()
    return torch.where(scale > 1e-9, (a * b * weight).sum(1) / scale.clamp(min=1e-9), torch.zeros_like(scale))


def peak(curve: Tensor, max_lag: int) -> float:
    """curve [2 max_lag + 1] -> lag of its maximum in frames, refined by the parabola through its neighbors."""
    at = int(curve.argmax())
    if at in (0, 2 * max_lag):
        return float(at - max_lag)
    left, top, right = curve[at - 1].item(), curve[at].item(), curve[at + 1].item()
    bend = left - 2 * top + right
    return at - max_lag + (0.5 * (left - right) / bend if bend < 0 else 0.0)
