"""drift.html: verdict, aims, controls, one table with every row, and the curves, in one file without script.

drift.json (numbers that do not exist are None) -> HTML, and the table as text for the terminal.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from html import escape
from typing import Any

from evaluation.drift_report import DIGITS, aims, trust
from evaluation.page import shell
from evaluation.plots import Chart, Series
from evaluation.report import charts, section

CONTROLS = {
    "truth": "data, another draw",
    "codec": "data through the codec",
    "injected": "injected drift",
    "frozen": "frozen reference",
    "shuffled": "stream, time shuffled",
    "injected shuffled": "injected, time shuffled",
}
MOTION = "motion"
COLUMNS = (  # (heading, key of a row, digits, what the tool tip says)
    ("identity, min. 1", "identity_first_minute", 3, "distance to the references in the exact geometry"),
    ("last min.", "identity_last_minute", 3, "the same in the last minute"),
    ("slope / min", "identity_slope_per_min", DIGITS["identity"], "interval over characters"),
    ("without pose", "residual_slope_per_min", 4, "slope of what pose, mouth and lids do not explain"),
    ("judge slope", "judge_slope_per_min", DIGITS["judge"], "of an embedder that no loss has seen"),
    *((f"motion, {state}", f"{MOTION} {state}", 2, "over the data's") for state in ("speak", "listen", "silence")),
    ("sync, min. 1", "sync_first_minute", 3, "correlation of mouth and speech"),
    ("last min.", "sync_last_minute", 3, "the same in the last minute"),
    ("unasked", "unasked_last_minute", 3, "frames far from speech whose mouth is open, last minute"),
    ("copies", "copy_last_minute", 3, "frames that repeat a reference or the first chunk, last minute"),
    ("color", "color_last_minute", 1, "distance of the mean color to the first return's, of 255"),
    ("sharp", "sharpness_last_minute", 2, "gradient energy over the data's, last minute"),
    ("seams", "seam_last_minute", 2, "jump at chunk borders over that at other latent borders"),
)
STATES = ("speak", "listen", "silence")
CURVES = (  # (title, measure, rows beside the subject, note)
    ("Identity distance, exact geometry", "identity", ("truth", "codec", "injected"), "flat is good; band: 95%"),
    ("Identity distance, second embedder", "judge", ("truth", "codec", "injected"), "no loss has seen it"),
    ("Identity without pose, mouth, lids", "residual", ("truth", "injected"), "drift that motion does not explain"),
    ("Lip sync", "sync", ("truth", "codec"), "correlation at no delay"),
    ("Mouth open unasked", "unasked", ("truth", "codec"), "share of frames far from speech"),
    ("Reaction of the head to speech heard", "nod", ("truth", "codec"), "correlation at no delay"),
    ("Copies of references and sink", "copy", ("truth", "codec"), "share of frames"),
    ("Color, distance to the first return", "color", ("truth", "codec", "injected"), "of 255"),
    ("Sharpness", "sharpness", ("truth", "codec"), "over the data's"),
    ("Seams", "seam", ("codec",), "jump at chunk borders"),
)
LIST = 'ul class="marks"'
STYLE = """
<style>
.wide { overflow-x:auto } .wide th, .wide td { padding:6px 7px; font-size:.84rem }
.wide td small { white-space:nowrap; display:block }
.marks { list-style:none; padding:0; margin:10px 0 0 } .marks li { padding:5px 0; border-top:1px solid var(--line) }
.marks b { display:inline-block; width:1.4em }
.marks .ok b { color:var(--good) } .marks .missed b { color:var(--bad) }
.two { display:grid; grid-template-columns:repeat(auto-fit,minmax(320px,1fr)); gap:8px 40px }
tr.control th, tr.control td { color:var(--quiet) }</style>"""


def table(facts: Mapping[str, Any]) -> str:
    """Rows and marks as text."""
    lines = ["  ".join([f"{'':>24}", *(f"{name:>29}" for name in ("identity slope / min", "judge slope / min")),
                        *(f"{state:>8}" for state in STATES), f"{'sync':>6}", f"{'copies':>7}"])]  # fmt: skip
    for label, row in rows_of(facts):
        slopes = [told_interval(row.get(f"{name}_slope_per_min"), digits) for name, digits in DIGITS.items()]
        motion = [number(row["motion_ratio"].get(state, {}).get("mean"), 2) for state in STATES]
        sync, copies = (number((row.get(key) or {}).get("mean"), 3) for key in ("sync_last_minute", "copy_last_minute"))
        lines.append("  ".join([f"{CONTROLS.get(label, label):>24}", *(f"{slope:>29}" for slope in slopes),
                                *(f"{m:>8}" for m in motion), f"{sync:>6}", f"{copies:>7}"]))  # fmt: skip
    marks = [f"{glyph(ok)} {what}: {found}" for what, found, ok in (*aims(facts), *trust(facts))]
    return "\n".join([*lines, *marks])


def page(facts: Mapping[str, Any]) -> str:
    """The page."""
    reached, shown = aims(facts), trust(facts)
    missed = [what for what, _, ok in reached if ok is False]
    broken = [what for what, _, ok in shown if not ok]
    kind = "worked" if not missed and not broken else ""
    body = [
        STYLE,
        f"<h1>Drift of {escape(facts['subject'])}</h1>",
        f'<p class="quiet">{escape(setting(facts))}</p>',
        f'<div class="verdict {kind}"><div class="seal">{"✓" if kind else "✗"}</div><div>'
        f"<b>{escape(verdict(missed, broken))}</b><p>{escape(horizon(facts))}</p></div></div>",
        f'<div class="two"><div>{section("Aims", "", marks(reached), LIST)}</div>',
        f"<div>{section('Can the measure be trusted', '', marks(shown), LIST)}</div></div>",
        section("Every row", escape(HOW), html_table(facts), 'div class="wide"'),
        section("Over the stream", "", charts(list(drawn(facts))), 'div class="charts"'),
        section("How it was measured", escape(method(facts)), " "),
    ]
    return shell(f"Drift of {facts['subject']}", "".join(body))


HOW = (
    "Means with 95% intervals; characters are resampled, with all their windows. Motion is relative to the data's in "
    "the same state. Controls in gray: without them no figure means anything. A frozen picture has a perfect identity; "
    "it is its motion and its copies that give it away. Motion is taken within pieces of a teacher's clip."
)


def verdict(missed: Sequence[str], broken: Sequence[str]) -> str:
    """One sentence."""
    if broken:
        return f"Not to be trusted. Does not hold: {broken[0]}."
    if missed:
        return f"Missed {len(missed)}: {'; '.join(missed[:3])}{' ...' if len(missed) > 3 else ''}."
    return "Nothing drifts that can be told from chance, and the character stays alive."


def horizon(facts: Mapping[str, Any]) -> str:
    """What a short stream cannot say."""
    minutes = facts["settings"]["minutes"]
    said = f"{minutes:g} {'minute' if minutes == 1 else 'minutes'}, {facts['characters']} characters"
    short = [
        *(["a slope over so short a time says little about ten minutes"] if minutes < 10 else []),
        *(["fewer than 24 characters give wide intervals"] if 8 <= facts["characters"] < 24 else []),
        *(["intervals over fewer than 8 characters are too short"] if facts["characters"] < 8 else []),
    ]
    return f"{said}: {'; '.join(short)}." if short else f"{said}."


def setting(facts: Mapping[str, Any]) -> str:
    """What streamed."""
    told = facts["settings"]
    stream = plainly(told["stream"])
    return f"weights {facts['weights'][:12]}; {stream}; noise of seed {told['seed']}; data {told['data'][:8]}."


def plainly(settings: Mapping[str, Any]) -> str:
    """Settings as words: sink chunks 1, steps 1 0.8 0.45, history (kind fixed, noise 0.1)."""
    said = []
    for key, value in settings.items():
        if isinstance(value, Mapping):
            value = f"({plainly(value)})"
        elif isinstance(value, list | tuple):
            value = " ".join(str(one) for one in value)
        said.append(f"{key.replace('_', ' ')} {value}")
    return ", ".join(said)


def method(facts: Mapping[str, Any]) -> str:
    """The protocol in a paragraph."""
    told, judge, found = facts["settings"], facts["judge"], facts["recovery"]
    return (
        f"Held-out characters with held-out voices. Block A ({told['silence']:g} s of silence, {told['speak']:g} s "
        f"speaking, {told['listen']:g} s listening, after {told['lead']:g} s of lead) comes back {told['returns']} "
        f"times with other turns between; only its returns are measured, {told['measured_share']:.0%} of all frames, "
        "so that what is said cancels. No anchor is renewed during a stream. A window fails beyond the distance at "
        f"which a stranger passes once in a thousand ({judge['geometry']['threshold']:.2f} in the geometry, of "
        f"{judge['characters']} characters in no split), a stream at three in a row. The second embedder tells those "
        f"characters apart with {judge['judge']['true_match_rate']:.1%} true matches at that rate. Injected: "
        f"parameters move {told['injected_per_min']:.0%} of the way to another character per minute, "
        f"{found['expected_slope_per_min']:+.4f} of identity distance by the renderer."
    )


def rows_of(facts: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    """Networks first, the subject in front, then the controls."""
    rows = facts["rows"]
    nets = [facts["subject"], *(name for name in rows if name not in CONTROLS and name != facts["subject"])]
    return [(name, rows[name]) for name in (*nets, *(name for name in CONTROLS if name in rows))]


def html_table(facts: Mapping[str, Any]) -> str:
    """Every row with every measure."""
    head = "".join(f'<th title="{escape(tip)}">{escape(name)}</th>' for name, _, _, tip in COLUMNS)
    head += "<th>failed</th>"
    lines = []
    for name, row in rows_of(facts):
        told = {**row, **{f"{MOTION} {state}": entry for state, entry in row["motion_ratio"].items()}}
        cells = [html_interval(told.get(key), digits) for _, key, digits, _ in COLUMNS]
        failed = row.get("identity_failed")
        cells.append("–" if failed is None else f"{failed}<small>of {failed + row['identity_censored']}</small>")
        kind = ' class="control"' if name in CONTROLS else ""
        shown = "".join(f"<td>{cell}</td>" for cell in cells)
        lines.append(f"<tr{kind}><th>{escape(CONTROLS.get(name, name))}</th>{shown}</tr>")
    return f"<table><thead><tr><th></th>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table>"


def drawn(facts: Mapping[str, Any]) -> Iterator[Chart]:
    """The curves; a row has one color on the whole page, and what was seen at one time only is no line."""
    rows, subject = facts["rows"], facts["subject"]
    place = {name: i for i, (name, _) in enumerate(rows_of(facts))}
    others = [name for name in place if name not in CONTROLS and name != subject]

    def line(name: str, x: Sequence[float], y: Sequence[float | None], band: Sequence[float | None] | None) -> Series:
        return Series(CONTROLS.get(name, name), x, y, band, place[name])

    for title, measure, controls, note in CURVES:
        curves = {name: rows[name]["curves"].get(measure) for name in (subject, *others, *controls)}
        shown = {name: curve for name, curve in curves.items() if curve and len(curve["minutes"]) > 1}
        lines = [line(name, curve["minutes"], curve["mean"], spread(curve)) for name, curve in shown.items()]
        yield Chart(title, "minutes", "", lines, note)
    states = {state: rows[subject]["curves"][f"motion_{state}"] for state in STATES}
    motion = [Series(state, curve["minutes"], curve["mean"], spread(curve)) for state, curve in states.items()]
    yield Chart("Motion by state, over the data's", "minutes", "", motion, "1 is as lively as the data")
    recognized = [(name, row["identity_survival"]) for name, row in rows_of(facts) if "identity_survival" in row]
    shares = [line(name, *steps(survival), None) for name, survival in recognized]
    yield Chart("Still recognized as themselves", "minutes", "", shares, "share of characters, Kaplan-Meier")
    late = {name: rows[name]["nod_delay_ms_per_minute"] for name in (subject, "codec")}
    delays = [line(name, [m + 0.5 for m in range(len(found))], found, None) for name, found in late.items()]
    yield Chart("Delay of the reaction, ms", "minutes", "", delays, "of the nod after what is heard")


def spread(curve: Mapping[str, Any]) -> list[float | None]:
    """Half the width of a curve's band."""
    return [
        None if low is None or high is None else (high - low) / 2
        for low, high in zip(curve["low"], curve["high"], strict=True)
    ]


