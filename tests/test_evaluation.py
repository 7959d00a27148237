"""Metrics against known answers: shifted, scaled, broken on purpose. No network and no speech here."""

from __future__ import annotations

import math
from dataclasses import fields

import pytest
import torch
from torch import Tensor

from evaluation import drift as drift_module
from evaluation import identity as identity_module
from evaluation.drift import Drift, least_squares_slope, measure_drift
from evaluation.frechet import frechet_distance, frechet_motion
from evaluation.geometry import Tracks
from evaluation.identity import identity_distance, identity_top1, reference_identity
from evaluation.motion import motion_ratios
from evaluation.quality import seam_ratio, sharpness_ratio
from evaluation.scores import asked
from evaluation.statistics import exactly, jackknife, mean_se, paired_difference, ratio_of_sums
from evaluation.sync import AROUND, FPS, OPEN, follow, open_unasked

CLIPS, FRAMES = 24, 48
CHARACTERS = 12


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=generator(seed))


def waves(shift: float = 0.0, clips: int = CLIPS) -> Tensor:
    """Syllable-like tracks [clips, FRAMES], late by `shift` frames; two sines with different phases per clip."""
    phase = torch.linspace(0, 6, clips)[:, None]
    t = torch.arange(FRAMES)[None] - shift
    return (
        0.5
        + 0.25 * torch.sin(2 * math.pi * 3.1 * t / FPS + phase)
        + 0.2 * torch.sin(2 * math.pi * 1.3 * t / FPS + 2 * phase)
    )


def make_tracks(seed: int = 0, scale: float = 1.0, **given: Tensor) -> Tracks:
    """Tracks [CLIPS, FRAMES] of slow random motion, `scale` times as lively; every field can be given."""
    made = {}
    for i, field in enumerate(fields(Tracks)):
        if field.name == "identity":
            made[field.name] = torch.zeros(CLIPS, FRAMES, 6)
        else:
            steps = noise(CLIPS, FRAMES, seed=100 * seed + i).cumsum(1) * 0.05
            made[field.name] = scale * steps
    return Tracks(**{**made, **given})


def one_state(code: int) -> Tensor:
    return torch.full((CLIPS, FRAMES), code)


def everything() -> Tensor:
    return torch.ones(CLIPS, FRAMES, dtype=torch.bool)


# statistics


def test_mean_se_leaves_out_clips_without_a_value():
    result = mean_se(torch.tensor([1.0, 3.0, math.nan]))
    assert result["mean"] == 2.0
    assert result["se"] == pytest.approx(math.sqrt(2) / math.sqrt(2))


def test_known_numbers_have_no_error():
    assert mean_se(exactly(3, 8)) == {"mean": 3.0, "se": 0.0}


def test_ratio_of_sums_is_the_ratio_and_its_error_matches_a_simulation():
    b = 1 + 0.3 * noise(400, 50, seed=1)
    a = 0.8 * b + 0.1 * noise(400, 50, seed=2)
    ratios = torch.stack([ratio_of_sums(x, y).mean() for x, y in zip(a, b, strict=True)])
    claimed = torch.tensor([mean_se(ratio_of_sums(x, y))["se"] for x, y in zip(a, b, strict=True)])
    assert ratios[0].item() == pytest.approx((a[0].sum() / b[0].sum()).item(), abs=1e-6)
    assert claimed.mean().item() == pytest.approx(ratios.std().item(), rel=0.15)


def test_jackknife_of_a_mean_returns_the_values_themselves():
    x = noise(9).double()
    assert torch.allclose(jackknife(lambda clips: x[clips].mean().item(), torch.arange(9), 9), x)


def test_pairing_removes_what_clips_share():
    shared = 5 * noise(40, seed=1)
    pair = paired_difference(shared + 0.1, shared + 0.01 * noise(40, seed=2))
    assert pair["difference"] == pytest.approx(0.1, abs=0.01)
    assert pair["z"] > 20


# sync and nod


