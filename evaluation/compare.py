"""Row against row, on the same clips: what got better, what got worse, by how many standard errors.

`significance(rows)` makes the paired differences that scores.json keeps; `compare_stages(scores)` turns them into one
sentence per stage, with the likely reason where a stage is not better than the one before.
All differences are in "error" (distance from ideal), so negative means the first of the pair is better.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

from torch import Tensor

from evaluation.metrics import BY_KEY, COSTS, METRICS, STAGES, Metric
from evaluation.statistics import paired_difference

AIMS = {  # what each stage is for: (what it does, the metrics it should move)
    "stage1": (
        "teaches the causal network to follow the teacher's trajectories in few steps",
        ("seam_ratio", "motion_ratio"),
    ),
    "stage2": (
        "matches the teacher's distribution on its own latents",
        ("frechet_motion", "sharpness_ratio", "motion_ratio"),
    ),
    "stage3": ("trains on its own long rollouts", ("drift_slope_per_min", "seam_ratio", "frechet_motion")),
    "stage4": ("adds the one-step refiner", ("sharpness_ratio", "identity_distance")),
}
MOST_TOLD = 4  # changes that a sentence gives numbers for
BASELINES = ("undistilled", "teacher_few_step", "teacher")


def pair_name(a: str, b: str) -> str:
    """The key of a pair of rows in `significance`."""
    return f"{a} vs {b}"


def significance(rows: Mapping[str, Mapping[str, Tensor]]) -> dict[str, dict[str, dict[str, float]]]:
    """{row: {metric: [N]}} -> {"a vs b": {metric: {"difference", "se", "z"}}} of the errors; negative: a is better.

    Pairs: online_lpm with each baseline, and every stage with the row before it (stage1 with undistilled).
    """
    stages = ("undistilled", *STAGES)
    wanted = [("online_lpm", name) for name in BASELINES] + [(after, before) for before, after in pairwise(stages)]
    return {pair_name(a, b): compare(rows[a], rows[b]) for a, b in wanted if a in rows and b in rows}


def compare(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> dict[str, dict[str, float]]:
    """Paired difference of the errors of every metric that both rows have."""
    shared = [metric for metric in METRICS if metric.key in a and metric.key in b and metric.key not in COSTS]
    return {m.key: paired_difference(m.errors(a[m.key]), m.errors(b[m.key])) for m in shared}


def compare_stages(scores: Mapping[str, Any]) -> list[str]:
    """What scores.json holds -> one sentence or two per stage: better, worse, and why it may be no better."""
    present = [name for name in ("undistilled", *STAGES) if name in scores]
    return [stage_sentence(scores, name, before) for before, name in pairwise(present)]


def stage_sentence(scores: Mapping[str, Any], name: str, before: str) -> str:
    """One stage against the row before it."""
    differences = scores["significance"][pair_name(name, before)]
    better: list[str] = []
    worse: list[str] = []
    for key, entry in differences.items():
        if entry["z"] is not None and abs(entry["z"]) > 1 and abs(entry["difference"]) >= BY_KEY[key].matters:
            (better if entry["z"] < 0 else worse).append(key)
    better.sort(key=lambda key: differences[key]["z"])
    worse.sort(key=lambda key: -differences[key]["z"])
    gains, losses = (listed(scores, keys, before, name, differences) for keys in (better, worse))
    what, aims = AIMS[name]
    opening = f"{title(name)} {what}. "
    if better and not worse:
        return f"{opening}Better than {title(before)} in {gains}; nothing is worse."
    if better:
        return (
            f"{opening}Better than {title(before)} in {gains}; worse in {losses}. {reason(scores, name, before, worse)}"
        )
    if worse:
        return f"{opening}Not better than {title(before)}: worse in {losses}. {reason(scores, name, before, worse)}"
    same = "every difference is within one standard error or too small to matter"
    return f"{opening}Not better than {title(before)}: {same}. {ceiling(scores, before, aims)}"


def listed(scores: Mapping[str, Any], keys: list[str], before: str, name: str, differences: Mapping[str, Any]) -> str:
    """The surest changes with their numbers; the rest by name, since the table has them."""
    first = [moved(scores, key, before, name, differences) for key in keys[:MOST_TOLD]]
    rest = [plain(BY_KEY[key]) for key in keys[MOST_TOLD:]]
    return ", ".join(first) + (f" (and {', '.join(rest)})" if rest else "")


def moved(scores: Mapping[str, Any], key: str, before: str, name: str, differences: Mapping[str, Any]) -> str:
    """ "seams 1.31 → 1.08 (4.2 se)" """
    metric = BY_KEY[key]
    was, now = scores[before][key]["mean"], scores[name][key]["mean"]
    return f"{plain(metric)} {metric.show(was)} → {metric.show(now)} ({abs(differences[key]['z']):.1f} se)"


def reason(scores: Mapping[str, Any], name: str, before: str, worse: list[str]) -> str:
    """The pattern that the losses fit, as far as the numbers tell; every claim is read from the table."""
    now, was = scores[name], scores[before]

    def rose(key: str) -> bool:
        return bool(key in now and key in was and now[key]["mean"] > was[key]["mean"])

    reasons = []
    stiller = any(key.startswith("motion") for key in worse) and not rose("motion_ratio")
    if stiller and name == "stage1":
        reasons.append("Regression answers with the mean of what could follow, and a mean moves less than a draw.")
    elif stiller:
        gain = was["identity_distance"]["mean"] - now["identity_distance"]["mean"]
        beside = " while the identity distance falls" if gain >= BY_KEY["identity_distance"].matters else ""
        reasons.append(f"Less motion{beside} is the mode-seeking side of distribution matching.")
    if any(key in worse for key in ("motion_ratio", "motion_speak", "mouth_amplitude")) and rose("motion_ratio"):
        reasons.append("Motion beyond the data's is what saturated guidance gives: fewer updates or a lower weight.")
    if "sharpness_ratio" in worse:
        reasons.append(
            "Too much contrast is guidance again." if now["sharpness_ratio"]["mean"] > 1 else "Blur is averaging."
        )
    if any(key in worse for key in ("identity_distance", "drift_slope_per_min")) and name in ("stage2", "stage3"):
        reasons.append("The identity moves away because the student now stands on its own frames, errors included.")
    return " ".join(reasons) if reasons else ceiling(scores, before, AIMS[name][1])


def ceiling(scores: Mapping[str, Any], before: str, aims: tuple[str, ...]) -> str:
    """Whether the row before had left anything to gain, measured by the teacher's own distance from ideal."""
    parts = []
    for key in aims:
        if key in scores[before] and key in scores.get("teacher", {}) and scores[before][key]["mean"] is not None:
            metric, was, top = BY_KEY[key], scores[before][key], scores["teacher"][key]
            if top["mean"] is None:
                continue
            left = metric.error(was["mean"]) - metric.error(top["mean"])
            state = "already the teacher's" if left <= (was["se"] or 0.0) else "not yet the teacher's"
            parts.append(f"{plain(metric)} was {state} ({metric.show(was['mean'])} against {metric.show(top['mean'])})")
    return f"Of what it aims at, {', '.join(parts)}." if parts else ""


def plain(metric: Metric) -> str:
    """The label inside a sentence."""
    return metric.label.replace("… ", "motion ").removesuffix(", ms")


def title(row: str) -> str:
    """stage2 -> "Stage 2"; undistilled -> "the undistilled student" """
    return f"Stage {row[-1]}" if row.startswith("stage") else f"the {row.replace('_', ' ')} student"
