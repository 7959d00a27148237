"""Statistics of drift against known answers: coverage in simulation, survival by hand, planted trends."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from evaluation.bootstrap import interval, interval_of, shuffled, slope_per_minute, student_quantile, widened
from evaluation.residual import without_confounds
from evaluation.survival import (
    Lifetimes,
    kaplan_meier,
    restricted_mean,
    restricted_mean_difference,
    threshold,
    time_to_failure,
    verification,
)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# slopes and intervals


@pytest.mark.parametrize("people", [8, 24])
def test_the_interval_of_a_slope_covers_the_true_one_as_often_as_it_says(people: int):
    minutes, true, covered, runs = torch.linspace(0.3, 9.7, 20).double(), 0.01, 0, 400
    for seed in range(runs):
        own = true + 0.02 * noise(people, 1, seed=2 * seed)  # characters differ, and all their windows with them
        curves = 0.3 + own * minutes + 0.05 * noise(people, 20, seed=2 * seed + 1)
        found = interval(slope_per_minute(minutes, curves), seed, draws=500)
        covered += found["low"] <= true <= found["high"]
    assert 0.92 <= covered / runs <= 0.98


def test_quantiles_of_student_are_those_of_the_tables():
    assert student_quantile(23, 0.975) == pytest.approx(2.0687, abs=1e-4)
    assert student_quantile(1, 0.975) == pytest.approx(12.7062, abs=1e-3)
    assert student_quantile(30, 0.9995) == pytest.approx(3.646, abs=1e-3)
    assert student_quantile(10, 0.95) == pytest.approx(1.8125, abs=1e-4)


def test_few_identities_widen_the_interval_and_many_do_not():
    assert widened(10_000, 0.025) == pytest.approx(0.025, rel=0.01)
    assert widened(6, 0.025) < 0.003


def test_a_slope_is_least_squares_and_leaves_out_what_is_missing():
    minutes = torch.tensor([0.0, 1.0, 2.0, 4.0])
    rows = torch.tensor([[1.0, 3.0, 5.0, 9.0], [1.0, math.nan, 5.0, 9.0]])
    assert torch.allclose(slope_per_minute(minutes, rows), torch.tensor([2.0, 2.0], dtype=torch.float64))


def test_identities_without_a_value_do_not_count():
    found = interval(torch.tensor([1.0, 3.0, math.nan]))
    assert found["mean"] == 2.0 and 1.0 <= found["low"] <= found["high"] <= 3.0
    assert math.isnan(interval(torch.tensor([5.0]))["low"])


def test_any_statistic_has_an_interval():
    values = noise(40, seed=3) + 5
    found = interval_of(lambda chosen: values[chosen].median(), 40, draws=300)
    assert found["low"] < values.median().item() < found["high"]


def test_shuffled_time_has_no_slope_but_the_same_values():
    minutes = torch.linspace(0, 10, 20)
    curves = 0.3 + 0.05 * minutes + 0.01 * noise(24, 20)
    mixed = shuffled(curves)
    assert torch.equal(mixed.sort(1).values, curves.sort(1).values)
    before, after = (interval(slope_per_minute(minutes, c)) for c in (curves, mixed))
    assert before["low"] > 0.04
    assert after["low"] <= 0 <= after["high"]


# thresholds and survival


def test_one_stranger_in_a_thousand_passes_the_threshold():
    strangers = torch.arange(1, 2001).double()[torch.randperm(2000)]
    assert threshold(strangers) == 2.0
    assert (strangers <= threshold(strangers)).sum() == 2
    assert threshold(strangers, 0.05) == 100.0
    with pytest.raises(ValueError, match="give 1000"):
        threshold(torch.arange(500).double())


def test_verification_counts_matches_and_equal_errors():
    told = verification(torch.tensor([0.0, 1.0, 2.0, 30.0]), torch.arange(20, 1020).double())
    assert told["threshold"] == 20.0
    assert told["true_match_rate"] == 0.75
    assert told["equal_error_rate"] < 0.25
    assert verification(torch.zeros(5), torch.ones(1000))["equal_error_rate"] == 0.0


def test_a_stream_fails_at_the_first_of_three_windows_in_a_row():
    minutes = torch.arange(6).double()
    far = torch.tensor([[9, 9, 0, 9, 9, 0], [0, 9, 9, 9, 0, 0], [0, 0, 0, 9, 9, 9], [0] * 6]).double()
    lives = time_to_failure(minutes, far, limit=1.0, horizon=6.0)
    assert lives.failed.tolist() == [False, True, True, False]
    assert lives.minutes.tolist() == [6.0, 1.0, 3.0, 6.0]


def test_kaplan_meier_gives_the_published_curve_of_a_known_trial():
    """Remission under 6-MP, 21 patients (Freireich et al. 1963), the example of every textbook and package."""
    failed = [6, 6, 6, 7, 10, 13, 16, 22, 23]
    censored = [6, 9, 10, 11, 17, 19, 20, 25, 32, 32, 34, 35]
    lives = Lifetimes(torch.tensor([*failed, *censored]).double(), torch.arange(21) < len(failed))
    times, shares = kaplan_meier(lives)
    assert times == [0, 6, 7, 10, 13, 16, 22, 23]
    assert shares == pytest.approx([1, 0.857, 0.807, 0.753, 0.690, 0.627, 0.538, 0.448], abs=5e-4)


def test_the_restricted_mean_is_the_area_by_hand():
    lives = Lifetimes(torch.tensor([2.0, 3.0, 5.0, 6.0]).double(), torch.tensor([True, False, True, False]))
    assert kaplan_meier(lives) == ([0.0, 2.0, 5.0], [1.0, 0.75, 0.375])
    assert restricted_mean(lives, 6.0) == pytest.approx(2 + 3 * 0.75 + 1 * 0.375)
    assert restricted_mean(lives, 4.0) == pytest.approx(2 + 2 * 0.75)


def test_arms_are_compared_identity_by_identity():
    often = Lifetimes(torch.linspace(1, 9, 24).double(), torch.ones(24, dtype=torch.bool))
    later = Lifetimes(often.minutes + 0.5, often.failed)
    found = restricted_mean_difference(later, often, 10.0)
    assert found["mean"] == pytest.approx(0.5)
    assert found["low"] == pytest.approx(0.5) and found["high"] == pytest.approx(0.5)  # what they share cancels


# identity and motion


def world(drift: float, lean: float) -> tuple[Tensor, Tensor, Tensor]:
    """identity [N, R, C, D] that leans with a confound which itself grows over time, and drifts on its own."""
    people, returns, places, dims = 12, 10, 6, 4
    minutes = torch.linspace(0, 9, returns).double()
    pose = noise(people, returns, places, 2, seed=1) + 0.2 * minutes[None, :, None, None]
    identity = noise(people, 1, places, dims, seed=2) + lean * pose.sum(-1, keepdim=True)
    identity = identity + drift * minutes[None, :, None, None] + 0.01 * noise(people, returns, places, dims, seed=3)
    return identity, pose, minutes


def trend(values: Tensor, minutes: Tensor) -> float:
    return slope_per_minute(minutes, values.mean((2, 3))).mean().item()


def test_what_a_confound_explains_is_removed_and_a_drift_beside_it_stays():
    identity, pose, minutes = world(drift=0.0, lean=0.5)
    assert trend(identity, minutes) > 0.15
    assert trend(without_confounds(identity, pose, minutes), minutes) == pytest.approx(0.0, abs=0.005)
    identity, pose, minutes = world(drift=0.03, lean=0.5)
    assert trend(without_confounds(identity, pose, minutes), minutes) == pytest.approx(0.03, abs=0.005)


def test_confounds_that_stand_still_explain_nothing():
    identity, pose, minutes = world(drift=0.02, lean=0.0)
    rest = without_confounds(identity, torch.zeros_like(pose), minutes)
    assert torch.allclose(rest, identity)
