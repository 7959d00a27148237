"""Curves of several arms over each other, for the comparison's page: losses and gauges, and drift over a stream."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from evaluation.arms import Arm, mean_curve, summary
from evaluation.metrics import BY_KEY
from evaluation.plots import Chart, Point, Series, scatter

MOST_POINTS = 160  # of a curve: more cannot be seen


def curve_charts(arms: Sequence[Arm]) -> list[Chart]:
    """One chart per tag with the arms over each other; losses first, then what was measured on samples."""
    tags = sorted(
        {tag for arm in arms for tag in arm.curves}, key=lambda tag: (("train", "health").index(tag.split("/")[0]), tag)
    )
    out = []
    for tag in tags:
        lines = []
        for arm in arms:
            steps, means, spread = mean_curve(arm.curves.get(tag, ()))
            every = -(-len(steps) // MOST_POINTS) or 1
            lines.append(Series(arm.name, steps[::every], means[::every], spread[::every]))
        out.append(Chart(tag, "step", "", lines))
    return out


def drift_lines(arms: Sequence[Arm]) -> list[Chart]:
    """Identity, motion and color over the stream, the seeds of an arm as one line."""
    names = {"distance": "Identity distance", "motion": "Head motion", "color": "Color drift, of 255"}
    if not any(arm.drift for arm in arms):
        return []
    out = []
    for what, name in names.items():
        lines = []
        for arm in arms:
            curves = [stream.curve(what) for stream in arm.drift]
            minutes = curves[0]["minutes"] if curves else []
            means = [sum(points) / len(points) for points in zip(*(curve["mean"] for curve in curves), strict=True)]
            lines.append(Series(arm.name, [60 * minute for minute in minutes], means))
        out.append(Chart(name, "seconds of stream", "", lines, "flat is good"))
    return out


LONG = {  # curve of drift.json: title
    "identity": "Identity distance, exact geometry",
    "judge": "Identity distance, second embedder",
    "motion_speak": "Motion while speaking, over the data's",
    "motion_listen": "Motion while listening, over the data's",
    "motion_silence": "Motion in silence, over the data's",
    "sync": "Lip sync",
}


def long_lines(arms: Sequence[Arm]) -> list[Chart]:
    """The same utterance over minutes (`make drift`), the seeds of an arm as one line, for arms that have it."""
    out = []
    for measure, title in LONG.items():
        lines = []
        for place, arm in ((place, arm) for place, arm in enumerate(arms) if arm.long):
            curves = [told["rows"][told["subject"]]["curves"][measure] for told in arm.long]
            means = [sum(points) / len(points) for points in zip(*(c["mean"] for c in curves), strict=False)]
            lines.append(Series(arm.name, curves[0]["minutes"][: len(means)], means, place=place))
        if lines:
            out.append(Chart(title, "minutes of stream", "", lines))
    return out


FRONTIER = (
    "A frozen face keeps its identity: an arm is better only where it is lower and no further left. Whiskers are one "
    "standard error of an arm by itself; differences, which are paired, are surer: see the table."
)
FRONTIERS = ("identity_slope_per_min", "identity_last_minute", "judge_last_minute")
STATES = ("minutes_speak", "minutes_listen", "minutes_silence")


def frontiers(arms: Sequence[Arm]) -> str:
    """Identity against motion as cards, an arm a point: who holds the face by standing still lies to the left."""
    measured = [(i, arm) for i, arm in enumerate(arms) if all(key in arm.values for key in (*FRONTIERS, *STATES))]
    cards = []
    for key in FRONTIERS if len(measured) > 1 else ():
        points = []
        for place, arm in measured:
            moving = torch.stack([arm.values[state] for state in STATES]).mean(0)
            x = summary(replace(arm, values={STATES[0]: moving}), BY_KEY[STATES[0]], torch.empty(0))
            y = summary(arm, BY_KEY[key], torch.empty(0))
            points.append(Point(arm.name, x["mean"], y["mean"], x["se"], y["se"], place))
        drawing = scatter(points, "motion over the data's, mean of the states", BY_KEY[key].label, (1.0, 0.0))
        cards.append(f'<div class="card"><h3>{BY_KEY[key].label} against motion</h3>{drawing}</div>')
    return "".join(cards)
