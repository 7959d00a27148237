"""Metrics against known answers: shifted, scaled, broken on purpose. No network and no speech here."""

from __future__ import annotations

import io
import json
import math
from dataclasses import fields
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from distill.data import motion, puppet
from evaluation import drift as drift_module
from evaluation import identity as identity_module
from evaluation.compare import compare_stages, significance
from evaluation.drift import Drift, least_squares_slope, measure_drift
from evaluation.frechet import frechet_distance, frechet_motion
from evaluation.geometry import Tracks
from evaluation.identity import identity_distance, identity_top1, reference_identity
from evaluation.metrics import BY_KEY, ROWS
from evaluation.motion import motion_ratios
from evaluation.plots import Chart, Node, Series, line_chart
from evaluation.quality import seam_ratio, sharpness_ratio
from evaluation.report import Figure, drift_charts, loss_charts, write_report
from evaluation.scores import Truth, load_values, save_values, score, summarize, write_scores
from evaluation.statistics import exactly, jackknife, mean_se, paired_difference, ratio_of_sums
from evaluation.sync import FPS, follow
from evaluation.verdict import checks, headline
from evaluation.video import contact_sheet, mp4_bytes, png_bytes, side_by_side

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


# scores, comparison, verdict

GOOD = {
    "sync_corr": 0.94, "sync_lag_ms": 4, "mouth_amplitude": 0.97, "identity_distance": 0.3, "identity_top1": 1.0,
    "text_accuracy": 0.97, "nod_corr": 0.7, "nod_delay_ms": 8, "motion_ratio": 0.98, "motion_speak": 0.97,
    "motion_listen": 1.0, "motion_silence": 0.96, "seam_ratio": 1.05, "sharpness_ratio": 0.93, "frechet_motion": 1.2,
    "drift_slope_per_min": 0.01,
}  # fmt: skip


def make_row(seed: int, **changed: float) -> dict[str, Tensor]:
    return {key: mean + 0.02 * noise(CLIPS, seed=seed).double() for key, mean in {**GOOD, **changed}.items()}


def make_rows(**student: float) -> dict[str, dict[str, Tensor]]:
    poor = {"motion_ratio": 0.5, "identity_distance": 0.6, "sharpness_ratio": 0.5, "frechet_motion": 6.0}
    rows = {row: make_row(i) for i, row in enumerate(ROWS)}
    rows |= {"undistilled": make_row(20, **poor), "teacher_few_step": make_row(21, **poor)}
    rows["online_lpm"] = make_row(22, **{"identity_distance": 0.29, **student})
    rows["stage2"] = make_row(23, frechet_motion=0.8)
    return rows


def test_scores_are_written_whole_and_without_nan(tmp_path: Path):
    rows = make_rows()
    rows["stage1"]["sync_lag_ms"] = torch.full((CLIPS,), math.nan)
    write_scores(tmp_path / "scores.json", rows, {"data": 12.0}, {"clips": CLIPS})
    read = json.loads(
        (tmp_path / "scores.json").read_text(), parse_constant=lambda name: pytest.fail(f"{name} in JSON")
    )
    assert [name for name in read if name in ROWS] == list(ROWS)
    assert set(read["teacher"]["sync_corr"]) == {"mean", "se"}
    assert read["stage1"]["sync_lag_ms"]["mean"] is None
    assert list(tmp_path.iterdir()) == [tmp_path / "scores.json"]


def test_values_survive_their_file(tmp_path: Path):
    row = make_row(0)
    save_values(tmp_path / "row.safetensors", row)
    assert summarize(load_values(tmp_path / "row.safetensors")) == summarize(row)


def test_better_means_nearer_to_ideal_from_either_side():
    rows = {"online_lpm": make_row(1, motion_ratio=1.05), "undistilled": make_row(2, motion_ratio=1.4)}
    assert significance(rows)["online_lpm vs undistilled"]["motion_ratio"]["z"] < -2
    assert BY_KEY["motion_ratio"].error(0.8) == pytest.approx(BY_KEY["motion_ratio"].error(1.2))


def test_a_good_student_passes_every_aim(tmp_path: Path):
    scores = write_scores(tmp_path / "scores.json", make_rows(), {"all": 900.0}, {})
    found = checks(scores)
    assert [check.aim for check in found if not check.passed] == []
    assert headline(found)[0]


