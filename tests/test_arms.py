"""Paired comparison over seeds and clips: known effects are found, chance is not, page and figures say the same."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from evaluation.arms import Arm, contrast, differing, mean_curve, ranking, summary
from evaluation.arms_page import Comparison, Reel, figures, headline, html, markdown, write_comparison
from evaluation.crossed import adjust, by_cluster, crossed, p_value
from evaluation.drift import Drift
from evaluation.metrics import BY_KEY, METRICS
from evaluation.report import Figure
from evaluation.video import as_image, contact_sheet, mp4_bytes, png_bytes

SEEDS, PEOPLE, CLIPS = 3, 16, 2  # clips per person
CLUSTER = torch.arange(PEOPLE).repeat_interleave(CLIPS)
KEYS = ("sync_corr", "identity_distance", "motion_ratio", "frechet_motion", "seam_ratio")
START = {"sync_corr": 0.9, "identity_distance": 0.3, "motion_ratio": 0.8, "frechet_motion": 3.0, "seam_ratio": 1.1}


def normal(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def arm(name: str, effects: dict[str, float] | None = None, seed: int = 0, own: float = 0.004) -> Arm:
    """An arm whose clips share what is hard about them with every other arm; `own` is the scatter that it has alone."""
    shared, mine = torch.Generator().manual_seed(7), torch.Generator().manual_seed(seed)
    values = {}
    for key in KEYS:
        hard = 0.1 * normal(shared, PEOPLE)[CLUSTER] + 0.05 * normal(shared, len(CLUSTER))
        scatter = own * (0.3 * normal(mine, SEEDS, 1) + normal(mine, SEEDS, PEOPLE)[:, CLUSTER])
        values[key] = START[key] + hard + scatter + (effects or {}).get(key, 0.0)
    minutes = (torch.arange(6, dtype=torch.float64) + 0.5) / 12
    rising = 0.3 + 0.05 * seed * minutes + 0.01 * normal(mine, 8, 6)
    drift = [Drift(minutes, rising, 0.5 + 0 * rising, 2 * rising, rising[:, -1])] * SEEDS
    curves = [{step: math.exp(-step / 40) + 0.1 * seed + 0.02 * k for step in range(10, 101, 10)} for k in range(SEEDS)]
    recipe = {"stage1.train.steps": 80, "stage1.phases.0.every": 1 + seed}
    cost = {"steps": 80.0, "train_s": 60.0 + seed, "step_s": 0.75, "peak_gib": 1.5}
    return Arm(name, tuple(range(SEEDS)), values, drift, {"train/loss": curves, "health/sync": curves}, recipe, cost)


@pytest.fixture(scope="module")
def arms() -> list[Arm]:
    gain = {"motion_ratio": 0.06, "identity_distance": -0.02}
    return [arm("base", seed=1), arm("same", seed=2), arm("good", gain, 3), arm("bad", {"sync_corr": -0.03}, 4)]


# ---- the mathematics --------------------------------------------------------------------------------------


def test_p_values_are_those_of_published_tables() -> None:
    for t, df in ((12.706, 1), (4.303, 2), (2.571, 5), (2.042, 30), (1.96, 1e6)):
        assert p_value(t, 1.0, df) == pytest.approx(0.05, abs=2e-4)
    assert p_value(0.0, 0.0, 3.0) == 1.0 and math.isnan(p_value(1.0, 0.0, 3.0))


def test_adjusted_p_values_are_the_textbook_and_ignore_what_was_not_tested() -> None:
    known = [0.01, 0.04, 0.03, 0.005]  # R: p.adjust(c(.01, .04, .03, .005), "BH")
    assert adjust(known) == pytest.approx([0.02, 0.04, 0.04, 0.02])
    assert adjust([*known, math.nan])[:4] == pytest.approx([0.02, 0.04, 0.04, 0.02])


def test_the_mean_over_clusters_is_the_mean_over_clips_however_uneven_they_are() -> None:
    values = torch.tensor([[1.0, 2.0, 6.0, math.nan, 3.0], [0.0, 1.0, 4.0, math.nan, 2.0]], dtype=torch.float64)
    table = by_cluster(values, torch.tensor([0, 0, 0, 1, 2]))
    assert table.shape == (2, 2)  # the person without a value is left out
    assert table.mean(1).tolist() == pytest.approx([3.0, 1.75])


def test_with_one_clip_per_person_and_one_seed_it_is_the_ordinary_paired_t_test() -> None:
    d = normal(torch.Generator().manual_seed(0), 1, 20)
    effect = crossed(by_cluster(d, torch.arange(20)))
    assert effect.mean.item() == pytest.approx(d.mean().item())
    assert effect.se.item() == pytest.approx(d.std().item() / math.sqrt(20)) and effect.df.item() == 19


def test_the_error_is_that_of_drawing_other_seeds_and_other_people() -> None:
    """20,000 tables with known variances: the mean estimated variance is the true variance of their means."""
    generator, n = torch.Generator().manual_seed(0), 20000
    for a, b, c in ((0.5, 0.3, 0.4), (0.2, 1.0, 0.5)):
        table = a * normal(generator, n, 3, 1) + b * normal(generator, n, 1, 12) + c * normal(generator, n, 3, 12)
        effect = crossed(table)
        true = a**2 / 3 + b**2 / 12 + c**2 / 36
        assert effect.mean.var().item() == pytest.approx(true, rel=0.05)
        assert effect.se.square().mean().item() == pytest.approx(true, rel=0.05)


@pytest.mark.parametrize("seeds_matter", [0.0, 0.1, 1.0])
def test_false_positives_stay_at_their_level_where_nothing_differs(seeds_matter: float) -> None:
    generator, n = torch.Generator().manual_seed(1), 700
    people, rest = normal(generator, n, 1, 24), 0.5 * normal(generator, n, SEEDS, 24)
    effect = crossed(seeds_matter * normal(generator, n, SEEDS, 1) + people + rest)
    rows = zip(effect.mean.tolist(), effect.se.tolist(), effect.df.tolist(), strict=True)
    share = sum(p_value(*row) < 0.05 for row in rows) / n
    assert 0.02 < share < 0.085  # 0.05 with a standard error of 0.008


def test_ignoring_the_seeds_would_call_chance_an_effect() -> None:
    """Why the clips alone are not enough: two methods that differ in the luck of three trainings."""
    generator, n = torch.Generator().manual_seed(2), 1000
    table = normal(generator, n, SEEDS, 1) + 0.3 * normal(generator, n, SEEDS, 24)
    naive = crossed(table.mean(1, keepdim=True))
    honest = crossed(table)
    assert (naive.mean.abs() > 2 * naive.se).double().mean() > 0.7
    assert (honest.mean.abs() > 4.3 * honest.se).double().mean() < 0.08


def test_where_no_arm_differs_a_table_seldom_has_even_one_mark() -> None:
    generator, tables = torch.Generator().manual_seed(3), 100
    marked = 0
    for _ in range(tables):
        effect = crossed(0.1 * normal(generator, 16, SEEDS, 1) + normal(generator, 16, SEEDS, 16))
        rows = zip(effect.mean.tolist(), effect.se.tolist(), effect.df.tolist(), strict=True)
        marked += min(adjust([p_value(*row) for row in rows])) < 0.05
    assert marked / tables < 0.12  # 0.05 with a standard error of 0.022


# ---- arms -------------------------------------------------------------------------------------------------


def test_known_effects_are_found_with_their_size_and_sign_and_nothing_else(arms: list[Arm]) -> None:
    found = contrast(arms, "base", CLUSTER)
    good = found["good"]["motion_ratio"]  # below 1, so more is better
    assert good.mark == "better" and good.difference == pytest.approx(0.06, abs=4 * good.difference_se)
    assert found["good"]["identity_distance"].mark == "better" and found["bad"]["sync_corr"].mark == "worse"
    sure = {(a, k) for a, entries in found.items() for k, e in entries.items() if e.mark in ("better", "worse")}
    assert sure == {("good", "motion_ratio"), ("good", "identity_distance"), ("bad", "sync_corr")}
    assert [row[0] for row in ranking(arms, found)][0] == "good" and ranking(arms, found)[-1][0] == "bad"


def test_pairing_removes_what_is_hard_about_the_clips(arms: list[Arm]) -> None:
    entry = contrast(arms, "base", CLUSTER)["same"]["sync_corr"]
    assert entry.se < 0.2 * summary(arms[0], BY_KEY["sync_corr"], CLUSTER)["se"]


def test_identical_arms_differ_in_nothing(arms: list[Arm]) -> None:
    twin = Arm("twin", arms[0].seeds, arms[0].values)
    entries = contrast([arms[0], twin], "base", CLUSTER)["twin"].values()
    assert {(e.difference, e.p, e.mark) for e in entries} == {(0.0, 1.0, "same")}


def test_a_certain_difference_that_nobody_would_notice_gets_no_mark(arms: list[Arm]) -> None:
    shift = 0.5 * BY_KEY["sync_corr"].matters
    close = Arm("close", arms[0].seeds, {"sync_corr": arms[0].values["sync_corr"] - shift + 1e-6 * CLUSTER})
    entry = contrast([arms[0], close], "base", CLUSTER)["close"]["sync_corr"]
    assert entry.p < 1e-6 and entry.mark == "same"


def test_the_diff_holds_what_differs_and_a_missing_stage_is_one_line() -> None:
    def of(name: str, **recipe: object) -> Arm:
        return Arm(name, (0,), {}, recipe={key.replace("__", "."): value for key, value in recipe.items()})

    rows = differing([of("a", s1__x=1, s1__y=2, s2__z=3), of("b", s1__x=1, s1__y=5)])
    assert rows == {"s2": ["trained", "not trained"], "s1.y": [2, 5]}


def test_curves_are_averaged_over_the_steps_that_every_seed_has() -> None:
    assert mean_curve([{1: 1.0, 2: 2.0}, {2: 4.0, 3: 9.0}]) == ([2], [3.0], [pytest.approx(math.sqrt(2))])
    assert mean_curve([]) == ([], [], [])


# ---- the page ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def comparison(arms: list[Arm]) -> Comparison:
    """Four arms with a moving square each; the films last a second."""

    def film(shade: float) -> Tensor:
        frames = torch.full((24, 3, 32, 32), shade)
        for k in range(24):
            frames[k, :, 8:16, k : k + 8] = 1.0 - shade
        return frames

    shown = [(a.name, film(0.2 * k)) for k, a in enumerate(arms)]
    films = [(n, mp4_bytes(f, torch.zeros(16000), 2), png_bytes(as_image((f[12] * 255).byte()))) for n, f in shown]
    sheet = Figure("Contact sheet", "Squares.", png_bytes(contact_sheet(shown)), "png")
    reels = [Reel("speaking", "a", films), Reel("listening", "b", films)]
    return Comparison("Four arms", arms, "base", CLUSTER, {"stream_seconds": 30.0}, sheet, reels)


def test_page_table_and_figures_tell_the_same(comparison: Comparison, tmp_path: Path) -> None:
    page = write_comparison(tmp_path / "out", comparison)
    assert {path.name for path in page.parent.iterdir()} == {"index.html", "compare.md", "compare.json"}
    facts = json.loads((page.parent / "compare.json").read_text())
    assert facts == figures(comparison)
    entry = facts["differences"]["good"]["motion_ratio"]
    shown = f"+{entry['difference']:.2f} ▲"
    assert shown in page.read_text() and shown in (page.parent / "compare.md").read_text()
    assert facts["recipes"] == {"stage1.phases.0.every": {"base": 2, "same": 3, "good": 4, "bad": 5}}
    assert "train.steps" not in markdown(comparison)
    assert set(facts["arms"]["good"]["metrics"]) == set(KEYS)


def test_the_headline_says_what_the_marks_say(arms: list[Arm]) -> None:
    base, same, good, bad = arms
    mixed = arm("mixed", {"motion_ratio": 0.06, "sync_corr": -0.03}, 5)

    def told(*others: Arm) -> str:
        shown = Comparison("", [base, *others], "base", CLUSTER, {})
        return headline(shown, contrast(shown.arms, "base", CLUSTER))

    assert told(same) == "Nothing differs from base by more than chance may do."
    assert told(same, mixed) == "Nothing is ahead of base; better in as much as worse: mixed."
    assert told(mixed, bad) == "Nothing is ahead of base; behind it: bad; better in as much as worse: mixed."
    assert told(good, bad) == "Ahead of base: good (2 better, 0 worse)."


def test_the_page_needs_nothing_from_outside(comparison: Comparison) -> None:
    text = html(comparison)
    assert text.count("<video") == 8 and text.count('class="play"') == 1
    for reference in ("http://", "https://", "//cdn", "<link", "@import", 'src="/'):
        assert reference not in text.replace("http://www.w3.org", ""), reference


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
QUIET = ["--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking", "--mute-audio"]
QUIET += ["--autoplay-policy=no-user-gesture-required"]


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
def test_a_browser_draws_the_page_and_plays_all_films_in_step(comparison: Comparison, tmp_path: Path) -> None:
    from playwright.sync_api import sync_playwright

    page, picture = write_comparison(tmp_path, comparison), tmp_path / "page.png"
    at = "films.map((f) => f.currentTime)"
    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=CHROMIUM, args=QUIET)
        view = browser.new_page(viewport={"width": 420, "height": 900})
        view.goto(page.as_uri())
        view.evaluate('globalThis.films = [...document.querySelectorAll(".reel:not([hidden]) video")]')
        view.click(".play")
        view.wait_for_function("films.every((f) => !f.paused && f.currentTime > 0.02)")
        times = view.evaluate(at)
        assert len(times) == 4 and max(times) - min(times) < 0.3
        assert view.evaluate("films.filter((f) => !f.muted).length") == 1
        view.click(".play")
        view.wait_for_function("films.every((f) => f.paused)")
        assert len(set(view.evaluate(at))) == 1  # a pause shows the same moment of all
        assert view.evaluate("document.documentElement.scrollWidth - innerWidth") <= 0  # never scrolls sideways
        view.set_viewport_size({"width": 1100, "height": 1600})
        view.screenshot(path=picture)
        browser.close()
    seen = np.asarray(Image.open(picture).convert("L"))
    assert seen.shape == (1600, 1100) and seen.std() > 15  # something is there
    assert len(METRICS) > len(KEYS)
