"""Speech features, timelines, prepared records and their reading back: small data made on the spot."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from torch import Tensor

from distill.data import dataset, puppet, redraw, sentences, speech, timeline, version, video, voices
from distill.data.batch import keyed_generator
from distill.data.prepare import PrepareConfig, draft, prepare
from distill.data.records import from_dataset, to_dataset
from distill.errors import UserError
from evaluation.geometry import measure
from teacher.audio import SAMPLE_RATE, log_mel
from teacher.codec import PCACodec
from teacher.conditions import AUDIO_PER_LATENT, PAST, SILENCE

SMALL = PrepareConfig(
    train_identities=6, train_clips=2, validation_identities=2, test_identities=4, clip_frames=24, size=32, channels=8
)


def murmur(seconds: float, seed: int) -> Tensor:
    """Syllable-like noise, so that the tests need neither piper nor espeak."""
    time = torch.arange(int(seconds * SAMPLE_RATE)) / SAMPLE_RATE
    noise = torch.randn(len(time), generator=keyed_generator(seed, "murmur"))
    return speech.level(noise * (0.05 + torch.sin(2 * torch.pi * 2.3 * time).clamp(min=0)) * 0.2)


@pytest.fixture(scope="module")
def said() -> list[speech.Utterance]:
    return [
        speech.Utterance(murmur(2.5, 100 * i + 10 * j + k), "murmur", role, split, f"{role} {split} {k}")
        for i, split in enumerate(("train", "validation", "test"))
        for j, role in enumerate(("speak", "listen"))
        for k in range(3)
    ]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, said: list[speech.Utterance]) -> Path:
    """A small prepared data set whose speech corpus is the murmur."""
    root = tmp_path_factory.mktemp("data")
    cache = speech.cache_folder(root / "speech")
    cache.mkdir(parents=True)
    speech.save(said, cache)
    prepare(SMALL, root / "small")
    return root / "small"


def test_features_never_look_ahead() -> None:
    wave = murmur(2.0, 1)
    whole = log_mel(wave)
    for count in (1, 7, 32, 50):
        changed = wave.clone()
        changed[count * 1000 // 3 :] = 0.5
        assert torch.equal(log_mel(changed)[:count], whole[:count])
        assert not torch.equal(log_mel(changed)[count], whole[count])


def test_features_of_a_prefix_are_a_prefix_of_the_features() -> None:
    wave = murmur(3.0, 2)
    whole = log_mel(wave)
    for samples in (400, 12_345, 32_000):
        part = log_mel(wave[:samples])
        assert part.shape == (samples * 48 // SAMPLE_RATE, 32)
        torch.testing.assert_close(part, whole[: len(part)])


def test_a_click_after_a_minute_is_felt_in_its_own_feature() -> None:
    wave = torch.zeros(62 * SAMPLE_RATE)
    wave[60 * SAMPLE_RATE - 150] = 1.0  # within the last window that ends with second 60, and in none before
    loud = (log_mel(wave) > SILENCE).any(-1).nonzero().flatten()
    assert loud[0] == 60 * 48 - 1
    assert len(log_mel(wave)) == 62 * 48


def test_silence_has_the_value_that_dropped_audio_has() -> None:
    assert torch.equal(log_mel(torch.zeros(4000)), torch.full((12, 32), SILENCE))


def test_resampling_moves_a_tone_and_keeps_its_loudness() -> None:
    time = torch.arange(22_050) / 22_050
    tone = torch.sin(2 * torch.pi * 441 * time)
    same = voices.resample(tone, 22_050 / SAMPLE_RATE)
    assert same.numel() == SAMPLE_RATE
    expected = torch.sin(2 * torch.pi * 441 * torch.arange(SAMPLE_RATE) / SAMPLE_RATE)
    torch.testing.assert_close(same, expected, atol=1e-3, rtol=0)


def test_loudness_is_normalized_and_silence_trimmed() -> None:
    wave = torch.cat([torch.zeros(8000), 0.01 * torch.randn(16_000, generator=keyed_generator(0)), torch.zeros(8000)])
    done = speech.level(wave)
    assert 16_000 <= done.numel() < 19_000
    assert done[2000:14_000].square().mean().sqrt().item() == pytest.approx(0.1, rel=0.05)


def test_scripts_are_disjoint_by_role_and_split() -> None:
    texts = [text for script in (sentences.SPEAK, sentences.LISTEN) for lines in script.values() for text in lines]
    assert len(set(texts)) == len(texts) >= 120


def test_tones_and_noise_are_not_taken_for_speech() -> None:
    time = torch.arange(2 * SAMPLE_RATE) / SAMPLE_RATE
    assert not voices.is_speech(torch.sin(2 * torch.pi * 200 * time))
    assert not voices.is_speech(torch.randn(len(time), generator=keyed_generator(1)))


def test_the_formant_voice_is_the_same_in_every_process() -> None:
    pytest.importorskip("espeakng_loader")
    program = (
        "import hashlib; from distill.data import voices; espeak = voices.Espeak();"
        "waves = [espeak.say('Tell me about the garden.', name, 160, 50) for name in voices.ESPEAK_VOICES];"
        "assert all(voices.is_speech(wave) for wave in waves);"
        "print([hashlib.sha256(wave.numpy().tobytes()).hexdigest() for wave in waves])"
    )
    first, second = (subprocess.run([sys.executable, "-c", program], capture_output=True, text=True) for _ in range(2))
    assert first.returncode == 0, first.stderr
    assert first.stdout == second.stdout


@pytest.mark.parametrize("kind", timeline.KINDS)
def test_one_side_is_silent_while_the_other_talks(kind: str, said: list[speech.Utterance]) -> None:
    utterances = {state: [u for u in said if u.role == role] for state, role in ((1, "speak"), (2, "listen"))}
    for seed in range(20):
        generator = keyed_generator(seed, kind)
        segments = timeline.plan(kind, 48, generator)
        speak, listen, state = timeline.lay(segments, utterances, generator)
        assert speak.shape == listen.shape == (56_000,)
        assert state.shape == (48,)
        assert not (speak.bool() & listen.bool()).any()
        for frame, now in enumerate(state.tolist(), start=timeline.PAST_FRAMES):
            sound = slice(timeline.sample_at(frame), timeline.sample_at(frame + 1))
            assert now == 1 or not speak[sound].any()
            assert now == 2 or not listen[sound].any()
        assert len(state.unique()) == (2 if kind == "switching" else 1)


def test_preparation_is_reproducible(said: list[speech.Utterance]) -> None:
    first, second = (draft(SMALL, "train", said) for _ in range(2))
    assert first["caption"] == second["caption"]
    assert all(torch.equal(first[name], second[name]) for name in first if name != "caption")
    assert not torch.equal(first["motion"], draft(PrepareConfig(**{**vars(SMALL), "seed": 1}), "train", said)["motion"])


def test_batches_have_the_shapes_of_the_contract(folder: Path) -> None:
    data = dataset.load(folder)
    batch = data.sample(5, keyed_generator(0, "batch"))
    frames, latents = SMALL.clip_frames, SMALL.clip_frames // 4
    assert batch.latents is not None
    assert batch.latents.shape == (5, latents, 8, 4, 4)
    assert batch.cond.speak.shape == batch.cond.listen.shape == (5, AUDIO_PER_LATENT * (PAST + latents), 32)
    assert batch.cond.num_frames == latents
    assert batch.cond.refs.shape == (5, 3, 8, 4, 4)
    assert batch.cond.ref_mask[:, 0].all()
    assert not batch.cond.refs[~batch.cond.ref_mask].any()
    assert batch.motion.shape == (5, frames, len(puppet.MOTION))
    assert batch.state.shape == batch.driven_mouth.shape == batch.driven_nod.shape == (5, frames)
    assert batch.labels.shape == (5, 3)
    again = data.sample(5, keyed_generator(0, "batch"))
    assert torch.equal(batch.index, again.index)
    assert torch.equal(batch.select(torch.tensor([3])).motion[0], batch.motion[3])


def test_splits_share_neither_characters_nor_utterances(folder: Path, said: list[speech.Utterance]) -> None:
    splits = [dataset.load(folder, split) for split in ("train", "validation", "test")]
    identities = [set(split.all().identity.tolist()) for split in splits]
    assert sum(map(len, identities)) == len(set.union(*identities)) == 12
    characters = torch.cat([split.characters for split in splits]).unique(dim=0)
    assert len(characters) == 12
    assert len({u.text for u in said}) == len(said)


def test_test_split_holds_every_state(folder: Path) -> None:
    state = dataset.load(folder, "test").all().state
    assert set(state.flatten().tolist()) == {0, 1, 2}


def test_stored_latents_decode_to_the_redrawn_frames(folder: Path) -> None:
    data = dataset.load(folder, "test")
    index = torch.arange(len(data))
    latents = data.all().latents
    assert latents is not None
    expected = data.codec().encode(data.frames(index).float() / 255)
    torch.testing.assert_close(latents, expected, atol=5e-3, rtol=1e-3)  # half precision on disk


def test_reference_draws_differ_in_chance_alone_and_are_measured_once(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = dataset.load(folder, "test")
    batch, codec = data.all(), data.codec()
    one, again, other = (redraw.another_draw(data, batch, codec, 7, draw) for draw in (0, 0, 1))
    assert torch.equal(one, again) and not torch.equal(one, other)
    measured = []
    monkeypatch.setattr(redraw, "measure", lambda frames: measured.append(frames) or measure(frames))
    first, second = (redraw.reference_tracks(data, batch, codec, 7) for _ in range(2))
    assert len(first) == len(measured) == redraw.REFERENCE_DRAWS
    for kept, made in zip(second, first, strict=True):
        assert all(torch.equal(getattr(kept, name), value) for name, value in vars(made).items())
    torch.testing.assert_close(first[0].mouth, measure(codec.decode(batch.latents)).mouth, atol=1e-4, rtol=1e-4)


def test_stored_waves_give_the_stored_features(folder: Path) -> None:
    data = dataset.load(folder, "test")
    index = torch.tensor([3, 1])
    speak, listen = data.waves(index)
    cond = data.all().select(index).cond
    for wave, features in ((speak, cond.speak), (listen, cond.listen)):
        assert (log_mel(wave) - features).abs().quantile(0.99) < 0.05  # 16-bit samples, half-precision features
    with pytest.raises(ValueError, match="keeps no waves"):
        dataset.load(folder).waves(index)


def test_a_second_call_does_nothing_and_another_config_rebuilds(folder: Path, capsys: pytest.CaptureFixture) -> None:
    before = (folder / "fingerprint.json").stat().st_mtime_ns
    first = prepare(SMALL, folder)
    assert "up to date" in capsys.readouterr().out
    assert (folder / "fingerprint.json").stat().st_mtime_ns == before
    other = folder.parent / "other"
    second = prepare(PrepareConfig(**{**vars(SMALL), "codec": str(folder / "codec"), "seed": 5}), other)
    assert first != second
    assert PCACodec.load(other / "codec").fingerprint() == PCACodec.load(folder / "codec").fingerprint()
    assert not [path for path in folder.parent.iterdir() if path.name.startswith(".")]


def test_missing_and_stale_data_are_reported_with_code_3(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no prepared data") as missing:
        dataset.load(tmp_path / "nowhere")
    facts = json.loads((folder / "fingerprint.json").read_text())
    facts["inputs"]["code"] = "older"
    (tmp_path / "fingerprint.json").write_text(json.dumps(facts))
    with pytest.raises(UserError, match="another version") as stale:
        dataset.load(tmp_path)
    with pytest.raises(UserError, match="four shares") as wrong:
        prepare(PrepareConfig(mix=(0.5, 0.6, 0.0, 0.0)), tmp_path / "out")
    assert missing.value.code == stale.value.code == wrong.value.code == 3


def test_streams_cover_their_length_and_use_test_characters(folder: Path) -> None:
    batch, speak, listen = dataset.stream_case(folder, characters=3, seconds=20, kind="mix", seed=4)
    assert batch.latents is None
    assert batch.cond.num_frames == 120
    assert batch.state.shape == (3, 480)
    assert speak.shape == listen.shape == (3, 24_000 + 320_000)
    assert not speak[:, :24_000].any()
    assert set(batch.state.flatten().tolist()) == {0, 1, 2}
    assert set(batch.identity.tolist()) <= set(dataset.load(folder, "test").all().identity.tolist())
    again, _, _ = dataset.stream_case(folder, characters=3, seconds=20, kind="mix", seed=4)
    assert torch.equal(batch.motion, again.motion)
    with pytest.raises(UserError, match="were asked for"):
        dataset.stream_case(folder, characters=50)


def test_records_survive_the_disk_format(tmp_path: Path) -> None:
    table = {
        "latents": torch.randn(3, 2, 4, generator=keyed_generator(2)).half().float(),
        "ref_mask": torch.tensor([[True, False], [True, True], [False, False]]),
        "state": torch.arange(6, dtype=torch.uint8).reshape(3, 2),
        "index": torch.arange(3),
        "caption": ["a", "b", "c"],
    }
    arrow, shapes = to_dataset(table)
    back = from_dataset(arrow, shapes, list(table))
    assert back.pop("caption") == table.pop("caption")
    assert all(torch.equal(back[name], table[name]) and back[name].dtype == table[name].dtype for name in table)


def test_comments_do_not_make_a_cache_stale() -> None:
    assert version.meaning('"""One."""\nx = 1  # why\n') == version.meaning('"""Two."""\n\nx = 1\n')
    assert version.meaning("x = 1") != version.meaning("x = 2")


def write_mp4(path: Path, frames: np.ndarray, wave: np.ndarray) -> None:
    """frames uint8 [F, H, W, 3] at 25 fps and wave [S] at 16 kHz -> h264 + AAC."""
    with av.open(str(path), "w") as container:
        picture = container.add_stream("libx264", rate=25)
        picture.height, picture.width = frames.shape[1:3]
        picture.pix_fmt = "yuv420p"
        sound = container.add_stream("aac", rate=SAMPLE_RATE)
        for image in frames:
            container.mux(picture.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        block = av.AudioFrame.from_ndarray(wave[None].astype(np.float32), format="fltp", layout="mono")
        block.rate = SAMPLE_RATE
        container.mux(sound.encode(block))
        container.mux(picture.encode())
        container.mux(sound.encode())


def test_real_video_becomes_the_same_kind_of_record(folder: Path, tmp_path: Path) -> None:
    count, seconds = 125, 5  # 25 fps
    shade = np.linspace(20, 230, count).astype(np.uint8)
    frames = np.broadcast_to(shade[:, None, None, None], (count, 48, 80, 3)).copy()
    wave = np.zeros(seconds * SAMPLE_RATE)
    wave[2 * SAMPLE_RATE :] = murmur(4.0, 9)[: 3 * SAMPLE_RATE].numpy()
    write_mp4(tmp_path / "clip.mp4", frames, wave)

    pictures, heard = video.read_video(tmp_path / "clip.mp4", 32)
    assert len(pictures) in (119, 120)  # 24 fps
    expected = np.interp(np.arange(len(pictures)) / 24, np.arange(count) / 25, shade)
    assert np.abs(pictures.float().mean((1, 2, 3)).numpy() - expected).max() < 6
    assert heard[: int(1.8 * SAMPLE_RATE)].abs().max() < 0.02 < heard[int(2.2 * SAMPLE_RATE) :].abs().max()

    codec = PCACodec.load(folder / "codec")
    table = video.prepare_video([tmp_path / "clip.mp4"], ["a calm person"], codec, SMALL)
    reference = dataset.load(folder, "test").all()
    assert reference.latents is not None
    assert len(table["index"]) == 3  # (120 - 36) // 24
    assert table["latents"].shape[1:] == reference.latents.shape[1:]
    assert table["speak"].shape[1:] == reference.cond.speak.shape[1:]
    assert table["refs"].shape[1:] == reference.cond.refs.shape[1:]
    assert (table["listen"] == SILENCE).all()
    with pytest.raises(UserError, match="a clip and its past need"):
        video.prepare_video([tmp_path / "clip.mp4"], ["a"], codec, PrepareConfig(clip_frames=96, size=32))