@pytest.mark.parametrize("shift", [-3.0, 0.0, 1.5, 4.0])
def test_a_shifted_mouth_has_that_lag(shift: float):
    result = follow(waves(shift), waves(), everything())
    assert mean_se(result.lag_ms)["mean"] == pytest.approx(shift * 1000 / FPS, abs=4.0)


def test_a_late_mouth_correlates_less_than_a_prompt_one():
    prompt, late = (mean_se(follow(waves(s), waves(), everything()).corr)["mean"] for s in (0.0, 3.0))
    assert prompt == pytest.approx(1.0, abs=1e-6)
    assert late < 0.6


def test_a_frozen_mouth_scores_zero_and_is_not_left_out():
    result = follow(torch.full((CLIPS, FRAMES), 0.3), waves(), everything())
    assert mean_se(result.corr)["mean"] == 0.0
    assert mean_se(result.amplitude)["mean"] == pytest.approx(0.0, abs=1e-6)


def test_clips_without_speech_do_not_count_for_sync():
    state = everything()
    state[: CLIPS // 2] = False
    corr = follow(waves() + 0.2 * noise(CLIPS, FRAMES), waves(), state).corr
    assert corr.isnan().sum() == CLIPS // 2


def test_frames_outside_the_state_do_not_change_sync():
    mask = everything()
    mask[:, 24:] = False
    broken = waves().clone()
    broken[:, 24:] = 9 * noise(CLIPS, 24)
    assert mean_se(follow(broken, waves(), mask).corr)["mean"] == pytest.approx(1.0, abs=1e-6)


def test_mouth_amplitude_is_the_factor_of_the_opening():
    assert mean_se(follow(0.6 * waves(), waves(), everything()).amplitude)["mean"] == pytest.approx(0.6, abs=1e-6)


def test_a_mouth_is_open_unasked_only_far_from_speech():
    """Speech in frames 20 to 27 of 48: the 250 ms on either side of it are left to the lag."""
    driven, mouth = torch.zeros(2, 48), torch.zeros(2, 48)
    driven[:, 20:28] = 0.6
    far = 48 - (8 + 2 * AROUND)
    mouth[:, 20 - AROUND : 28 + AROUND] = 0.9
    assert mean_se(open_unasked(mouth, driven))["mean"] == 0.0
    mouth[0, 2:6] = OPEN + 0.01
    mouth[1, 28 + AROUND] = OPEN + 0.01
    mouth[1, 40:] = OPEN - 0.01
    assert mean_se(open_unasked(mouth, driven))["mean"] == pytest.approx(5 / (2 * far))


def test_clips_that_speak_throughout_say_nothing_of_a_mouth_unasked():
    driven = torch.full((3, 48), 0.6)
    assert open_unasked(torch.ones(3, 48), driven).isnan().all()
    driven[2] = 0.0  # one silent clip beside them: its share is the whole figure
    mouth = torch.ones(3, 48)
    mouth[2, :36] = 0.0
    assert mean_se(open_unasked(mouth, driven))["mean"] == pytest.approx(0.25)


def test_of_speech_whose_drive_is_not_known_no_mouth_is_unasked():
    driven, state = torch.zeros(3, 48), torch.tensor([1, 2, 1])[:, None].repeat(1, 48)
    driven[2, 20:28] = 0.6
    found = open_unasked(torch.ones(3, 48), asked(driven, state))
    assert mean_se(found)["mean"] == 1.0  # of the clip that listens, and of the far frames of the one that is driven
    assert asked(driven, state).gt(0).all(1).tolist() == [True, False, False]


def test_nods_buried_in_sway_still_show_their_delay():
    sway = 0.3 * noise(CLIPS, FRAMES, seed=5).cumsum(1) / 4
    lag = mean_se(follow(waves(2.0) + sway, waves(), everything()).lag_ms)
    assert lag["mean"] == pytest.approx(2000 / FPS, abs=max(3 * lag["se"], 12.0))


# identity


def test_identity_distance_is_the_root_mean_square_offset():
    anchor = noise(CLIPS, 6)
    identity = (anchor + 0.5)[:, None].expand(-1, FRAMES, -1)
    assert mean_se(identity_distance(identity, anchor))["mean"] == pytest.approx(0.5, abs=1e-6)


def test_reference_identity_ignores_masked_pictures():
    identity = torch.tensor([[[1.0], [3.0], [99.0]]])
    assert reference_identity(identity, torch.tensor([[True, True, False]])).item() == 2.0


def test_top1_finds_the_character_among_clips_that_share_it():
    character = torch.arange(CLIPS) // 2
    anchor = 3 * noise(CLIPS // 2, 6)[character]
    identity = anchor[:, None] + 0.2 * noise(CLIPS, FRAMES, 6, seed=1)
    assert identity_top1(identity, anchor, character).mean() == 1.0
    assert identity_top1(identity.roll(2, 0), anchor, character).mean() == 0.0


# motion


@pytest.mark.parametrize(("name", "code"), [("silence", 0), ("speak", 1), ("listen", 2)])
def test_motion_of_half_the_size_has_ratio_one_half_in_its_state_only(name: str, code: int):
    ratios = motion_ratios(make_tracks(scale=0.5), [make_tracks()], one_state(code))
    assert mean_se(ratios[f"motion_{name}"])["mean"] == pytest.approx(0.5, abs=1e-6)
    assert mean_se(ratios["motion_ratio"])["mean"] == pytest.approx(0.5, abs=1e-6)
    assert sum(math.isnan(mean_se(values)["mean"]) for values in ratios.values()) == 2


def test_another_draw_of_the_same_motion_has_ratio_one_within_its_error():
    state = torch.arange(3).repeat(CLIPS)[:CLIPS, None].expand(-1, FRAMES)
    for values in motion_ratios(make_tracks(seed=1), [make_tracks(seed=2)], state).values():
        result = mean_se(values)
        assert abs(result["mean"] - 1) < 3 * result["se"] + 1e-9


def test_motion_is_held_against_the_mean_of_all_draws_of_the_data():
    draws = [make_tracks(scale=0.5), make_tracks(scale=1.5)]
    for values in motion_ratios(make_tracks(scale=0.8), draws, one_state(0)).values():
        mean = mean_se(values)["mean"]
        assert math.isnan(mean) or mean == pytest.approx(0.8, abs=1e-6)


def test_a_lively_mouth_does_not_make_up_for_a_stiff_head_in_silence():
    stiff = make_tracks(scale=0.2, mouth=9 * waves())
    assert mean_se(motion_ratios(stiff, [make_tracks()], one_state(0))["motion_silence"])["mean"] == pytest.approx(
        0.2, abs=1e-6
    )


# quality


def smooth_video(seam: float) -> Tensor:
    """Frames that change by 0.01 at every latent-frame border, and by `seam` times that at chunk borders."""
    steps = torch.zeros(FRAMES)
    steps[4::4] = 0.01
    steps[12::12] = 0.01 * seam
    return 0.2 + steps.cumsum(0)[None, :, None, None, None].expand(CLIPS, -1, 3, 8, 8)


@pytest.mark.parametrize("seam", [1.0, 1.7, 3.0])
def test_an_injected_seam_is_its_ratio(seam: float):
    assert mean_se(seam_ratio(smooth_video(seam)))["mean"] == pytest.approx(seam, rel=1e-3)


def test_sharpness_is_the_energy_of_the_contrast():
    video = noise(3, 4, 3, 8, 8)
    assert mean_se(sharpness_ratio(0.5 * video, video))["mean"] == pytest.approx(0.25, abs=1e-6)


# Frechet


def test_frechet_distance_of_gaussians_matches_the_closed_form():
    a, b = noise(4000, 3, seed=1).double(), noise(4000, 3, seed=2).double()
    mix = torch.tensor([[1.0, 0.4, 0.0], [0.0, 0.8, 0.3], [0.0, 0.0, 1.5]]).double()
    b = b @ mix + torch.tensor([0.5, 0.0, -1.0]).double()
    s1, s2 = a.T.cov(), b.T.cov()
    values, vectors = torch.linalg.eigh(s1)
    root = vectors @ values.sqrt().diag() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ s2 @ root).clamp(min=0).sqrt().sum()
    expected = (a.mean(0) - b.mean(0)).square().sum() + s1.trace() + s2.trace() - 2 * cross
    assert frechet_distance(a, b) == pytest.approx(expected.item(), rel=1e-4)


def test_frechet_distance_of_motion_is_zero_for_the_data_and_grows_with_stiffness():
    data, drive = make_tracks(), waves()
    same, half, still = (frechet_motion(make_tracks(scale=s), data, drive, drive) for s in (1.0, 0.5, 0.1))
    assert mean_se(same)["mean"] == pytest.approx(0.0, abs=1e-5)
    assert 0 < mean_se(half)["mean"] < mean_se(still)["mean"]
    assert mean_se(still)["se"] > 0


# drift


def drifting_streams(monkeypatch: pytest.MonkeyPatch, rate: float, shuffled: bool = False) -> Drift:
    """Streams of 60 s whose first pixel column carries an identity that moves by `rate` per minute, plus noise."""
    seconds, dims = 60, 6
    frames = torch.zeros(CHARACTERS, seconds * FPS, 3, 2, dims)
    minutes = torch.arange(seconds * FPS) / FPS / 60
    if shuffled:
        minutes = minutes[torch.randperm(len(minutes), generator=generator())]
    frames += (0.3 + rate * minutes)[None, :, None, None, None]
    frames += 0.02 * noise(CHARACTERS, 1, 1, 1, dims)

    def fake(video: Tensor) -> Tracks:
        n, f = video.shape[:2]
        track = torch.linspace(0, 1, f).expand(n, f)
        return Tracks(**{x.name: video[:, :, 0, 0] if x.name == "identity" else track for x in fields(Tracks)})

    monkeypatch.setattr(drift_module, "measure", fake)
    monkeypatch.setattr(identity_module, "measure", fake)
    references = torch.zeros(CHARACTERS, 3, 3, 2, dims)
    return measure_drift(frames, references, torch.ones(CHARACTERS, 3, dtype=torch.bool))


@pytest.mark.parametrize("rate", [0.0, 0.05, 0.4])
def test_injected_identity_drift_is_recovered_as_slope_per_minute(monkeypatch: pytest.MonkeyPatch, rate: float):
    drift = drifting_streams(monkeypatch, rate)
    assert mean_se(drift.values()["drift_slope_per_min"])["mean"] == pytest.approx(rate, abs=0.005)
    assert drift.distance.shape == (CHARACTERS, 12)


def test_shuffled_time_has_no_slope(monkeypatch: pytest.MonkeyPatch):
    slope = mean_se(drifting_streams(monkeypatch, rate=0.4, shuffled=True).slope)["mean"]
    assert abs(slope) < 0.04


def test_color_drift_is_in_steps_of_255(monkeypatch: pytest.MonkeyPatch):
    drift = drifting_streams(monkeypatch, rate=0.4)
    assert drift.color[:, -1].mean().item() == pytest.approx(0.4 * (55 / 60) * 255, rel=0.02)


def test_least_squares_slope_of_a_line():
    x = torch.arange(5.0)
    assert torch.allclose(least_squares_slope(x, torch.stack([2 * x + 1, -x])), torch.tensor([2.0, -1.0]))


def test_a_stream_without_two_windows_is_refused():
    with pytest.raises(ValueError, match="fewer than two windows"):
        measure_drift(torch.zeros(1, 100, 3, 8, 8), torch.zeros(1, 1, 3, 8, 8), torch.ones(1, 1, dtype=torch.bool))
