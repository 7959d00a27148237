"""The comparison of arms as one page, one Markdown file and one JSON file, all from the same numbers.

write_comparison(folder, Comparison) -> folder/{index.html, compare.md, compare.json}. The page is a single file with
its pictures, films and charts inside; its only script plays all films of a clip in step.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from html import escape
from pathlib import Path
from typing import Any

from torch import Tensor

from evaluation.arms import (
    COST,
    Arm,
    Contrast,
    contrast,
    differing,
    mean_curve,
    ranking,
    summary,
    tested,
)
from evaluation.arms_charts import FRONTIER, curve_charts, drift_lines, frontiers, long_lines
from evaluation.metrics import BY_KEY, Metric
from evaluation.page import data_uri, shell
from evaluation.plots import COLORS
from evaluation.report import Figure, charts, figure, section
from evaluation.scores import replace_with, without_nan
from evaluation.tables import arrow, clock

GLYPHS = {"better": "▲", "worse": "▼", "maybe better": "△", "maybe worse": "▽", "same": ""}
KINDS = {"better": "yes", "worse": "no", "maybe better": "yes", "maybe worse": "no", "same": "quiet"}
STYLE = """
<style>
.arms td small { white-space:nowrap } .arms .base { background:var(--soft) }
.diff td { font-family:ui-monospace,Menlo,Consolas,monospace; font-size:.8rem; white-space:normal;
  word-break:break-word; text-align:left; min-width:110px; vertical-align:top } .diff thead th { text-align:left }
.diff tbody th { font-family:ui-monospace,Menlo,Consolas,monospace; font-size:.8rem; font-weight:400 }
.verdict.even { background:var(--soft) } .even .seal { background:var(--quiet) }
.rank { list-style:none; margin:14px 0 0; padding:0 } .rank li { padding:10px 0; border-top:1px solid var(--line);
  max-width:90ch } .dotted { display:inline-block; width:10px; height:10px; border-radius:50%; margin-right:8px }
.player { display:flex; flex-wrap:wrap; gap:10px 14px; align-items:center; margin:14px 0 12px }
.player button { font:inherit; font-weight:600; min-width:6.6em; padding:7px 16px; border-radius:99px; cursor:pointer;
  border:1px solid var(--accent); color:var(--paper); background:var(--accent) }
