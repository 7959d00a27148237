"""Did the distillation work? The aims, each with its threshold, its measured number and a mark.

Input is what scores.json holds; "no worse" and "better" are paired over clips and in standard errors.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from evaluation.compare import pair_name
from evaluation.metrics import BY_KEY, GROUPS

MISSING = "not measured"
MINUTES = {False: 30, True: 8}  # what the whole run may take, by `quick`


@dataclass(frozen=True)
class Check:
    """One aim. `passed` is None where the number is missing; `group` is "student", "baselines" or "ground"."""

    group: str
    aim: str
    measured: str
    passed: bool | None


def checks(scores: Mapping[str, Any]) -> list[Check]:
    """All aims, the student's first."""
    quick = bool(scores.get("about", {}).get("quick", False))
    result = student_checks(scores) + baseline_checks(scores) + teacher_checks(scores)
    if scores.get("timings"):
        minutes = sum(scores["timings"].values()) / 60
        result.append(
            Check("ground", f"whole run under {MINUTES[quick]} minutes", f"{minutes:.1f} min", minutes < MINUTES[quick])
        )
    return result


def student_checks(scores: Mapping[str, Any]) -> list[Check]:
    """online_lpm against the teacher."""
    sync, sync_top = mean(scores, "online_lpm", "sync_corr"), mean(scores, "teacher", "sync_corr")
    motion, motion_top = mean(scores, "online_lpm", "motion_ratio"), mean(scores, "teacher", "motion_ratio")
    seam = mean(scores, "online_lpm", "seam_ratio")
    distance, distance_top = (
        mean(scores, "online_lpm", "identity_distance"),
        mean(scores, "teacher", "identity_distance"),
    )
    pair = scores.get("significance", {}).get(pair_name("online_lpm", "teacher"), {}).get("identity_distance", {})
    z = pair.get("z")
    share = None if sync is None or not sync_top else sync / sync_top
    lively = None if motion is None or not motion_top else motion / motion_top
    by_state = ", ".join(
        f"{state} {a / b:.2f}"
        for state in ("speak", "listen", "silence")
        if (a := mean(scores, "online_lpm", f"motion_{state}")) is not None
        and (b := mean(scores, "teacher", f"motion_{state}"))
    )
    return [
        Check(
            "student",
            "lip sync at least 95% of the teacher's",
            MISSING if share is None else f"{share:.1%} ({sync:.3f} of {sync_top:.3f})",
            None if share is None else share >= 0.95,
        ),
        Check(
            "student",
            "identity no worse than the teacher's (one standard error)",
            MISSING if z is None else f"distance {distance:.3f} against {distance_top:.3f} ({z:+.1f} se)",
            None if z is None else z <= 1,
        ),
        Check(
            "student",
            "motion 0.9 to 1.1 of the teacher's",
            MISSING if lively is None else f"{lively:.2f} ({by_state})",
            None if lively is None else 0.9 <= lively <= 1.1,
        ),
        Check(
            "student",
            "chunk seams under 1.2",
            MISSING if seam is None else f"{seam:.2f}",
            None if seam is None else seam < 1.2,
        ),
    ]


def baseline_checks(scores: Mapping[str, Any]) -> list[Check]:
    """online_lpm beats both rows without training, by more than two standard errors."""
    result = []
    for baseline, words in (("undistilled", "the undistilled student"), ("teacher_few_step", "the few-step teacher")):
        pair = scores.get("significance", {}).get(pair_name("online_lpm", baseline), {})
        for group, keys in GROUPS.items():
            found = {key: pair[key]["z"] for key in keys if pair.get(key, {}).get("z") is not None}
            measured = ", ".join(f"{gap(scores, key, baseline)} ({-z:+.1f} se)" for key, z in found.items()) or MISSING
            # Fidelity has two sides: one must gain, and the other may not pay for it.
            passed = min(found.values()) < -2 and max(found.values()) <= 2 if found else None
            result.append(Check("baselines", f"{group} better than {words} by 2\u00a0se", measured, passed))
    return result


def gap(scores: Mapping[str, Any], key: str, baseline: str) -> str:
    """ "sharpness 0.91 against 0.62" """
    metric = BY_KEY[key]
    ours, theirs = mean(scores, "online_lpm", key), mean(scores, baseline, key)
    if ours is None or theirs is None:
        return MISSING
    return f"{metric.label} {metric.show(ours)} against {metric.show(theirs)}"


def teacher_checks(scores: Mapping[str, Any]) -> list[Check]:
    """A student can be no better than its teacher, so the teacher has aims of its own."""
    result = []
    for keys, least, aim in (
        (("sync_corr",), 0.90, "teacher: lip sync at least 0.90"),
        (
            ("motion_speak", "motion_listen", "motion_silence"),
            0.9,
            "teacher: motion at least 0.9 of the data's, every state",
        ),
        (("identity_top1",), 0.98, "teacher: identity right in at least 98% of clips"),
        (("text_accuracy",), 0.90, "teacher: text at least 90% right"),
    ):
        found = [mean(scores, "teacher", key) for key in keys]
        known = [value for value in found if value is not None]
        complete = len(known) == len(keys)
        labels = [BY_KEY[key].label.replace("… ", "") for key in keys]
        text = (
            ", ".join(f"{label} {value:.2f}" for label, value in zip(labels, known, strict=False))
            if complete
            else MISSING
        )
        result.append(Check("ground", aim, text, min(known) >= least if complete else None))
    return result


def headline(found: list[Check]) -> tuple[bool, str]:
    """(worked, sentences): it worked when every aim of the student is met; then which aims are not, if any."""
    student = [check for check in found if check.group != "ground"]
    passed = [check for check in student if check.passed]
    worked = len(passed) == len(student)
    opening = (
        f"The distillation worked: all {len(student)} aims of the student are met."
        if worked
        else f"{len(passed)} of {len(student)} aims of the student are met."
    )
    missed = [check.aim for check in found if check.passed is False]
    unknown = [check.aim for check in found if check.passed is None]
    notes = f" Missed: {'; '.join(missed)}." if missed else ""
    return worked, opening + notes + (f" Not measured: {'; '.join(unknown)}." if unknown else "")


def mean(scores: Mapping[str, Any], row: str, key: str) -> float | None:
    """scores[row][key]["mean"], None where any of them is missing."""
    return scores.get(row, {}).get(key, {}).get("mean")
