"""The columns of the table of scores and its rows: names, units, and which way is better.

`error` turns any mean into "distance from ideal", so that better always means smaller.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

ROWS = ("data", "teacher", "teacher_few_step", "undistilled", "stage1", "stage2", "stage3", "stage4", "online_lpm")
STAGES = ("stage1", "stage2", "stage3", "stage4")


@dataclass(frozen=True)
class Metric:
    """One column. `better` is the direction, or the value ("one", "zero") that is best; `digits` after the point;
    `matters` is the least difference that anybody would notice, however certain it is."""

    key: str
    label: str
    better: Literal["higher", "lower", "one", "zero"]
    digits: int
    matters: float
    meaning: str = ""

    def show(self, value: float) -> str:
        """The number with this metric's digits, a true minus sign, and no minus before zero."""
        text = f"{value:.{self.digits}f}"
        return text.lstrip("-") if float(text) == 0 else text.replace("-", "\u2212")

    def error(self, mean: float) -> float:
        """Distance from ideal: smaller is better, whatever the metric."""
        return {"higher": -mean, "lower": mean, "one": abs(mean - 1.0), "zero": abs(mean)}[self.better]

    def errors(self, values: Tensor) -> Tensor:
        """Per-clip values [N] -> per-clip contributions [N] to `error`, linear around the mean: pairs compare."""
        if self.better in ("higher", "lower"):
            return -values if self.better == "higher" else values
        ideal = 1.0 if self.better == "one" else 0.0
        return (values - ideal) * (values.nanmean() - ideal).sign()


METRICS = (
    Metric("sync_corr", "lip sync", "higher", 3, 0.005, "correlation of the mouth with the speech that drives it"),
    Metric("sync_lag_ms", "lip lag, ms", "zero", 0, 5.0, "positive: the mouth is late"),
    Metric("mouth_amplitude", "mouth range", "one", 2, 0.02, "measured over driven mouth opening"),
    Metric("mouth_unasked", "mouth unasked", "lower", 3, 0.005, "frames far from speech whose mouth is open"),
    Metric(
        "identity_distance", "identity distance", "lower", 3, 0.005, "to the own references; characters differ by 1"
    ),
    Metric("identity_top1", "identity top-1", "higher", 3, 0.01, "clips nearest to their own character"),
    Metric("text_accuracy", "text", "higher", 3, 0.01, "expression, gaze and pose as the caption says"),
    Metric("nod_corr", "nod", "higher", 3, 0.005, "correlation of the head with the nod that speech drives"),
    Metric("nod_delay_ms", "nod delay, ms", "zero", 0, 10.0, "against the true reaction; positive: late"),
    Metric("motion_ratio", "motion", "one", 2, 0.02, "dynamics relative to the data, all states"),
    Metric("motion_speak", "… speaking", "one", 2, 0.02, "dynamics of head and mouth relative to the data"),
    Metric("motion_listen", "… listening", "one", 2, 0.02, "dynamics of the head relative to the data"),
    Metric("motion_silence", "… silent", "one", 2, 0.02, "dynamics of the head relative to the data"),
    Metric("frechet_motion", "Fréchet motion", "lower", 2, 0.1, "distance of motion features to the data's"),
    Metric("sharpness_ratio", "sharpness", "one", 2, 0.01, "gradient energy relative to the data"),
    Metric("seam_ratio", "seams", "one", 2, 0.02, "jump at chunk borders over jump at other latent-frame borders"),
    Metric("drift_slope_per_min", "drift per min", "zero", 3, 0.01, "slope of the identity distance over a stream"),
    Metric("evaluations_per_chunk", "evaluations", "lower", 0, 1.0, "network evaluations per chunk of half a second"),
    Metric("seconds_per_video_second", "s per video s", "lower", 2, 0.05, "compute per second of video, this machine"),
)
MINUTES = (  # of `make drift`, over its whole stream unless said; one value per streamed character
    Metric("identity_slope_per_min", "identity slope / min", "lower", 4, 0.0005, "in the exact geometry"),
    Metric("judge_slope_per_min", "judge slope / min", "lower", 4, 0.0005, "of an embedder that no loss has seen"),
    Metric("identity_last_minute", "identity, last min.", "lower", 3, 0.005, "distance in the exact geometry"),
    Metric("judge_last_minute", "judge, last min.", "lower", 4, 0.0005, "by an embedder that no loss has seen"),
    Metric("minutes_speak", "motion over minutes, speaking", "one", 2, 0.02, "over the data's"),
    Metric("minutes_listen", "motion over minutes, listening", "one", 2, 0.02, "over the data's"),
    Metric("minutes_silence", "motion over minutes, silent", "one", 2, 0.02, "over the data's"),
    Metric("minutes_sync", "sync over minutes", "higher", 3, 0.005, "correlation of mouth and speech"),
    Metric("minutes_unasked", "mouth unasked over minutes", "lower", 3, 0.005, "frames far from speech, mouth open"),
    Metric("minutes_copy", "copies", "lower", 3, 0.01, "frames that repeat a reference or the first chunk"),
)
BY_KEY = {metric.key: metric for metric in (*METRICS, *MINUTES)}
COSTS = ("evaluations_per_chunk", "seconds_per_video_second")  # what a row costs, not how good it is
GROUPS = {  # what the aim "better in motion, fidelity and Frechet distance" is measured by
    "motion": ("motion_ratio",),
    "fidelity": ("identity_distance", "sharpness_ratio"),
    "Fréchet distance": ("frechet_motion",),
}
