"""All metrics of one row of the table, and the file that holds the rows.

`score` compares generated clips with the truth for the same characters and the same audio. Sync, nod, identity and
text are judged against what drew the clip, exactly; motion, sharpness and Frechet distance against the data as the
codec shows it, which every model's output has passed as well. The row "data" is another draw of the data (same
characters and audio, other idle motion) through the codec: what a perfect model would score. `write_scores` puts the
rows, the paired differences between them and the timings into scores.json.
frames [N, F, 3, H, W] in [0, 1], Truth -> {metric: per-clip values [N]} -> {metric: {"mean", "se"}}.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from evaluation.compare import significance
from evaluation.frechet import frechet_motion
from evaluation.geometry import Tracks, classify, measure
from evaluation.identity import identity_distance, identity_top1, stills_identity
from evaluation.motion import STATES, motion_ratios
from evaluation.quality import seam_ratio, sharpness_ratio
from evaluation.statistics import mean_se
from evaluation.sync import follow, open_unasked

Values = dict[str, Tensor]  # metric -> one value per clip [N]


@dataclass(frozen=True)
class Truth:
    """The clips to be matched, and what drew them."""

    frames: Tensor  # [N, F, 3, H, W] float in [0, 1], through the codec: like is compared with like
    references: Tensor  # [N, R, 3, H, W] float in [0, 1], as drawn
    reference_mask: Tensor  # [N, R] bool
    state: Tensor  # [N, F] int: 0 silence, 1 speak, 2 listen
    driven_mouth: Tensor  # [N, F] what the speak audio drives
    driven_nod: Tensor  # [N, F] what the listen audio drives
    labels: Tensor  # [N, 3] int: expression, gaze, pose
    character: Tensor  # [N] int


def score(frames: Tensor, truth: Truth, data: Sequence[Tracks] = ()) -> Values:
    """frames [N, F, 3, H, W] -> every metric that clips can show; drift and costs are added by whoever ran the model.

    `data` = measure(truth.frames), for callers that score many rows against one truth; behind it, tracks of other draws
    of the same clips, where there are any: motion is held against the mean of all.
    """
    tracks = measure(frames)
    data = data or [measure(truth.frames)]
    anchor = stills_identity(truth.references, truth.reference_mask)  # [N, D]
    sync = follow(tracks.mouth, truth.driven_mouth, truth.state == STATES["speak"])
    nod = follow(tracks.head_y, truth.driven_nod, truth.state == STATES["listen"])
    right = (classify(tracks) == truth.labels).double()  # [N, 3]
    return {
        "sync_corr": sync.corr,
        "sync_lag_ms": sync.lag_ms,
        "mouth_amplitude": sync.amplitude,
        "mouth_unasked": open_unasked(tracks.mouth, asked(truth.driven_mouth, truth.state)),
        "identity_distance": identity_distance(tracks.identity, anchor),
        "identity_top1": identity_top1(tracks.identity, anchor, truth.character),
        "text_accuracy": right.mean(1),
        "text_all_right": right.prod(1),
        "nod_corr": nod.corr,
        "nod_delay_ms": nod.lag_ms,
        **motion_ratios(tracks, data, truth.state),
        "seam_ratio": seam_ratio(frames),
        "sharpness_ratio": sharpness_ratio(frames, truth.frames),
        "frechet_motion": frechet_motion(tracks, data[0], truth.driven_mouth, truth.driven_nod),
    }


def asked(driven: Tensor, state: Tensor) -> Tensor:
    """driven mouth, state [N, F] -> the opening that is asked for [N, F]: any, in a clip that speaks by its state while
    nothing is known of its drive, as in real video."""
    unknown = (state == STATES["speak"]).any(1) & (driven.amax(1) <= 0)
    return driven.masked_fill(unknown[:, None], 1.0)


def summarize(values: Values) -> dict[str, dict[str, float]]:
    """{metric: [N]} -> {metric: {"mean", "se"}}"""
    return {name: mean_se(vector) for name, vector in values.items()}


def write_scores(
    path: Path, rows: Mapping[str, Values], timings: Mapping[str, float], about: Mapping[str, Any]
) -> dict:
    """Write scores.json: one object per row, `significance`, `timings` in seconds, `about`; returns what it holds.

    `rows` in the order of the table. Numbers that do not exist (a lag of a frozen mouth) become null.
    """
    scores = {
        **{name: summarize(values) for name, values in rows.items()},
        "significance": significance(rows),
        "timings": dict(timings),
        "about": dict(about),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_with(path, json.dumps(without_nan(scores), indent=1).encode())
    return without_nan(scores)


def save_values(path: Path, values: Values) -> None:
    """Keep the per-clip values of a row (safetensors), so that a later report can compare without generating again."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".part")
    save_file({name: vector.double().contiguous() for name, vector in values.items()}, str(temporary))
    os.replace(temporary, path)


def load_values(path: Path) -> Values:
    """Read what `save_values` wrote."""
    return load_file(str(path))


def replace_with(path: Path, content: bytes) -> None:
    """Write `content` beside `path`, then put it in its place: a reader never sees half a file."""
    temporary = path.with_name(path.name + ".part")
    temporary.write_bytes(content)
    os.replace(temporary, path)


def without_nan(thing: Any) -> Any:
    """Nested dicts and lists with every non-finite float turned into None: JSON knows no NaN."""
    if isinstance(thing, Mapping):
        return {key: without_nan(value) for key, value in thing.items()}
    if isinstance(thing, (list, tuple)):
        return [without_nan(value) for value in thing]
    return None if isinstance(thing, float) and not math.isfinite(thing) else thing
