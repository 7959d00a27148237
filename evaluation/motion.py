"""How much the character moves, relative to the data, in each of its three states.

Dynamics of a track = its standard deviation over the frames of one state. Which tracks count: head position and
roll in every state, the mouth too while speaking. Silent mouths stand still and blinks are rare events, so neither
says anything about stiffness. Each track is weighted by the data's own dynamics, so that all count alike; then a
ratio of sums over clips. The data's dynamics are the mean over the draws of it that are given: idle motion is a matter
of chance. generated tracks, tracks of each draw, state [N, F] -> ratio as influence values [N]; 1 = as lively as the
data.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from evaluation.geometry import Tracks
from evaluation.statistics import masked_std, ratio_of_sums

STATES = {"silence": 0, "speak": 1, "listen": 2}
RELEVANT = {
    "silence": ("head_x", "head_y", "roll"),
    "speak": ("mouth", "head_x", "head_y", "roll"),
    "listen": ("head_x", "head_y", "roll"),
}
LEAST_FRAMES = 12  # a shorter stretch of a state has no dynamics to speak of


def motion_ratios(tracks: Tracks, data: Sequence[Tracks], state: Tensor) -> dict[str, Tensor]:
    """-> {"motion_ratio", "motion_speak", "motion_listen", "motion_silence"}, each [N]; `state` [N, F] int."""
    moved, expected = {}, {}
    for name, code in STATES.items():
        moved[name], expected[name] = state_dynamics(tracks, data, state == code, RELEVANT[name])
    ratios = {f"motion_{name}": ratio_of_sums(moved[name], expected[name]) for name in STATES}
    overall_moved = torch.stack(list(moved.values())).nanmean(0)
    overall_expected = torch.stack(list(expected.values())).nanmean(0)
    return {"motion_ratio": ratio_of_sums(overall_moved, overall_expected), **ratios}


def state_dynamics(
    tracks: Tracks, data: Sequence[Tracks], mask: Tensor, names: tuple[str, ...]
) -> tuple[Tensor, Tensor]:
    """-> dynamics of the clips and of the data [N], [N], in units of the data's mean; NaN where the state is absent."""
    moved, expected = [], []
    for name in names:
        ours = masked_std(getattr(tracks, name).double(), mask, least=LEAST_FRAMES)
        draws = [masked_std(getattr(draw, name).double(), mask, least=LEAST_FRAMES) for draw in data]
        theirs = torch.stack(draws).mean(0)
        unit = theirs.nanmean()
        if not unit > 0:  # no clip in this state (NaN), or the data itself stands still
            ours, theirs, unit = ours * math.nan, theirs * math.nan, torch.ones_like(unit)
        moved.append(ours / unit)
        expected.append(theirs / unit)
    return torch.stack(moved).nanmean(0), torch.stack(expected).nanmean(0)


def spread(tracks: Tracks, mask: Tensor) -> Tensor:
    """Mean standard deviation of the head's tracks over the frames of `mask` [N, F] -> [N], for curves over time."""
    return torch.stack([masked_std(getattr(tracks, name).double(), mask) for name in RELEVANT["silence"]]).mean(0)
