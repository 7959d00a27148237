"""The report of a run: did the distillation work, at one look; then everything behind that answer.

write_report(folder, scores, ...) -> folder/index.html, one file with its pictures, videos and charts inside, and
folder/report.md with the same verdict and tables for terminals and reviews.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any, Literal

from evaluation.compare import compare_stages
from evaluation.drift import Drift
from evaluation.metrics import BY_KEY
from evaluation.page import data_uri, shell
from evaluation.plots import Chart, Dot, Node, Series, dot_plot, family_tree, line_chart
from evaluation.scores import replace_with
from evaluation.tables import aims, arrow, clock, markdown, present, setting, table, title
from evaluation.verdict import checks, headline, mean

SHOWN = {  # metrics drawn as dots, with the wanted band
    "sync_corr": None,
    "identity_distance": None,
    "motion_ratio": (0.9, 1.1),
    "frechet_motion": None,
    "sharpness_ratio": None,
    "seam_ratio": (0.8, 1.2),
}
TILES = (
    "evaluations_per_chunk",
    "seconds_per_video_second",
    "sync_corr",
    "identity_distance",
    "motion_ratio",
    "drift_slope_per_min",
)
HEARD = "Held-out characters and speech; every panel hears the same sound."
CEILING = "Mean, under it the standard error over clips. “data” is the truth through the codec: every row's ceiling."
DOTS = "Dots are means, whiskers two standard errors. The dashed line is ideal, the shaded band is the aim."
PAIRED = "Compared on the same clips; differences in standard errors (se)."
STREAM = "Mean over characters; the band is one standard error."
MOST_POINTS = 160  # of a loss curve: more cannot be seen


@dataclass(frozen=True)
class Figure:
    """A picture or a film of the report, as bytes."""

    title: str
    caption: str
    data: bytes
    kind: Literal["png", "jpeg", "mp4"]
    poster: bytes = b""  # png shown before a film plays


def write_report(
    folder: Path,
    scores: Mapping[str, Any],
    drift: Sequence[Chart] = (),
    losses: Sequence[Chart] = (),
    figures: Sequence[Figure] = (),
    lineage: Sequence[Node] = (),
    quick: bool = False,
) -> Path:
    """`scores` as in scores.json -> the path of index.html. The first picture stands beside the verdict."""
    folder.mkdir(parents=True, exist_ok=True)
    replace_with(folder / "report.md", markdown(scores, lineage, quick).encode())
    replace_with(folder / "index.html", html(scores, drift, losses, figures, lineage, quick).encode())
    return folder / "index.html"


def drift_charts(streams: Mapping[str, Drift]) -> list[Chart]:
    """{row: Drift} -> identity, motion and color over the stream, mean over characters with its error."""
    if not streams:
        return []
    labels = {
        "distance": ("Identity distance", "flat is good: the character stays who it is"),
        "motion": ("Head motion", "flat is good: the character stays alive"),
        "color": ("Color drift", "root mean square change of the mean color since the first window, of 255"),
    }
    charts = []
    for what, (name, note) in labels.items():
        curves = {row: stream.curve(what) for row, stream in streams.items()}
        lines = [Series(title(row), [60 * m for m in c["minutes"]], c["mean"], c["se"]) for row, c in curves.items()]
        charts.append(Chart(name, "seconds of stream", "", lines, note))
    return charts


def loss_charts(stage: str, path: Path) -> list[Chart]:
    """metrics.jsonl of a stage -> one chart per `train/...` key, averaged to a number of points that can be seen.

    A chart each, for terms differ in size by orders of magnitude. Of a step that was repeated after an interruption the
    later line counts; a line that an interruption cut off does not.
    """
    curves: dict[str, dict[int, float]] = {}
    for line in path.read_text().splitlines():
        try:
            entry = json.loads(line)
        except json.JSONDecodeError:
            continue
        for key, value in entry.items():
            if key.startswith("train/") and isinstance(value, (int, float)) and math.isfinite(value):
                curves.setdefault(key.removeprefix("train/"), {})[entry["step"]] = value
    charts = []
    for name, curve in curves.items():
        points = sorted(curve.items())
        size = -(-len(points) // MOST_POINTS)
        groups = [points[i : i + size] for i in range(0, len(points), size)]
        means = [sum(value for _, value in group) / len(group) for group in groups]
        charts.append(Chart(f"{title(stage)} · {name}", "step", "", [Series(name, [g[-1][0] for g in groups], means)]))
    return charts


def html(
    scores: Mapping[str, Any],
    drift: Sequence[Chart],
    losses: Sequence[Chart],
    figures: Sequence[Figure],
    lineage: Sequence[Node],
    quick: bool,
) -> str:
    """The page."""
    found = checks(scores)
    worked, sentence = headline(found)
    mark = '<span class="mark">QUICK</span>' if quick else ""
    first, _, rest = sentence.partition(". ")
    pictures, films = [f for f in figures if f.kind != "mp4"], [f for f in figures if f.kind == "mp4"]
    stages = "".join(f"<li>{told(text)}</li>" for text in compare_stages(scores))
    body = [
        f'<h1>Distillation report{mark}</h1><p class="quiet">{escape(setting(scores, quick))}</p>',
        f'<div class="verdict{" worked" if worked else ""}"><div class="seal">{"✓" if worked else "!"}</div><div>',
        f"<b>{escape(first.rstrip('.'))}.</b>{f'<p>{escape(rest)}</p>' if rest else ''}</div></div>",
        f'<div class="tiles">{"".join(tiles(scores))}</div>',
        "".join(figure(shot) for shot in pictures[:1]),
        section("Aims and measurements", "", aims(found)),
        section("Watch and listen", HEARD, "".join(figure(shot) for shot in films), 'div class="films"'),
        section("Scores", CEILING, table(scores)),
        section("Row by row", DOTS, "".join(dots(scores)), 'div class="charts"'),
        section("What each stage did", PAIRED, stages, 'ul class="stages"'),
        section("Over a long stream", STREAM, charts(drift), 'div class="charts"'),
        section("More pictures", "", "".join(figure(shot) for shot in pictures[1:])),
        section("Training", "Every term of every stage, from metrics.jsonl.", charts(losses), 'div class="charts"'),
        section("Lineage", "What was made from what.", family_tree(lineage) if lineage else "", 'div class="tree"'),
        section("Where the time went", "", bars(scores.get("timings", {})), 'div class="bars"'),
    ]
    return shell("Distillation report", "".join(body))


def section(name: str, lead: str, content: str, wrap: str = "div") -> str:
    """A headed part of the page, nothing at all where there is no content."""
    if not content:
        return ""
    return f"<h2>{name}</h2>{f'<p class=quiet>{lead}</p>' if lead else ''}<{wrap}>{content}</{wrap.split()[0]}>"


def told(sentence: str) -> str:
    """A stage's sentence with its name, the first two words, set off."""
    name = " ".join(sentence.split()[:2])
    return f"<b>{escape(name)}</b>{escape(sentence.removeprefix(name))}"


