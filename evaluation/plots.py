"""Small charts as inline SVG: lines over time, rows of one metric as dots with errors, the family tree.

No plotting library and no external resource: colors are CSS variables of the page, so that charts follow light and
dark. Chart -> str of SVG.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

from evaluation.page import STYLE

WIDTH, HEIGHT = 400, 220
DOT_WIDTH, TREE_WIDTH = 364, 600
LEFT, RIGHT, TOP, BOTTOM = 52, 12, 10, 38
COLORS = 8  # --c0 ... --c7 of the page


@dataclass(frozen=True)
class Series:
    """One line: x, y and, as a band around it, y -+ spread. None in y is a gap. `place`: which of the page's colors, so
    that one name looks the same in every chart; None: by where it stands in this one."""

    name: str
    x: Sequence[float]
    y: Sequence[float | None]
    spread: Sequence[float | None] | None = None
    place: int | None = None


@dataclass(frozen=True)
class Chart:
    """A titled set of lines over one x axis."""

    title: str
    x_label: str
    y_label: str
    series: Sequence[Series]
    note: str = ""


@dataclass(frozen=True)
class Dot:
    """One row of a dot plot: label, mean, standard error, and whether to set it off from the others."""

    label: str
    mean: float | None
    se: float | None
    strong: bool = False


@dataclass(frozen=True)
class Point:
    """One arm of a scatter plot, with standard errors; `place` as a Series has it."""

    name: str
    x: float
    y: float
    x_se: float | None = None
    y_se: float | None = None
    place: int | None = None


@dataclass(frozen=True)
class Node:
    """One checkpoint of the lineage; `parent` is the name of another node or None."""

    name: str
    detail: str
    parent: str | None = None


def line_chart(chart: Chart) -> str:
    """The chart as SVG, with its legend."""
    points = [point for line in chart.series for point in known_points(line)]
    if not points:
        return '<p class="quiet">No values were recorded.</p>'
    xs = [x for x, _, _ in points]
    xt, yt = ticks(min(xs), max(xs)), ticks(min(y - s for _, y, s in points), max(y + s for _, y, s in points))
    x_low, x_high = min(xs), max(max(xs), min(xs) + 1e-9)

    def px(x: float) -> float:
        return LEFT + (x - x_low) / (x_high - x_low) * (WIDTH - LEFT - RIGHT)

    def py(y: float) -> float:
        return HEIGHT - BOTTOM - (y - yt[0]) / (yt[-1] - yt[0]) * (HEIGHT - TOP - BOTTOM)

    out = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(chart.title)}">']
    for y in yt:
        out.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{py(y):.1f}" y2="{py(y):.1f}"/>')
        out.append(f'<text class="tick" x="{LEFT - 7}" y="{py(y) + 4:.1f}" text-anchor="end">{number(y, yt)}</text>')
    for x in xt:
        if x_low <= x <= x_high:
            at = f'x="{px(x):.1f}" y="{HEIGHT - BOTTOM + 17}"'
            out.append(f'<text class="tick" {at} text-anchor="middle">{number(x, xt)}</text>')
    middle = LEFT + (WIDTH - LEFT - RIGHT) / 2
    out.append(f'<text class="axis" x="{middle}" y="{HEIGHT - 4}" text-anchor="middle">{escape(chart.x_label)}</text>')
    placed = [(i if line.place is None else line.place, line) for i, line in enumerate(chart.series)]
    for i, line in placed:
        whole = known_points(line)
        color = f"var(--c{i % COLORS})"
        if line.spread is not None:
            edge = [(x, y + s) for x, y, s in whole] + [(x, y - s) for x, y, s in reversed(whole)]
            out.append(f'<polygon fill="{color}" opacity="0.13" points="{path(edge, px, py)}"/>')
        dash = ' stroke-dasharray="5 4"' if i >= COLORS else ""
        out.append(
            f'<polyline fill="none" stroke="{color}" stroke-width="2" stroke-linejoin="round"{dash} '
            f'points="{path([(x, y) for x, y, _ in whole], px, py)}"><title>{escape(line.name)}</title></polyline>'
        )
    keys = "".join(
        f'<span><i style="background:var(--c{i % COLORS})"></i>{escape(line.name)}</span>' for i, line in placed
    )
    return "".join(out) + f'</svg><div class="legend">{keys if len(chart.series) > 1 else ""}</div>'


def dot_plot(dots: Sequence[Dot], ideal: float | None, digits: int, band: tuple[float, float] | None = None) -> str:
    """Means with two standard errors to each side, one row each; a line at `ideal`, and the wanted `band` shaded."""
    known = [(dot.mean, 2 * (dot.se or 0.0)) for dot in dots if dot.mean is not None]
    if not known:
        return '<p class="quiet">Not measured.</p>'
    ends = [mean + side * reach for mean, reach in known for side in (-1, 1)] + ([] if ideal is None else [ideal])
    low, high = min(ends), max(ends)
    pad = (high - low) * 0.06 or 0.5
    low, high = low - pad, high + pad
    left, right, step = 118, 46, 19
    height = step * len(dots) + 6

    def px(x: float) -> float:
        return left + (min(max(x, low), high) - low) / (high - low) * (DOT_WIDTH - left - right)

    edge = DOT_WIDTH
    out = [f'<svg viewBox="0 0 {edge} {height}" role="img">']
    if band is not None:
        start, end = px(band[0]), px(band[1])
        out.append(f'<rect class="band" x="{start:.1f}" width="{end - start:.1f}" y="0" height="{height}"/>')
    if ideal is not None:
        out.append(f'<line class="ideal" x1="{px(ideal):.1f}" x2="{px(ideal):.1f}" y1="0" y2="{height}"/>')
    for i, dot in enumerate(dots):
        y, kind = 3 + step * (i + 0.5), "strong" if dot.strong else "plain"
        out.append(f'<text class="name {kind}" x="{left - 8}" y="{y + 4}" text-anchor="end">{escape(dot.label)}</text>')
        if dot.mean is None:
            out.append(f'<text class="tick" x="{left}" y="{y + 4}">not measured</text>')
            continue
        spread = 2 * (dot.se or 0)
        x1, x2 = px(dot.mean - spread), px(dot.mean + spread)
        out.append(f'<line class="whisker {kind}" x1="{x1:.1f}" x2="{x2:.1f}" y1="{y}" y2="{y}"/>')
        out.append(f'<circle class="dot {kind}" cx="{px(dot.mean):.1f}" cy="{y}" r="4"/>')
        value = f"{dot.mean:.{digits}f}".replace("-", "\u2212")
        out.append(f'<text class="tick {kind}" x="{edge - 2}" y="{y + 4}" text-anchor="end">{value}</text>')
    return "".join(out) + "</svg>"


def scatter(points: Sequence[Point], x_label: str, y_label: str, ideal: tuple[float, float]) -> str:
    """Points with a standard error in both directions and their names, and lines through what is ideal."""
    known = [point for point in points if not any(math.isnan(v) for v in (point.x, point.y))]
    if not known:
        return '<p class="quiet">Not measured.</p>'
    xs = [p.x + side * (p.x_se or 0) for p in known for side in (-1, 1)] + [ideal[0]]
    ys = [p.y + side * (p.y_se or 0) for p in known for side in (-1, 1)] + [ideal[1]]
    xt, yt = ticks(min(xs), max(xs)), ticks(min(ys), max(ys))

    def px(x: float) -> float:
        return LEFT + (x - xt[0]) / (xt[-1] - xt[0]) * (WIDTH - LEFT - RIGHT)

    def py(y: float) -> float:
        return HEIGHT - BOTTOM - (y - yt[0]) / (yt[-1] - yt[0]) * (HEIGHT - TOP - BOTTOM)

    low, right, label = HEIGHT - BOTTOM, WIDTH - RIGHT, escape(f"{y_label} against {x_label}")
    out = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}">']
    for y in yt:
        out.append(f'<text class="tick" x="{LEFT - 7}" y="{py(y) + 4:.1f}" text-anchor="end">{number(y, yt)}</text>')
    for x in xt:
        out.append(f'<text class="tick" x="{px(x):.1f}" y="{low + 17}" text-anchor="middle">{number(x, xt)}</text>')
    out.append(f'<line class="ideal" x1="{px(ideal[0]):.1f}" x2="{px(ideal[0]):.1f}" y1="{TOP}" y2="{low}"/>')
    out.append(f'<line class="ideal" x1="{LEFT}" x2="{right}" y1="{py(ideal[1]):.1f}" y2="{py(ideal[1]):.1f}"/>')
    placed = [(i if point.place is None else point.place, point) for i, point in enumerate(known)]
    for i, point in placed:
        x, y, color = px(point.x), py(point.y), f"var(--c{i % COLORS})"
        x1, x2 = px(point.x - (point.x_se or 0)), px(point.x + (point.x_se or 0))
        y1, y2 = py(point.y - (point.y_se or 0)), py(point.y + (point.y_se or 0))
        out.append(f'<path stroke="{color}" opacity="0.5" d="M{x1:.1f} {y:.1f}H{x2:.1f}M{x:.1f} {y1:.1f}V{y2:.1f}"/>')
        name = f"<title>{escape(point.name)}</title>"
        out.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{color}">{name}</circle>')
    middle = LEFT + (WIDTH - LEFT - RIGHT) / 2
    out.append(f'<text class="axis" x="{middle}" y="{HEIGHT - 4}" text-anchor="middle">{escape(x_label)}</text></svg>')
    keys = "".join(f'<span><i style="background:var(--c{i % COLORS})"></i>{escape(p.name)}</span>' for i, p in placed)
    return "".join(out) + f'<div class="legend">{keys}</div>'


def family_tree(nodes: Sequence[Node]) -> str:
    """The lineage as SVG: one row per checkpoint, indented under its parent, joined by elbows."""
    depth: dict[str, int] = {}
    row: dict[str, int] = {}
    out = []
    step, indent = 46, 26
    for i, node in enumerate(nodes):
        depth[node.name] = depth.get(node.parent, -1) + 1 if node.parent else 0
        row[node.name] = i
        x, y = 4 + depth[node.name] * indent, 4 + i * step
        if node.parent in row:
            px, py = 4 + depth[node.parent] * indent + 12, 4 + row[node.parent] * step + 34
            out.append(f'<path class="elbow" d="M{px} {py} V{y + 17} H{x}"/>')
        out.append(f'<rect class="box" x="{x}" y="{y}" width="{TREE_WIDTH - x}" height="34" rx="6"/>')
        out.append(f'<text class="name strong" x="{x + 10}" y="{y + 22}">{escape(node.name)}</text>')
        out.append(f'<text class="tick" x="{x + 118}" y="{y + 22}">{escape(node.detail)}</text>')
    return (
        f'<svg viewBox="0 0 {TREE_WIDTH + 4} {step * len(nodes)}" role="img" aria-label="lineage">{"".join(out)}</svg>'
    )


def standalone_tree(nodes: Sequence[Node]) -> str:
    """The lineage as an SVG file of its own, with its colors for light and dark inside."""
    drawing = family_tree(nodes).replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1)
    head, _, rest = drawing.partition(">")
    font = "svg { background:var(--paper); font-family:Helvetica,Arial,sans-serif }"
    return f"{head}><style>{STYLE}{font}</style>{rest}\n"


def text_tree(nodes: Sequence[Node]) -> str:
    """The same as plain text, two spaces per generation."""
    depth: dict[str, int] = {}
    lines = []
    for node in nodes:
        level = depth.get(node.parent, -1) + 1 if node.parent else 0
        depth[node.name] = level
        lines.append("  " * level + ("└ " if level else "") + f"{node.name}  {node.detail}")
    return "\n".join(lines)


def ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round values that enclose [low, high]."""
    span = high - low or abs(high) or 1.0
    rough = span / (about - 1)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * m for m in (1, 2, 2.5, 5, 10) if power * m >= rough)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [i * step for i in range(first, max(last, first + 1) + 1)]


def number(value: float, among: Sequence[float]) -> str:
    """A tick with as many digits as its neighbors need."""
    step = among[1] - among[0]
    digits = next((d for d in range(6) if abs(step * 10**d - round(step * 10**d)) < 1e-6), 6)
    return f"{value:,.{digits}f}".replace("-", "\u2212")


def known_points(line: Series) -> list[tuple[float, float, float]]:
    """(x, y, spread) of every point that has a y; spread 0 where there is none."""
    spread = line.spread or [0.0] * len(line.x)
    return [(x, y, s or 0.0) for x, y, s in zip(line.x, line.y, spread, strict=True) if y is not None]


def path(points: Sequence[tuple[float, float]], px: Callable[[float], float], py: Callable[[float], float]) -> str:
    """Data points -> SVG points."""
    return " ".join(f"{px(x):.1f},{py(y):.1f}" for x, y in points)