.player button.clip { background:none; color:var(--ink); border-color:var(--line); font-weight:400; min-width:0 }
.player button.clip[aria-pressed=true] { border-color:var(--accent); color:var(--accent); font-weight:600 }
.player button:focus-visible { outline:3px solid var(--accent); outline-offset:2px }
.player input { flex:1; min-width:140px; accent-color:var(--accent) }
.reel { display:grid; grid-template-columns:repeat(auto-fill,minmax(150px,1fr)); gap:12px }
.reel[hidden] { display:none }
.reel figure { margin:0 }
</style>"""
SCRIPT = """
<script>
(() => {
  const root = document.querySelector(".watch"); if (!root) return;
  const button = root.querySelector(".play"), bar = root.querySelector("input");
  const clips = [...root.querySelectorAll(".clip")], reels = [...root.querySelectorAll(".reel")];
  let films = [], playing = false;
  const all = (act) => films.forEach(act);
  const seek = (t) => all((film) => { film.currentTime = t; });
  const state = (on) => { playing = on; button.textContent = on ? "❚❚ Pause" : "▶ Play all"; };
  const play = () => { state(true); all((film, i) => { film.muted = i > 0; film.play().catch(() => {}); }); };
  const pause = () => { state(false); all((film) => film.pause()); if (films[0]) seek(films[0].currentTime); };
  const choose = (k) => {
    const went = playing; pause();
    reels.forEach((reel, i) => { reel.hidden = i !== k; });
    clips.forEach((clip, i) => clip.setAttribute("aria-pressed", i === k));
    films = [...reels[k].querySelectorAll("video")]; seek(0); if (went) play();
  };
  button.onclick = () => (playing ? pause() : play());
  bar.oninput = () => seek(bar.value * (films[0].duration || 0));
  clips.forEach((clip, i) => { clip.onclick = () => choose(i); });
  const step = () => {
    const lead = films[0];
    if (lead && lead.duration) {
      if (playing && lead.ended) { seek(0); play(); }
      const apart = (film) => Math.abs(film.currentTime - lead.currentTime) > 0.06;
      if (playing) films.filter(apart).forEach((film) => { film.currentTime = lead.currentTime; });
      bar.value = lead.currentTime / lead.duration;
    }
    requestAnimationFrame(step);
  };
  choose(0); step();
})();
</script>"""


@dataclass(frozen=True)
class Reel:
    """One clip as every arm shows it: [(arm, mp4, png shown before it plays)]."""

    title: str
    caption: str
    films: Sequence[tuple[str, bytes, bytes]]


@dataclass(frozen=True)
class Comparison:
    """Everything the page shows. cluster [N] names the identity of each clip; setting says what was measured."""

    title: str
    arms: Sequence[Arm]
    baseline: str
    cluster: Tensor
    setting: Mapping[str, Any]
    sheet: Figure | None = None
    reels: Sequence[Reel] = ()


def write_comparison(folder: Path, comparison: Comparison) -> Path:
    """Write the three files; returns the page."""
    folder.mkdir(parents=True, exist_ok=True)
    facts = figures(comparison)
    replace_with(folder / "compare.json", json.dumps(facts, indent=1).encode())
    replace_with(folder / "compare.md", markdown(comparison).encode())
    replace_with(folder / "index.html", html(comparison).encode())
    return folder / "index.html"


def figures(comparison: Comparison) -> dict[str, Any]:
    """compare.json: every number of the page."""
    arms = {}
    for arm in comparison.arms:
        drift = [
            {what: stream.curve(what) for what in ("distance", "motion", "color")} for stream in arm.drift
        ]  # one per seed
        curves = {tag: dict(zip(("steps", "mean", "sd"), mean_curve(c), strict=True)) for tag, c in arm.curves.items()}
        metrics = {m.key: summary(arm, m, comparison.cluster) for m in tested() if m.key in arm.values}
        arms[arm.name] = {
            "seeds": list(arm.seeds),
            "metrics": metrics,
            "cost": dict(arm.cost),
            "curves": curves,
            "drift": drift,
        }
    contrasts = contrast(comparison.arms, comparison.baseline, comparison.cluster)
    facts = {
        "title": comparison.title,
        "baseline": comparison.baseline,
        "setting": dict(comparison.setting),
        "arms": arms,
        "differences": {arm: {k: asdict(entry) for k, entry in found.items()} for arm, found in contrasts.items()},
        "ranking": [
            dict(zip(("arm", "better", "worse"), row, strict=True)) for row in ranking(comparison.arms, contrasts)
        ],
        "recipes": {
            key: {arm.name: value for arm, value in zip(comparison.arms, values, strict=True)}
            for key, values in differing(comparison.arms).items()
        },
    }
    return without_nan(facts)


def html(comparison: Comparison) -> str:
    """The page."""
    contrasts = contrast(comparison.arms, comparison.baseline, comparison.cluster)
    ahead = any(better > worse for _, better, worse in ranking(comparison.arms, contrasts))
    kind = "worked" if ahead else "even"
    first = comparison.arms[0]
    films = "".join(reel(each, k) for k, each in enumerate(comparison.reels))
    player = watch(comparison.reels, films) if films else ""
    sheet = figure(comparison.sheet) if comparison.sheet else ""
    drift = drift_lines(comparison.arms)
    body = [
        STYLE,
        f'<h1>{escape(comparison.title)}</h1><p class="quiet">{escape(told_setting(comparison))}</p>',
        f'<div class="verdict {kind}"><div class="seal">{"≈" if kind == "even" else "▲"}</div><div>'
        f"<b>{escape(headline(comparison, contrasts))}</b></div></div>",
        section("Ranking", escape(how_many(comparison)), rank_items(comparison, contrasts), 'ul class="rank"'),
        section("Scores", escape(HOW), score_table(comparison, contrasts)),
        section("Watch together", "Same character, same sound, same seed of the noise.", player, 'div class="watch"'),
        section("Contact sheet", "", sheet),
        section("What the recipes have apart", "Only keys that differ.", diff_table(comparison.arms)),
        section("Cost", "Means over seeds; on this machine.", cost_table(comparison.arms)),
        section(
            "Training", f"Means over seeds ({len(first.seeds)}), one standard deviation as the band.",
            charts(curve_charts(comparison.arms)), 'div class="charts"',
        ),
        section("Over a long stream", "Means over seeds and characters.", charts(drift), 'div class="charts"'),
        section("Over minutes", "The same utterance again.", charts(long_lines(comparison.arms)), 'div class="charts"'),
        section("Identity against motion", FRONTIER, frontiers(comparison.arms), 'div class="charts"'),
        SCRIPT,
    ]  # fmt: skip
    return shell(comparison.title, "".join(body))


HOW = (
    "Mean with standard error; under it the paired difference to the baseline on the same clips with the same seeds. "
    "▲ better, ▼ worse: holds although so many differences are tested (after Benjamini and Hochberg, 5% of these marks "
    "are expected to be chance). △ ▽: below 5% taken alone. No mark: could be chance, or too small to be noticed. "
    "Seeds and identities both count as draws: with few seeds, only what every seed shows is sure."
)


def headline(comparison: Comparison, contrasts: Mapping[str, Mapping[str, Contrast]]) -> str:
    """One sentence: who is surely ahead of the baseline, if anybody."""
    rows = [row for row in ranking(comparison.arms, contrasts) if row[0] != comparison.baseline]
    ahead = [f"{name} ({better} better, {worse} worse)" for name, better, worse in rows if better > worse]
    behind = [name for name, better, worse in rows if worse > better]
    both = [name for name, better, worse in rows if better == worse > 0]
    if ahead:
        return f"Ahead of {comparison.baseline}: {', '.join(ahead)}."
    if behind or both:
        kinds = (("behind it", behind), ("better in as much as worse", both))
        told = [f"{words}: {', '.join(names)}" for words, names in kinds if names]
        return f"Nothing is ahead of {comparison.baseline}; {'; '.join(told)}."
    return f"Nothing differs from {comparison.baseline} by more than chance may do."


def told_setting(comparison: Comparison) -> str:
    """What was measured, in a line."""
    facts = comparison.setting
    seeds = ", ".join(str(seed) for seed in comparison.arms[0].seeds)
    identities = len(set(comparison.cluster.tolist()))
    return (
        f"{len(comparison.arms)} arms, baseline {comparison.baseline}; seeds {seeds}; {len(comparison.cluster)} clips "
        f"of {identities} held-out characters; streams of {facts.get('stream_seconds', 0):.0f} s."
    )


def how_many(comparison: Comparison) -> str:
    """The ranking's rule."""
    count = len(measured(comparison))
    return f"By the number of {count} measures that are surely better than the baseline's, less those surely worse."


