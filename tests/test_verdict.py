"""Scores on their way to the reader: files, comparisons, verdicts, pictures, films, the report."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from distill.data import motion, puppet
from evaluation.compare import compare_stages, significance
from evaluation.drift import Drift
from evaluation.metrics import BY_KEY, ROWS
from evaluation.plots import Chart, Node, Series, line_chart
from evaluation.report import Figure, drift_charts, loss_charts, write_report
from evaluation.scores import Truth, load_values, save_values, score, summarize, write_scores
from evaluation.verdict import checks, headline
from evaluation.video import contact_sheet, mp4_bytes, png_bytes, side_by_side

CLIPS, FRAMES = 24, 48


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


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
    frames, wave = torch.rand(24, 3, 16, 16), 0.3 * noise(16000)
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


def test_a_line_has_the_color_of_its_place_in_line_and_legend():
    lines = [Series("a", [0, 1], [1.0, 2.0]), Series("b", [0, 1], [2.0, 3.0], place=4)]
    drawn = line_chart(Chart("c", "x", "y", lines))
    assert [drawn.count(f"var(--c{i})") for i in range(6)] == [2, 0, 0, 0, 2, 0]


def test_loss_charts_read_the_terms_once_per_step_and_skip_a_cut_line(tmp_path: Path):
    lines = [json.dumps({"step": i, "train/dmd": 9.0, "optim/lr_student": 1.0}) for i in range(500)]
    lines += [json.dumps({"step": i, "train/dmd": 1.0}) for i in range(400, 500)]
    path = tmp_path / "metrics.jsonl"
    path.write_text("\n".join(lines) + '\n{"step": 500, "tr')
    (chart,) = loss_charts("stage2", path)
    assert chart.title == "stage 2 · dmd"
    assert (chart.series[0].y[0], chart.series[0].y[-1]) == (9.0, 1.0)
    assert len(chart.series[0].x) <= 160


def test_report_is_one_file_without_outside_resources(tmp_path: Path):
    curves = torch.rand(3, 12)
    drift = Drift(torch.arange(12) / 12, curves, curves, curves, curves[:, 0])
    scores = write_scores(tmp_path / "scores.json", make_rows(), {"data": 61.0}, {"clips": CLIPS})
    sheet = png_bytes(contact_sheet([("teacher", torch.zeros(8, 3, 16, 16))]))
    page = write_report(
        tmp_path, scores, drift_charts({"teacher": drift}), [],
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
