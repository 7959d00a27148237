"""The rig, the rules that drive it, and the geometry that reads it back: each claim on a few rendered clips."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from distill.data import motion as motions
from distill.data.puppet import IDENTITY, MOTION, render, sample_identities
from evaluation.geometry import IDENTITY_NAMES, classify, measure

PARTS = {name: index for index, name in enumerate(MOTION)}
FRAMES = 48


def _speech(seconds: float, seed: int) -> np.ndarray:
    """Noise in 3 Hz syllables and 0.5 Hz phrases, as loud as prepared speech, with its past."""
    generator = np.random.default_rng(seed)
    time = np.arange(motions.PAST_SAMPLES + int(seconds * motions.SAMPLE_RATE)) / motions.SAMPLE_RATE
    rate, phase = generator.uniform(2.5, 3.5), generator.uniform(0.0, 6.0, size=2)
    loud = np.clip(np.sin(2 * np.pi * rate * time + phase[0]) + np.sin(np.pi * time + phase[1]) + 0.4, 0.0, None)
    wave = generator.standard_normal(len(time)) * loud
    return (0.1 * wave / np.sqrt((wave[loud > 0] ** 2).mean())).astype(np.float32)


@pytest.fixture(scope="module")
def world() -> dict[str, torch.Tensor]:
    """24 characters in all three states with drawn attributes, rendered and measured."""
    count = 24
    tracks, labels = [], []
    for index in range(count):
        generator = np.random.default_rng(index)
        attributes = motions.sample_attributes(generator)
        wave = _speech(FRAMES / motions.VIDEO_RATE, index)
        quiet, kind = np.zeros_like(wave), index % 3
        state = np.full(FRAMES, kind, dtype=np.uint8)
        driven = motions.drive(wave if kind == 1 else quiet, wave if kind == 2 else quiet, state, attributes, generator)
        tracks.append(driven[0])
        labels.append((attributes.expression, attributes.gaze, attributes.pose))
    identity, motion = sample_identities(count, 3, "test"), torch.from_numpy(np.stack(tracks))
    frames = render(identity, motion).float() / 255.0
    return {"identity": identity, "motion": motion, "labels": torch.tensor(labels), "frames": frames}


def _correlation(measured: torch.Tensor, true: torch.Tensor) -> tuple[float, torch.Tensor]:
    """Mean correlation within clips and slope per clip of measured against true, where the truth moves."""
    moving = true.std(1) > 0.05
    a = (measured - measured.mean(1, keepdim=True))[moving]
    b = (true - true.mean(1, keepdim=True))[moving]
    covariance = (a * b).sum(1)
    return float((covariance / (a.norm(dim=1) * b.norm(dim=1) + 1e-9)).mean()), covariance / (b * b).sum(1)


@pytest.mark.parametrize(
    ("track", "part", "least"),
    [
        ("mouth", "mouth_open", 0.97), ("head_x", "head_x", 0.97), ("head_y", "head_y", 0.97),
        ("roll", "roll", 0.95), ("blink", "blink", 0.95), ("gaze_x", "gaze_x", 0.85),
    ],
)  # fmt: skip
def test_measured_motion_follows_the_commanded_motion_within_every_clip(
    world: dict[str, torch.Tensor], track: str, part: str, least: float
) -> None:
    measured = getattr(measure(world["frames"]), track)
    correlation, slope = _correlation(measured, world["motion"][..., PARTS[part]])
    assert correlation > least
    assert abs(float(slope.mean()) - 1.0) < 0.15  # amplitude is faithful, not only timing


@pytest.mark.parametrize(("track", "least"), [("smile", 0.95), ("brow", 0.93)])
def test_slow_expression_is_read_off_each_clip(world: dict[str, torch.Tensor], track: str, least: float) -> None:
    measured = getattr(measure(world["frames"]), track).mean(1)
    true = world["motion"][..., PARTS[track]].mean(1)
    assert float(torch.corrcoef(torch.stack([measured, true]))[0, 1]) > least


def test_labels_are_read_back_from_pixels(world: dict[str, torch.Tensor]) -> None:
    assert float((classify(measure(world["frames"])) == world["labels"]).float().mean()) > 0.96


def test_one_picture_identifies_the_character_under_other_motion(world: dict[str, torch.Tensor]) -> None:
    other = world["motion"].roll(1, dims=0)[:, 20:21].clone()
    other[..., PARTS["blink"]] = 0.0
    single = measure(render(world["identity"], other).float() / 255.0).identity[:, 0]
    clips = measure(world["frames"]).identity.mean(1)
    assert single.shape[1] == len(IDENTITY_NAMES)
    assert torch.equal(torch.cdist(single, clips).argmin(1), torch.arange(len(clips)))
    assert 0.5 < float(clips.std(0).mean()) < 1.5  # scaled to the spread between characters


def test_measuring_anything_gives_finite_numbers() -> None:
    noise = torch.rand(2, 8, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    odd = torch.stack([noise[0], torch.zeros_like(noise[0]), torch.full_like(noise[0], float("nan"))])
    tracks = measure(odd)
    assert all(torch.isfinite(value).all() for value in vars(tracks).values())
    assert classify(tracks).shape == (3, 3)


def test_measure_names_the_shape_it_was_given() -> None:
    with pytest.raises(ValueError, match=r"\(8, 3, 64, 64\)"):
        measure(torch.zeros(8, 3, 64, 64))


def test_the_drawing_is_the_same_at_every_size(world: dict[str, torch.Tensor]) -> None:
    identity, motion = world["identity"][:4], world["motion"][:4, :1]
    small = render(identity, motion, 64).float()[:, 0]
    large = torch.nn.functional.avg_pool2d(render(identity, motion, 256).float()[:, 0], 4)
    assert float((small - large).abs().mean()) < 6.0  # of 255: only the width of soft edges differs


def test_characters_differ_and_follow_their_key() -> None:
    first = sample_identities(32, 0, "train")
    assert first.shape == (32, len(IDENTITY)) and 0.0 <= float(first.min()) and float(first.max()) <= 1.0
    assert torch.equal(first, sample_identities(32, 0, "train"))
    assert not torch.equal(first, sample_identities(32, 0, "test"))
    pictures = render(first, torch.zeros(32, 1, len(MOTION))).float().flatten(1)
    distance = torch.cdist(pictures, pictures) / pictures.shape[1] ** 0.5
    assert float((distance + 1e3 * torch.eye(32)).min()) > 10.0  # of 255, root mean square


def test_motion_is_causal_and_the_nod_comes_late() -> None:
    frames, cut = 96, 48
    wave = _speech(frames / motions.VIDEO_RATE, 5)
    later = wave.copy()
    later[motions.PAST_SAMPLES + cut * motions.SAMPLE_RATE // motions.VIDEO_RATE :] = 0.0
    assert np.array_equal(motions.mouth(wave, frames)[0][:cut], motions.mouth(later, frames)[0][:cut])
    reaction = np.flatnonzero(motions.nod(wave, frames) != motions.nod(later, frames))
    assert cut + motions.NOD_DELAY <= reaction[0] <= cut + motions.NOD_DELAY + 3


def test_silence_closes_the_mouth_and_speech_uses_its_range() -> None:
    quiet = np.zeros(motions.PAST_SAMPLES + 4 * motions.SAMPLE_RATE, dtype=np.float32)
    assert not motions.mouth(quiet, 96)[0].any() and not motions.nod(quiet, 96).any()
    opening = motions.mouth(_speech(4.0, 1), 96)[0]
    assert opening.min() < 0.1 and opening.max() > 0.6 and (opening >= 1.0).mean() < 0.05


def test_drive_repeats_with_its_generator_and_moves_in_silence() -> None:
    quiet = np.zeros(motions.PAST_SAMPLES + 2 * motions.SAMPLE_RATE, dtype=np.float32)
    state, attributes = np.zeros(FRAMES, dtype=np.uint8), motions.Attributes(1, 2, 0)
    runs = [motions.drive(quiet, quiet, state, attributes, np.random.default_rng(seed))[0] for seed in (7, 7, 8)]
    assert np.array_equal(runs[0], runs[1]) and not np.array_equal(runs[0], runs[2])
    assert runs[0].shape == (FRAMES, len(MOTION)) and runs[0][:, PARTS["head_x"]].std() > 0.05


def test_captions_tell_gaze_from_pose_with_different_words() -> None:
    generator = np.random.default_rng(0)
    for attributes in (motions.Attributes(3, 1, 2), motions.Attributes(0, 0, 0)):
        told = {motions.caption(attributes, generator) for _ in range(40)}
        assert len(told) > 8 and all(len(text.split()) <= 16 for text in told)
    text = motions.caption(motions.Attributes(2, 1, 2), generator)
    assert "left" in text and "right" in text