def rank_items(comparison: Comparison, contrasts: Mapping[str, Mapping[str, Contrast]]) -> str:
    """A line per arm: what it is better and worse in."""
    color = {arm.name: i for i, arm in enumerate(comparison.arms)}
    lines = []
    for name, _, _ in ranking(comparison.arms, contrasts):
        dot = f'<span class="dotted" style="background:var(--c{color[name] % COLORS})"></span>'
        lines.append(f"<li>{dot}<b>{escape(name)}</b> {escape(sides(name, comparison, contrasts))}</li>")
    return "".join(lines)


def sides(name: str, comparison: Comparison, contrasts: Mapping[str, Mapping[str, Contrast]]) -> str:
    """ "better in motion, seams; worse in lip sync; perhaps better in text" """
    if name == comparison.baseline:
        return "the baseline"
    parts = []
    for mark, words in (("better", "better in"), ("worse", "worse in"), ("maybe better", "perhaps better in"),
                        ("maybe worse", "perhaps worse in")):  # fmt: skip
        keys = [key for key, entry in contrasts[name].items() if entry.mark == mark]
        if keys:
            parts.append(f"{words} {', '.join(plain(BY_KEY[key]) for key in keys)}")
    return "; ".join(parts) or "no difference that is more than chance"


def score_table(comparison: Comparison, contrasts: Mapping[str, Mapping[str, Contrast]]) -> str:
    """Metrics down, arms across."""
    kind = {comparison.baseline: ' class="base"'}
    head = "".join(f"<th{kind.get(arm.name, '')}>{escape(arm.name)}</th>" for arm in comparison.arms)
    lines = []
    for metric in measured(comparison):
        cells = []
        for arm in comparison.arms:
            entry = contrasts.get(arm.name, {}).get(metric.key)
            under = "" if entry is None else difference_html(metric, entry)
            value = with_error(summary(arm, metric, comparison.cluster), metric)
            cells.append(f"<td{kind.get(arm.name, '')}>{value}{under}</td>")
        label = f"{escape(metric.label)} <small>{arrow(metric)}</small>"
        lines.append(f'<tr><th title="{escape(metric.meaning)}">{label}</th>{"".join(cells)}</tr>')
    return scroll(f"<thead><tr><th></th>{head}</tr></thead><tbody>{''.join(lines)}</tbody>", "arms")


def measured(comparison: Comparison) -> list[Metric]:
    """The metrics that some arm has."""
    return [metric for metric in tested() if any(metric.key in arm.values for arm in comparison.arms)]


def difference_html(metric: Metric, entry: Contrast) -> str:
    """The signed difference with its mark; the figures of the test as its tool tip."""
    error = f"± {entry.difference_se:.{metric.digits + 1}f}"
    tip = f"{error}; p = {entry.p:.2g}, adjusted {entry.adjusted:.2g}, {entry.df:.0f} degrees of freedom"
    shown = difference(metric, entry)
    return f'<small class="{KINDS[entry.mark]}" title="{escape(tip)}">{shown}</small>'


def difference(metric: Metric, entry: Contrast) -> str:
    """ "+0.012 ▲" """
    if math.isnan(entry.difference):
        return "–"
    value = metric.show(entry.difference)
    sign = "+" if entry.difference > 0 and any(digit in value for digit in "123456789") else ""
    return f"{sign}{value} {GLYPHS[entry.mark]}".strip()


