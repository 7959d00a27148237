"""The tables of the report, as HTML and as Markdown, and how names and numbers are written in them.

Input is what scores.json holds. Metrics go down and rows of the evaluation across: it reads on a narrow screen, and
what is compared stands side by side.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from evaluation.compare import compare_stages
from evaluation.metrics import METRICS, ROWS, Metric
from evaluation.plots import Node, text_tree
from evaluation.verdict import Check, checks, headline, mean

TITLES = {"data": "data (codec)", "teacher_few_step": "teacher, few steps", "online_lpm": "Online LPM"}
GROUP_TITLES = {
    "student": "Student against teacher",
    "baselines": "Better than without distillation",
    "ground": "Teacher and run time",
}


def aims(found: Sequence[Check]) -> str:
    """The checklist, a card per group; the mark says it without color too."""
    cards = []
    for group, name in GROUP_TITLES.items():
        items = [check for check in found if check.group == group]
        lines = [
            f'<li><span class="{style(check)}">{glyph(check)}</span>'
            f"<span>{escape(check.aim)}<small>{escape(check.measured)}</small></span></li>"
            for check in items
        ]
        if items:
            met = f"{sum(check.passed is True for check in items)} of {len(items)}"
            cards.append(f'<div class="card"><h3>{name} <small>{met}</small></h3><ul>{"".join(lines)}</ul></div>')
    return f'<div class="aims">{"".join(cards)}</div>'


def glyph(check: Check) -> str:
    """✓ met, ✗ not met, – not measured."""
    return {True: "✓", False: "✗", None: "–"}[check.passed]


def style(check: Check) -> str:
    """The class that colors a mark."""
    return {True: "yes", False: "no", None: "unknown"}[check.passed]


def table(scores: Mapping[str, Any]) -> str:
    """All scores, mean over standard error; the ceiling is set back, the result set off."""
    rows = present(scores)
    kind = {"data": ' class="ceiling"', "online_lpm": ' class="key"'}
    head = "".join(f"<th{kind.get(row, '')}>{escape(title(row))}</th>" for row in rows)
    lines = []
    for metric in METRICS:
        name = f"{escape(metric.label)} <small>{arrow(metric)}</small>"
        cells = "".join(f"<td{kind.get(row, '')}>{cell(scores, row, metric)}</td>" for row in rows)
        lines.append(f'<tr><th title="{escape(metric.meaning)}">{name}</th>{cells}</tr>')
    top = f"<thead><tr><th></th>{head}</tr></thead>"
    return f'<div class="scroll"><table>{top}<tbody>{"".join(lines)}</tbody></table></div>'


def cell(scores: Mapping[str, Any], row: str, metric: Metric) -> str:
    """Mean over standard error."""
    value, se = mean(scores, row, metric.key), scores[row].get(metric.key, {}).get("se")
    if value is None:
        return "–"
    return metric.show(value) + (f"<small>±{se:.{metric.digits}f}</small>" if se else "")


def markdown(scores: Mapping[str, Any], lineage: Sequence[Node], quick: bool) -> str:
    """The same verdict and tables as text."""
    found = checks(scores)
    rows = present(scores)
    lines = [
        f"# Distillation report{' (QUICK)' if quick else ''}",
        "",
        setting(scores, quick),
        "",
        f"**{headline(found)[1]}**",
        "",
    ]
    lines += ["| | aim | measured |", "|---|---|---|"] + [f"| {glyph(c)} | {c.aim} | {c.measured} |" for c in found]
    lines += [
        "",
        "## Scores",
        "",
        f"| | {' | '.join(title(row) for row in rows)} |",
        "|---" + "|---:" * len(rows) + "|",
    ]
    for metric in METRICS:
        cells = [cell(scores, row, metric).replace("<small>", " ").replace("</small>", "") for row in rows]
        lines.append(f"| {metric.label} {arrow(metric)} | {' | '.join(cells)} |")
    lines += ["", "## What each stage did", ""] + [f"* {sentence}" for sentence in compare_stages(scores)]
    if lineage:
        lines += ["", "## Lineage", "", "```", text_tree(lineage), "```"]
    timings = scores.get("timings", {})
    if timings:
        lines += ["", "## Where the time went", "", "| part | time |", "|---|---:|"]
        lines += [f"| {name} | {clock(seconds)} |" for name, seconds in timings.items()]
        lines += [f"| **total** | **{clock(sum(timings.values()))}** |"]
    return "\n".join(lines) + "\n"


def setting(scores: Mapping[str, Any], quick: bool) -> str:
    """What was measured, in a line."""
    about = scores.get("about", {})
    parts = [f"{about[key]} {key}" for key in ("characters", "clips") if key in about]
    parts += [f"voice: {about['voice']}"] if "voice" in about else []
    parts += [f"streams of {about['stream_seconds']:.0f} s"] if "stream_seconds" in about else []
    start = "Held-out characters and speech" + (f": {', '.join(parts)}." if parts else ".")
    return start + (
        " Quick run: fewer steps, so the numbers say that the path works, not how good it gets." if quick else ""
    )


def present(scores: Mapping[str, Any]) -> list[str]:
    """The rows that were measured, in the order of the table."""
    return [row for row in ROWS if row in scores]


def title(row: str) -> str:
    """teacher_few_step -> "teacher, few steps" """
    return TITLES.get(row, row.replace("stage", "stage "))


def arrow(metric: Metric) -> str:
    """Which way is better."""
    return {"higher": "↑", "lower": "↓", "one": "→ 1", "zero": "→ 0"}[metric.better]


def clock(seconds: float) -> str:
    """75 -> "1:15" """
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"