def steps(survival: Mapping[str, Any]) -> tuple[list[float], list[float]]:
    """A survival curve as a staircase: minutes, share."""
    x, y = [survival["minutes"][0]], [survival["share"][0]]
    for time, share in zip(survival["minutes"][1:], survival["share"][1:], strict=True):
        x += [time, time]
        y += [y[-1], share]
    return x, y


def marks(found: Sequence[tuple[str, str, bool | None]]) -> str:
    """Aims as list items."""
    kinds = {True: "ok", False: "missed", None: "open"}
    return "".join(
        f'<li class="{kinds[ok]}"><b>{glyph(ok)}</b>{escape(what)}: {escape(told)}</li>' for what, told, ok in found
    )


def glyph(reached: bool | None) -> str:
    """✓ ✗ or, not measured, –."""
    return "–" if reached is None else "✓" if reached else "✗"


def number(value: float | None, digits: int) -> str:
    """ "0.123", "–" where there is none."""
    return "–" if value is None else f"{value:.{digits}f}"


def told_interval(entry: Mapping[str, Any] | None, digits: int) -> str:
    """ "+0.0012 [-0.0010, +0.0030]" """
    if not entry or entry["mean"] is None:
        return "–"
    ends = "" if entry["low"] is None else f" [{entry['low']:+.{digits}f}, {entry['high']:+.{digits}f}]"
    return f"{entry['mean']:+.{digits}f}{ends}"


def html_interval(entry: Mapping[str, Any] | None, digits: int) -> str:
    """The mean with its interval below."""
    if not entry or entry["mean"] is None:
        return "–"
    ends = "" if entry["low"] is None else f"<small>{entry['low']:.{digits}f} … {entry['high']:.{digits}f}</small>"
    return f"{entry['mean']:.{digits}f}{ends}"