def with_error(point: Mapping[str, float], metric: Metric) -> str:
    """ "0.902 ±0.012" """
    if math.isnan(point["mean"]):
        return "–"
    return metric.show(point["mean"]) + ("" if math.isnan(point["se"]) else f" ±{point['se']:.{metric.digits}f}")


def diff_table(arms: Sequence[Arm]) -> str:
    """Keys that differ, arms across."""
    found = differing(arms)
    if not found:
        return '<p class="quiet">The recipes are the same.</p>'
    head = "".join(f"<th>{escape(arm.name)}</th>" for arm in arms)
    lines = []
    for key, values in found.items():
        cells = "".join(f"<td>{escape(str(value))}</td>" for value in values)
        lines.append(f"<tr><th>{escape(key)}</th>{cells}</tr>")
    return scroll(f"<thead><tr><th></th>{head}</tr></thead><tbody>{''.join(lines)}</tbody>", "diff")


def cost_table(arms: Sequence[Arm]) -> str:
    """What each arm costs."""
    head = "".join(f"<th>{escape(arm.name)}</th>" for arm in arms)
    lines = []
    for key, (label, _) in COST.items():
        if any(key in arm.cost for arm in arms):
            cells = "".join(f"<td>{cost(arm, key)}</td>" for arm in arms)
            lines.append(f"<tr><th>{label}</th>{cells}</tr>")
    return scroll(f"<thead><tr><th></th>{head}</tr></thead><tbody>{''.join(lines)}</tbody>") if lines else ""


def cost(arm: Arm, key: str) -> str:
    """A number of the cost table."""
    if key not in arm.cost:
        return "–"
    return clock(arm.cost[key]) if key == "train_s" else f"{arm.cost[key]:,.{COST[key][1]}f}"


def reel(shown: Reel, k: int) -> str:
    """The films of one clip."""
    panels = []
    for name, film, poster in shown.films:
        source = f'poster="{data_uri(poster, "png")}" src="{data_uri(film, "mp4")}"'
        panels.append(
            f'<figure><video muted playsinline preload="auto" {source}></video>'
            f"<figcaption>{escape(name)}</figcaption></figure>"
        )
    return f'<div class="reel"{" hidden" if k else ""}>{"".join(panels)}</div>'


def watch(reels: Sequence[Reel], films: str) -> str:
    """One button for all films, and one per clip to choose from."""
    choices = "".join(
        f'<button class="clip" aria-pressed="{"false" if k else "true"}" title="{escape(each.caption)}">'
        f"{escape(each.title)}</button>"
        for k, each in enumerate(reels)
    )
    bar = '<input type="range" min="0" max="1" step="0.001" value="0" aria-label="position">'
    return f'<div class="player"><button class="play">▶ Play all</button>{choices}{bar}</div>{films}'


def markdown(comparison: Comparison) -> str:
    """The same tables as text."""
    contrasts = contrast(comparison.arms, comparison.baseline, comparison.cluster)
    names = [arm.name for arm in comparison.arms]
    head = [f"| | {' | '.join(names)} |", "|---" + "|---:" * len(names) + "|"]
    lines = [
        f"# {comparison.title}",
        "",
        told_setting(comparison),
        "",
        f"**{headline(comparison, contrasts)}**",
        "",
    ]
    for name, _, _ in ranking(comparison.arms, contrasts):
        lines.append(f"* {name}: {sides(name, comparison, contrasts)}")
    lines += ["", *head]
    for metric in measured(comparison):
        cells = []
        for arm in comparison.arms:
            entry = contrasts.get(arm.name, {}).get(metric.key)
            beside = "" if entry is None else f" ({difference(metric, entry)})"
            cells.append(with_error(summary(arm, metric, comparison.cluster), metric) + beside)
        lines.append(f"| {metric.label} {arrow(metric)} | {' | '.join(cells)} |")
    lines += ["", HOW, "", "## Recipes, where they differ", "", *head]
    for key, values in differing(comparison.arms).items():
        lines.append(f"| `{key}` | {' | '.join(str(value) for value in values)} |")
    lines += ["", "## Cost", "", *head]
    for key, (label, _) in COST.items():
        if any(key in arm.cost for arm in comparison.arms):
            lines.append(f"| {label} | {' | '.join(cost(arm, key) for arm in comparison.arms)} |")
    return "\n".join(lines) + "\n"


def scroll(table: str, kind: str = "") -> str:
    """A table that scrolls sideways by itself on a narrow screen."""
    return f'<div class="scroll {kind}"><table>{table}</table></div>'


def plain(metric: Metric) -> str:
    """The label inside a sentence."""
    return metric.label.replace("… ", "motion ").removesuffix(", ms")