def tiles(scores: Mapping[str, Any]) -> list[str]:
    """The numbers to remember: student, and the teacher under it."""
    result = []
    for key in TILES:
        ours, theirs = mean(scores, "online_lpm", key), mean(scores, "teacher", key)
        if ours is not None and theirs is not None:
            metric = BY_KEY[key]
            times = f" · {theirs / ours:.0f}×" if metric.key.startswith(("eval", "sec")) and ours else ""
            result.append(
                f'<div class="tile"><span>{metric.label}</span><b>{metric.show(ours)}</b>'
                f"<small>teacher {metric.show(theirs)}{times}</small></div>"
            )
    return result


def dots(scores: Mapping[str, Any]) -> list[str]:
    """One small chart per metric that decides."""
    result = []
    for key, band in SHOWN.items():
        metric = BY_KEY[key]
        points = [
            Dot(title(row), mean(scores, row, key), scores[row].get(key, {}).get("se"), strong=row == "online_lpm")
            for row in present(scores)
        ]
        plot = dot_plot(points, {"one": 1.0, "zero": 0.0}.get(metric.better), metric.digits, band)
        result.append(f'<div class="card"><h3>{escape(metric.label)} <small>{arrow(metric)}</small></h3>{plot}</div>')
    return result


def charts(found: Sequence[Chart]) -> str:
    """Line charts as cards, each with its note."""
    cards = []
    for chart in found:
        note = f"<small>{escape(chart.note)}</small>" if chart.note else ""
        cards.append(f'<div class="card"><h3>{escape(chart.title)}</h3>{line_chart(chart)}{note}</div>')
    return "".join(cards)


def figure(shot: Figure) -> str:
    """A picture or a film with its caption."""
    address, name = data_uri(shot.data, shot.kind), escape(shot.title)
    poster = f' poster="{data_uri(shot.poster, "png")}"' if shot.poster else ""
    film = f'<video controls loop playsinline preload="metadata"{poster} src="{address}"></video>'
    picture = f'<img alt="{name}" src="{address}">'
    caption = f"<figcaption><b>{name}</b> {escape(shot.caption)}</figcaption>"
    return f"<figure>{film if shot.kind == 'mp4' else picture}{caption}</figure>"


def bars(timings: Mapping[str, float]) -> str:
    """Seconds per part as bars, with their sum."""
    if not timings:
        return ""
    longest, total = max(timings.values()) or 1.0, clock(sum(timings.values()))
    lines = [
        f'<span>{escape(name)}</span><i style="width:{100 * seconds / longest:.1f}%"></i><span>{clock(seconds)}</span>'
        for name, seconds in timings.items()
    ]
    return "".join(lines) + f"<b>total</b><span></span><b>{total}</b>"
