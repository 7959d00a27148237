"""What `make latency` says: verdicts and tables as text, and a page with the curves.

what evaluation.latency measured -> lines for the terminal, latency.html
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from evaluation.latency import GROWTH, Track, quantile
from evaluation.page import shell
from evaluation.plots import Chart, Series, line_chart

POINTS = 120  # of a curve; each is the median of what lies between
FIGURES = {
    "p50_s": ("p50, ms", 1000.0),
    "p95_s": ("p95, ms", 1000.0),
    "p99_s": ("p99, ms", 1000.0),
    "cpu_p50_s": ("CPU p50, ms", 1000.0),
    "real_time_factor": ("compute / video", 1.0),
    "peak_memory_mib": ("peak MiB", 1.0),
}


def verdicts(told: Mapping[str, Any]) -> list[tuple[str, str, bool]]:
    """(aim, measured, reached) of every aim that the run can speak about."""
    horizon, last = list(told["horizons"].items())[-1]
    chunk, p95, grown, pair = told["chunk_seconds"], last["p95_s"], told["growth"], told["against_teacher"]
    first = statistics.median(trial["first_frame_s"] for trial in told["first_frame"])
    allowed = chunk + quantile(sorted(s for trial in told["first_frame"] for s in trial["later_s"]), 0.95)
    return [
        ("p95 per chunk under its length", f"{1000 * p95:.0f} of {1000 * chunk:.0f} ms", p95 < chunk),
        (
            "first frame within a chunk and one live chunk's compute (p95)",
            f"{1000 * first:.0f} of {1000 * allowed:.0f} ms "
            f"({1000 * (chunk + p95):.0f} by chunks computed back to back)",
            first < allowed,
        ),
        (
            f"no growth over {horizon} ({GROWTH:.0%})",
            f"memory {grown['memory']:+.1%}, time against a young session {grown['cpu_against_young']:+.1%}",
            max(grown["memory"], grown["cpu_against_young"]) < GROWTH,
        ),
        (
            "25x fewer evaluations than the teacher",
            f"{pair['evaluations_ratio']:.0f}x per latent frame "
            f"({pair['evaluations_ratio_with_writes']:.0f}x with the passes that write the caches)",
            pair["evaluations_ratio"] >= 25,
        ),
        (
            "15x less time than the teacher",
            f"{pair['time_ratio']:.1f}x by the clock, {pair['cpu_ratio']:.1f}x in CPU seconds",
            pair["time_ratio"] >= 15,
        ),
    ]


def table(told: Mapping[str, Any]) -> str:
    """The horizons, one row each, and the verdicts."""
    marks = [f"{'✓' if reached else '✗'} {aim}: {measured}" for aim, measured, reached in verdicts(told)]
    return "\n".join([horizons(told), *marks])


def horizons(told: Mapping[str, Any]) -> str:
    """One row per horizon."""
    lines = ["  ".join([f"{'horizon':>8}", *(f"{name:>15}" for name, _ in FIGURES.values())])]
    for horizon, figures in told["horizons"].items():
        cells = [f"{figures[key] * factor:15.2f}" for key, (_, factor) in FIGURES.items()]
        lines.append("  ".join([f"{horizon:>8}", *cells]))
    return "\n".join(lines)


def page(told: Mapping[str, Any], track: Track) -> str:
    """The same with curves, as a page without script."""
    minutes = [(i + 1) * told["chunk_seconds"] / 60 for i in range(len(track.wall))]
    wall = Series("by the clock", *thinned(minutes, [1000 * s for s in track.wall]))
    cpu = Series("CPU", *thinned(minutes, [1000 * s for s in track.cpu]))
    memory = Series("resident", *thinned(minutes, [b / 2**20 for b in track.resident]))
    charts = [
        Chart("Time per chunk", "minutes of video", "ms", [wall, cpu]),
        Chart("Memory", "minutes of video", "MiB", [memory]),
    ]
    drawn = "".join(f'<div class="card"><h3>{c.title}, {c.y_label}</h3>{line_chart(c)}</div>' for c in charts)
    rows = "".join(f"<li>{'✓' if ok else '✗'} {escape(aim)}: {escape(what)}</li>" for aim, what, ok in verdicts(told))
    body = (
        f'<h1>Latency of {escape(told["model"])}</h1><ul>{rows}</ul><div class="charts">{drawn}</div>'
        f"<pre>{escape(horizons(told))}</pre>"
    )
    return shell("Latency", body)


def thinned(x: Sequence[float], y: Sequence[float]) -> tuple[list[float], list[float | None]]:
    """At most POINTS points: the median of each stretch at its middle."""
    size = max(1, -(-len(x) // POINTS))
    parts = [slice(i, i + size) for i in range(0, len(x), size)]
    return [statistics.median(x[p]) for p in parts], [statistics.median(y[p]) for p in parts]