@pytest.mark.parametrize(
    ("change", "aim"),
    [
        ({"sync_corr": 0.85}, "lip sync"),
        ({"identity_distance": 0.4}, "identity no worse"),
        ({"motion_ratio": 0.8}, "motion 0.9"),
        ({"motion_ratio": 1.2}, "motion 0.9"),
        ({"seam_ratio": 1.3}, "chunk seams"),
        ({"frechet_motion": 6.0}, "Fréchet distance better than the undistilled"),
        ({"sharpness_ratio": 0.4}, "fidelity better than the few-step"),
    ],
)
def test_a_student_that_misses_an_aim_fails_that_check(tmp_path: Path, change: dict[str, float], aim: str):
    found = checks(write_scores(tmp_path / "scores.json", make_rows(**change), {}, {}))
    failed = [check.aim for check in found if check.passed is False]
    assert any(name.startswith(aim) for name in failed)
    assert not headline(found)[0]


def test_missing_numbers_are_called_not_measured():
    found = checks({"online_lpm": {}, "teacher": {}, "significance": {}})
    assert {check.measured for check in found} == {"not measured"}
    assert {check.passed for check in found} == {None}


def test_a_stage_that_is_not_better_is_told_with_the_reason(tmp_path: Path):
    rows = make_rows()
    rows["stage3"] = make_row(23, frechet_motion=0.8, motion_ratio=0.7, identity_distance=0.25)
    sentences = compare_stages(write_scores(tmp_path / "scores.json", rows, {}, {}))
    assert len(sentences) == 4
    assert "worse in motion 0.98 → 0.70" in sentences[2]
    assert "mode-seeking" in sentences[2]


def test_identical_stages_are_called_not_better(tmp_path: Path):
    rows = make_rows()
    rows["stage4"] = {key: values.clone() for key, values in rows["stage3"].items()}
    sentence = compare_stages(write_scores(tmp_path / "scores.json", rows, {}, {}))[3]
    assert "Not better than Stage 3: every difference is within one standard error or too small" in sentence


def puppet_truth(clips: int = 9) -> tuple[Truth, Tensor]:
    """Clips of the drawn character with a syllable-like sound, a third of them in each state; and their motion."""
    identity = puppet.sample_identities(clips, seed=1, split="test")
    t = np.arange(int(16000 * 3.5)) / 16000
    drawn, mouths, nods, labels, states = [], [], [], [], []
    for i in range(clips):
        rng = np.random.default_rng(i)
        envelope = np.clip(np.sin(20.7 * t + rng.uniform(0, 6)), 0, 1) * (np.sin(3.8 * t + i) > -0.5)
        wave = (0.2 * envelope * rng.normal(size=len(t))).astype(np.float32)
        state = np.full(FRAMES, i % 3, dtype=np.uint8)
        speak, listen = wave * (i % 3 == 1), wave * (i % 3 == 2)
        attributes = motion.sample_attributes(rng)
        params, driven = motion.drive(speak, listen, state, attributes, rng)
        drawn.append(torch.from_numpy(params))
        mouths.append(torch.from_numpy(driven["mouth"]))
        nods.append(torch.from_numpy(driven["nod"]))
        labels.append([attributes.expression, attributes.gaze, attributes.pose])
        states.append(torch.from_numpy(state).long())
    moves = torch.stack(drawn)
    frames = puppet.render(identity, moves).float() / 255
    every = torch.ones(clips, 2, dtype=torch.bool)
    tracks = (torch.stack(states), torch.stack(mouths), torch.stack(nods))
    truth = Truth(frames, frames[:, [0, 30]], every, *tracks, torch.tensor(labels), torch.arange(clips))
    return truth, puppet.render(identity, moves.mean(1, keepdim=True).expand_as(moves)).float() / 255


