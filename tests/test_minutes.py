"""Arms over minutes: what `make drift` found of every seed, paired, on one page with the scores; seeds with characters
of their own; measurements that must not be compared."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from distill import cli, compare, drift
from distill.errors import ExitCode, UserError
from distill.progress import STATE
from evaluation.arms import Arm, contrast, over_minutes, summary
from evaluation.arms_page import Comparison, figures, html, markdown
from evaluation.crossed import crossed, effect, p_value
from evaluation.metrics import BY_KEY, MINUTES

OURS = ("identity_slope_per_min", "judge_slope_per_min", "identity_last_minute", "judge_last_minute",
        "sync", "unasked", "copy")  # fmt: skip
STATES = ("motion_speak", "motion_listen", "motion_silence")


def told(people: list[int], shift: float, seed: int, by: str = "m") -> dict[str, Any]:
    """A drift.json: characters are hard in the same way for every arm, `shift` is the arm's own."""
    noise = torch.Generator().manual_seed(seed + 1)
    hard = torch.randn(40, generator=torch.Generator().manual_seed(0))[people]
    values = (hard + shift + 0.01 * torch.randn(len(people), generator=noise)).tolist()
    curve = {"minutes": [1.0, 9.0], "mean": [shift, shift], "low": [shift] * 2, "high": [shift] * 2}
    names = ("identity", "judge", *STATES, "sync")
    row = {"per_character": dict.fromkeys((*OURS, *STATES), values), "curves": dict.fromkeys(names, curve)}
    return {
        "subject": "stage3",
        "weights": f"w{seed}",
        "identities": people,
        "measured_by": by,
        "rows": {"stage3": row},
    }


def arm(name: str, shift: float, shares: bool) -> Arm:
    groups = [list(range(8 * k, 8 * k + 8)) if shares else list(range(24)) for k in range(3)]
    long = [told(group, shift, seed) for seed, group in enumerate(groups)]
    return Arm(name, (0, 1, 2), over_minutes(long), long=long)


@pytest.mark.parametrize("shares", [False, True])
def test_what_minutes_show_is_paired_by_seed_and_character(shares: bool) -> None:
    arms = [arm("base", 0.0, shares), arm("worse", 0.5, shares), arm("same", 0.0, shares)]
    known = ~arms[0].values["minutes_silence"].isnan()
    assert known.shape == (3, 24)
    if shares:  # each seed where its own characters stand
        assert [row.nonzero().flatten().tolist() for row in known] == [list(range(8 * k, 8 * k + 8)) for k in range(3)]
    else:
        assert known.all()
    found = contrast(arms, "base", torch.empty(0))
    entry = found["worse"]["identity_slope_per_min"]
    assert entry.mark == "worse" and entry.difference == pytest.approx(0.5, abs=0.02)
    assert entry.difference_se < 0.02 < summary(arms[0], BY_KEY["identity_slope_per_min"], torch.empty(0))["se"]
    assert {one.difference for one in found["same"].values()} == {0.0}


def test_a_figure_that_one_seed_was_not_measured_in_is_left_out() -> None:
    long = [told(list(range(24)), 0.0, seed) for seed in range(3)]
    del long[1]["rows"]["stage3"]["per_character"]["unasked"]
    assert {metric.key for metric in MINUTES} - set(over_minutes(long)) == {"minutes_unasked"}


def test_seeds_with_characters_of_their_own_count_as_three_draws_and_no_more() -> None:
    """False positives stay at their level, whatever seeds and characters do; 24 'characters' would promise too much."""
    generator, marks, naive, n = torch.Generator().manual_seed(0), 0, 0, 600
    for _ in range(n):
        values = torch.full((3, 24), math.nan, dtype=torch.float64)
        for seed in range(3):
            own = torch.randn(9, generator=generator, dtype=torch.float64)
            values[seed, 8 * seed : 8 * seed + 8] = own[0] + own[1:]
        one = effect(values, torch.arange(24))
        assert one.df == 2
        marks += p_value(one.mean.item(), one.se.item(), one.df.item()) < 0.05
        every = values.nansum(0)
        naive += bool(every.mean().abs() > 2.07 * every.std() / math.sqrt(24))
    assert 0.03 < marks / n < 0.075 and naive / n > 0.15
    whole = torch.randn(3, 24, generator=generator, dtype=torch.float64)
    assert effect(whole, torch.arange(24)).se == crossed(whole).se


