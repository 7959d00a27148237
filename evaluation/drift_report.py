"""drift.json: the figures of a long measurement, with every control beside them and every character's own values.

Rows that say nothing about a model say whether the measure can be trusted: the data itself must not drift, an injected
drift must be found at its rate, shuffled time must have no slope, and a frozen picture must be caught by its motion
although its identity is perfect. {row: Measured} -> facts (numbers, lists and text only) and the aims they reach.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from evaluation.bootstrap import band, interval, shuffled
from evaluation.motion import STATES
from evaluation.recurrence import Layout, Measured, over
from evaluation.statistics import mean_se
from evaluation.survival import kaplan_meier, restricted_mean

LEAST_MOTION = 0.95  # of the teacher's in every state, or of the data's where no teacher was measured
MOST_CHANGE = 0.02  # of identity between the first and the last minute; of time and memory between two ages
LEAST_SYNC = 0.97  # of the first minute's
SURELY = 0.999  # level at which a control that must be flat is said to be broken: several are looked at in every run
IDENTITIES = {"identity": "exact geometry", "judge": "second embedder"}
DIGITS = {"identity": 4, "judge": 5}  # of a slope: a stranger is .60 away in the one, .16 in the other
AT_START_AND_END = ("identity", "judge", "residual", "sync", "nod", "unasked", "color", "sharpness", "seam", "copy")
DELAYS = ("mouth_delay", "nod_delay")
Facts = dict[str, Any]


def row_facts(row: Measured, layout: Layout, seed: int = 0) -> Facts:
    """One row of the table; intervals resample characters."""
    count = row.curves["identity"].shape[1]
    minutes = layout.returns[:count]
    first, last = layout.within(0, 1), layout.within(layout.horizon - 1, layout.horizon + 1e-9)
    facts: Facts = {"returns": count}
    for name in (*IDENTITIES, "residual"):
        if name in row.curves and count > 1:
            facts[f"{name}_slope_per_min"] = interval(row.slope(name, minutes), seed)
            facts[f"{name}_slope_surely"] = interval(row.slope(name, minutes), seed, SURELY, 20_000)
    for name in (name for name in AT_START_AND_END if name in row.curves):
        start, end = over(row.curves[name], first), over(row.curves[name], last)
        facts[f"{name}_first_minute"] = interval(start, seed)
        facts[f"{name}_last_minute"] = interval(end, seed)
        facts[f"{name}_change"] = interval(end - start, seed)
    every = torch.ones(len(layout.minutes), dtype=torch.bool)
    motions = [state for state in STATES if f"motion_{state}" in row.curves]
    facts["motion_ratio"] = {state: interval(over(row.curves[f"motion_{state}"], every), seed) for state in motions}
    for name in (name for name in DELAYS if name in row.curves):
        points = [mean_se(column) for column in row.curves[name].T]
        facts[f"{name}_ms"] = _mean_of(points)
        facts[f"{name}_ms_per_minute"] = by_minute(torch.tensor([p["mean"] for p in points])[None], minutes)
    for name, lives in row.lives.items():
        times, shares = kaplan_meier(lives)
        facts[f"{name}_failed"] = int(lives.failed.sum())
        facts[f"{name}_censored"] = int((~lives.failed).sum())
        facts[f"{name}_survival"] = {
            "minutes": [*times, layout.horizon],
            "share": [*shares, shares[-1]],
            "restricted_mean_minutes": restricted_mean(lives, layout.horizon),
        }
    facts["curves"] = {
        name: {"minutes": minutes.tolist(), **band(curve, seed)}
        for name, curve in row.curves.items()
        if name not in DELAYS
    }
    facts["sync_per_minute"] = by_minute(row.curves["sync"], minutes) if "sync" in row.curves else []
    facts["per_character"] = per_character(row, layout)
    return facts


def per_character(row: Measured, layout: Layout) -> Facts:
    """The values that arms and seeds are paired by, one per character in the order of the split."""
    count = row.curves["identity"].shape[1]
    first, last = layout.within(0, 1), layout.within(layout.horizon - 1, layout.horizon + 1e-9)
    out: Facts = {}
    for name in (*IDENTITIES, "residual"):
        if name in row.curves:
            slope = (
                row.slope(name, layout.returns[:count]) if count > 1 else torch.full((len(row.curves[name]),), math.nan)
            )
            out[f"{name}_slope_per_min"] = slope.tolist()
            out[f"{name}_first_minute"] = over(row.curves[name], first).tolist()
            out[f"{name}_last_minute"] = over(row.curves[name], last).tolist()
    for name, lives in row.lives.items():
        out[f"{name}_minutes"] = lives.minutes.tolist()
        out[f"{name}_failed"] = lives.failed.tolist()
    for name in ("sync", "unasked", "copy", *(f"motion_{state}" for state in STATES)):
        if name in row.curves:
            out[name] = row.curves[name].nanmean(1).tolist()
    return out


def shuffled_row(row: Measured, seed: int) -> Measured:
    """Identity in a random order of time: a measure that finds a slope here finds it in anything."""
    return Measured({name: shuffled(row.curves[name], seed) for name in IDENTITIES if name in row.curves}, {})


def recovery(row: Measured, expected: Tensor, layout: Layout, seed: int = 0) -> Facts:
    """Is the injected drift found at its rate? expected [N, R]: the identity distance that the moved parameters bring
    about, known from the renderer. Found when the expected slope lies within the interval of the measured one."""
    minutes = layout.returns
    measured, known = row.slope("identity", minutes), Measured({"identity": expected}, {}).slope("identity", minutes)
    found, paired = interval(measured, seed), interval(measured - known, seed)
    wanted = known.mean().item()
    return {
        "expected_slope_per_min": wanted,
        "measured_slope_per_min": found,
        "difference": paired,
        "ratio": found["mean"] / wanted if wanted else math.nan,
        "recovered": found["low"] <= wanted <= found["high"],
    }


def headline(subject: Facts, aging: Mapping[str, Any]) -> Facts:
    """The keys that other tools read: of the exact geometry, where nothing else is said."""
    return {
        "slope_per_min": subject["identity_slope_per_min"],
        "identity_first_minute": subject["identity_first_minute"]["mean"],
        "identity_last_minute": subject["identity_last_minute"]["mean"],
        "failed": subject["identity_failed"],
        "censored": subject["identity_censored"],
        "motion_ratio": {state: subject["motion_ratio"][state]["mean"] for state in ("speak", "listen", "silence")},
        "sync_first_minute": subject["sync_first_minute"]["mean"],
        "sync_last_minute": subject["sync_last_minute"]["mean"],
        **{name: aging.get(name) for name in AGES},
    }


AGES = ("chunk_seconds_100", "chunk_seconds_10000", "peak_mb_100", "peak_mb_10000")


def aims(facts: Mapping[str, Any]) -> list[tuple[str, str, bool | None]]:
    """(aim, measured, reached) of the stream, None where it was not measured. `facts` is drift.json."""
    rows, long = facts["rows"], facts["settings"]["minutes"] >= 2
    out: list[tuple[str, str, bool | None]] = []
    subject = rows[facts["subject"]]
    for name, label in IDENTITIES.items():
        slope = _known(subject[f"{name}_slope_per_min"])
        start, end = (_known(subject[f"{name}_{which}_minute"])["mean"] for which in ("first", "last"))
        mean, low, high = (f"{slope[key]:+.{DIGITS[name]}f}" for key in ("mean", "low", "high"))
        told = f"{mean} per minute [{low}, {high}]"
        out.append((f"no slope of identity, {label}", told, slope["low"] <= 0 <= slope["high"]))
        change = end / start - 1 if start else math.nan
        aim = f"last minute within {MOST_CHANGE:.0%} of the first, {label}"
        out.append((aim, f"{change:+.1%}", change <= MOST_CHANGE) if long else (aim, "needs two minutes", None))
    out.append(("no character fails", f"{subject['identity_failed']} of {facts['characters']}",
                subject["identity_failed"] == 0))  # fmt: skip
    against, what = motion_yardstick(rows)
    for state in ("speak", "listen", "silence"):
        ratio = _known(subject["motion_ratio"][state])["mean"] / against[state]
        out.append(
            (f"motion at least {LEAST_MOTION:.0%} of the {what}, {state}", f"{ratio:.2f}", ratio >= LEAST_MOTION)
        )
    first, last = (_known(subject[f"sync_{which}_minute"])["mean"] for which in ("first", "last"))
    kept = last / first if first else math.nan
    aim = f"lip sync at the end at least {LEAST_SYNC:.0%} of the beginning"
    out.append((aim, f"{kept:.3f}", kept >= LEAST_SYNC) if long else (aim, "needs two minutes", None))
    copies, usual = subject["copy_last_minute"], rows["codec"]["copy_last_minute"]
    aim, told = "copies of references and sink at most twice the data's", f"{copies['mean']:.1%}, {usual['mean']:.1%}"
    out.append((aim, told, copies["mean"] <= 2 * usual["mean"]))
    for what, unit in (("chunk_seconds", "s"), ("peak_mb", "MiB")):
        young, old = facts[f"{what}_100"], facts[f"{what}_10000"]
        label = f"{what.replace('_', ' ')} at chunk 10,000 within {MOST_CHANGE:.0%} of chunk 100"
        if young is None or old is None:
            out.append((label, "not measured", None))
        else:
            out.append((label, f"{young:.4g} and {old:.4g} {unit}", old <= young * (1 + MOST_CHANGE)))
    return out


def trust(facts: Mapping[str, Any]) -> list[tuple[str, str, bool | None]]:
    """(what the controls must show, measured, shown): without these no figure of the table means anything. What must be
    flat is so unless its interval of level SURELY says otherwise."""
    rows, found = facts["rows"], facts["recovery"]

    def flat(name: str) -> tuple[str, bool]:
        slope = _known(rows[name]["identity_slope_surely"])
        told = f"{slope['mean']:+.4f} [{slope['low']:+.4f}, {slope['high']:+.4f}]"
        return told, slope["low"] <= 0 <= slope["high"]

    slope, wanted = _known(found["measured_slope_per_min"]), found["expected_slope_per_min"]
    frozen = max(entry["mean"] for entry in rows["frozen"]["motion_ratio"].values())
    lost = rows["codec"]["identity_failed"]
    return [
        ("the data keeps its identity", f"{lost} fail", lost == 0),
        ("the data does not drift", *flat("truth")),
        ("the data through the codec does not drift", *flat("codec")),
        ("the injected drift is found at its rate",
         f"{slope['mean']:+.4f} [{slope['low']:+.4f}, {slope['high']:+.4f}], injected {wanted:+.4f}",
         found["recovered"]),
        ("shuffled in time the stream has no slope", *flat("shuffled")),
        ("shuffled in time the injected drift has no slope", *flat("injected shuffled")),
        ("a frozen picture has no motion", f"{frozen:.2f}", frozen < 0.1),
        ("a frozen picture counts as a copy", f"{rows['frozen']['copy_last_minute']['mean']:.0%}",
         rows["frozen"]["copy_last_minute"]["mean"] > 0.99),
    ]  # fmt: skip


def motion_yardstick(rows: Mapping[str, Any]) -> tuple[dict[str, float], str]:
    """Motion per state that a stream is held against: the teacher's if its row is there, else the data's (1)."""
    if "teacher" in rows:
        return {state: entry["mean"] for state, entry in rows["teacher"]["motion_ratio"].items()}, "teacher's"
    return dict.fromkeys(STATES, 1.0), "data's"


def by_minute(curve: Tensor, minutes: Tensor) -> list[float]:
    """curve [N, R] -> mean over characters and over the returns that begin in each minute."""
    which = minutes.floor().long()
    return [curve[:, which == m].nanmean().item() for m in which.unique().tolist()]


def _mean_of(points: list[dict[str, float]]) -> float:
    known = [point["mean"] for point in points if not math.isnan(point["mean"])]
    return sum(known) / len(known) if known else math.nan


def _known(entry: Mapping[str, Any]) -> dict[str, float]:
    """An interval as drift.json keeps it, with NaN for what does not exist."""
    return {key: math.nan if value is None else value for key, value in entry.items()}