def test_the_drawn_truth_scores_at_the_ceiling_and_a_frozen_one_does_not():
    truth, frozen = puppet_truth()
    best, stiff = summarize(score(truth.frames, truth)), summarize(score(frozen, truth))
    assert best["sync_corr"]["mean"] > 0.9 and abs(best["sync_lag_ms"]["mean"]) < 21
    assert best["nod_corr"]["mean"] > 0.9 and abs(best["nod_delay_ms"]["mean"]) < 21
    assert best["identity_top1"]["mean"] == 1.0
    assert best["motion_ratio"]["mean"] == pytest.approx(1.0, abs=1e-6)
    assert best["frechet_motion"]["mean"] == pytest.approx(0.0, abs=1e-5)
    assert stiff["sync_corr"]["mean"] < 0.3 and stiff["motion_ratio"]["mean"] < 0.3
    assert stiff["identity_top1"]["mean"] == 1.0  # identity alone cannot see that a character is frozen
    assert stiff["frechet_motion"]["mean"] > 1.0


# pictures, films, report


def test_mp4_has_the_frames_the_size_and_the_sound():
    frames, wave = torch.rand(24, 3, 16, 16, generator=generator()), 0.3 * noise(16000)
    with av.open(io.BytesIO(mp4_bytes(frames, wave, scale=4))) as container:
        pictures = list(container.decode(video=0))
        assert (len(pictures), pictures[0].width, pictures[0].height) == (24, 64, 64)
    with av.open(io.BytesIO(mp4_bytes(frames, wave, scale=4))) as container:
        sound = list(container.decode(audio=0))
        assert sound[0].sample_rate == 16000
        assert 0.9 < sum(frame.samples for frame in sound) / 16000 < 1.2
        assert max(abs(frame.to_ndarray()).max() for frame in sound) > 0.1


def test_side_by_side_keeps_both_videos_and_even_sides():
    both = side_by_side({"teacher": torch.zeros(2, 3, 16, 16), "student": torch.ones(2, 3, 16, 16)}, scale=3)
    assert both.dtype == torch.uint8
    assert both.shape[-1] % 2 == 0 and both.shape[-2] % 2 == 0
    assert both[0, :, -5, 10].tolist() == [0, 0, 0]
    assert both[0, :, -5, -10].tolist() == [255, 255, 255]


def test_contact_sheet_has_a_row_per_model_and_a_column_per_time():
    sheet = contact_sheet(
        [("teacher", torch.zeros(48, 3, 16, 16)), ("student", torch.ones(48, 3, 16, 16))], columns=4, scale=2
    )
    assert isinstance(sheet, Image.Image)
    assert sheet.width > 4 * 32 and sheet.height > 2 * 32
    assert sheet.getpixel((sheet.width - 30, 30)) == (0, 0, 0)


def test_line_chart_breaks_nothing_on_flat_or_empty_data():
    assert "polyline" in line_chart(Chart("flat", "x", "y", [Series("a", [0, 1], [2.0, 2.0])]))
    assert "No values" in line_chart(Chart("none", "x", "y", [Series("a", [0], [None])]))


def test_loss_charts_read_the_terms_once_per_step_and_skip_a_cut_line(tmp_path: Path):
    lines = [json.dumps({"step": i, "train/dmd": 9.0, "optim/lr_student": 1.0}) for i in range(500)]
    lines += [json.dumps({"step": i, "train/dmd": 1.0}) for i in range(400, 500)]
    path = tmp_path / "metrics.jsonl"
    path.write_text("\n".join(lines) + '\n{"step": 500, "tr')
    (chart,) = loss_charts("stage2", path)
    assert chart.title == "stage 2 · dmd"
    assert (chart.series[0].y[0], chart.series[0].y[-1]) == (9.0, 1.0)
    assert len(chart.series[0].x) <= 160


def test_report_is_one_file_without_outside_resources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    scores = write_scores(tmp_path / "scores.json", make_rows(), {"data": 61.0}, {"clips": CLIPS})
    sheet = png_bytes(contact_sheet([("teacher", torch.zeros(8, 3, 16, 16))]))
    page = write_report(
        tmp_path, scores, drift_charts({"teacher": drifting_streams(monkeypatch, 0.1)}), [],
        [Figure("Contact sheet", "", sheet, "png")],
        [Node("teacher", "kept"), Node("stage1", "x", "teacher")], quick=True,
    )  # fmt: skip
    text = page.read_text()
    assert "QUICK" in text and "The distillation worked" in text and "1:01" in text
    assert "data:image/png;base64," in text
    for outside in ("http://", "https://", "<script", "<link"):
        assert outside not in text
    plain = (tmp_path / "report.md").read_text()
    assert "| lip sync ↑ |" in plain and "QUICK" in plain and "└ stage1" in plain
