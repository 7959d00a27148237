"""Curves of several arms over each other, for the comparison's page: losses and gauges, and drift over a stream."""

from __future__ import annotations

from collections.abc import Sequence

from evaluation.arms import Arm, mean_curve
from evaluation.plots import Chart, Series

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