def test_the_page_the_table_and_the_figures_hold_the_minutes() -> None:
    arms = [arm("base", 0.1, False), arm("other", 0.3, False)]
    comparison = Comparison("Two", arms, "base", torch.arange(24), {})
    text, table, facts = html(comparison), markdown(comparison), figures(comparison)
    for metric in MINUTES:
        assert metric.label in text and metric.label in table and metric.key in facts["arms"]["other"]["metrics"]
    assert "identity slope / min against motion" in text and text.count("<circle") >= 4
    third = html(replace(comparison, arms=[arms[0], Arm("without", (0, 1, 2), {}), arms[1]]))
    assert 'fill="var(--c2)"><title>other' in third and 'fill="var(--c1)"><title>' not in third  # its own color
    alone = html(Comparison("One", [arms[0], Arm("without", (0, 1, 2), {})], "base", torch.arange(24), {}))
    assert "against motion" not in alone  # one point is no frontier


def run(name: str, **other: Any) -> Path:
    """A scored run with a long measurement, as far as refusing looks at it."""
    folder = Path("runs") / name
    rows = folder / "report" / "rows" / "stage3"
    rows.mkdir(parents=True)
    key = {"source": "w0", "data": "d", "bench": {"clips": 4}, "code": "c", **other}
    (rows / "key.json").write_text(json.dumps(key))
    (rows / "values.safetensors").touch()
    (folder / "report" / "drift.json").write_text(json.dumps(told([0, 1], 0.0, 0)))
    return folder


def test_runs_that_were_scored_by_other_code_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run("a"), run("b"), run("c", code="newer")
    found = {name: compare.find(name)[0] for name in "abc"}
    compare._same_measurement([found["a"], found["b"]])
    with pytest.raises(UserError, match="different versions of the code.*make score RUN=c"):
        compare._same_measurement([found["a"], found["c"]])


def test_minutes_of_other_weights_characters_or_plans_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run("a"), run("trained-again", source="w9")
    assert len(compare._long(compare.find("a"))) == 1
    with pytest.raises(UserError, match="other weights: run `make drift RUN=trained-again`"):
        compare._long(compare.find("trained-again"))
    arms = [Arm("a", (0, 1), {}, long=[told([0, 1], 0, 0), told([2, 3], 0, 1)])]
    compare._same_minutes([*arms, Arm("none", (0, 1), {})])
    for long in (told([0, 2], 0, 0), told([0, 1], 0, 0, by="other")):
        with pytest.raises(UserError, match="'b', seed 0, was measured otherwise"):
            compare._same_minutes([*arms, Arm("b", (0,), {}, long=[long])])


def test_a_share_of_the_characters_is_the_seeds_own() -> None:
    rows = torch.arange(24)
    shares = [drift._share(rows, "3", seed).tolist() for seed in (0, 1, 2, 3)]
    assert sorted(shares[0] + shares[1] + shares[2]) == rows.tolist() and shares[3] == shares[0]
    assert drift._share(rows, "", 1) is rows
    for wrong in ("0", "13", "x"):
        with pytest.raises(UserError, match=re.escape("SHARES must be a number from 1 to 12")):
            drift._share(rows, wrong, 0)


def test_a_grid_is_measured_cell_by_cell(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("runs/grid").mkdir(parents=True)
    cells = [{"cell": "a", "seed": 0, "state": "done"}, {"cell": "b", "seed": 1, "state": "failed"}]
    asked: list[str] = []
    monkeypatch.setattr(
        drift, "measure_run", lambda options: asked.append(f"{options.run} {options.own['age']}") or "table"
    )
    (Path("runs/grid") / STATE).write_text(json.dumps({"cells": cells}))
    assert cli.main(["drift", "--run", "grid"]) == ExitCode.DONE and asked == ["grid/a-seed0 0"]
    assert "make compare RUNS=grid" in capsys.readouterr().out
    (Path("runs/grid") / STATE).write_text(json.dumps({"cells": cells[1:]}))
    assert cli.main(["drift", "--run", "grid"]) == ExitCode.DATA
    assert "has no finished cell" in capsys.readouterr().err
