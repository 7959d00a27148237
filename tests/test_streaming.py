"""`make stream` and `make latency`: films of any recording in constant memory, and figures that mean what they say."""

from __future__ import annotations

import io
import itertools
import json
import time
import wave
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image
from small_online import images, small_model, tone
from torch import Tensor

from distill import streaming
from distill.errors import UserError
from distill.options import Options
from evaluation import latency
from evaluation.film import Film, open_film
from evaluation.latency_report import page, table, thinned, verdicts
from evaluation.sound import read_audio, seconds_of
from evaluation.video import mp4_bytes
from student.demo import load_images


def write_audio(path: Path, rate: int, layout: str, codec: str, seconds: float = 1.5, channels=(440, 440)) -> None:
    """A sine per channel; the second channel of a stereo file may have another pitch."""
    at = np.arange(round(seconds * rate)) / rate
    planes = np.stack([0.5 * np.sin(2 * np.pi * f * at) for f in channels[: 1 if layout == "mono" else 2]])
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate, layout=layout)
        frame = av.AudioFrame.from_ndarray(planes.astype(np.float32), format="fltp", layout=layout)
        frame.sample_rate = rate
        resampler = av.AudioResampler(format=stream.codec_context.format, layout=layout, rate=rate)
        for piece in resampler.resample(frame):
            container.mux(stream.encode(piece))
        container.mux(stream.encode())


def pitch(heard: Tensor) -> float:
    middle = heard[4000:20000]
    return float(torch.fft.rfft(middle * torch.hann_window(len(middle))).abs().argmax()) * 16000 / len(middle)


# ---- sound ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "rate", "layout", "codec"),
    [("a.wav", 16000, "mono", "pcm_s16le"), ("b.wav", 44100, "stereo", "pcm_s24le"), ("c.mp3", 48000, "stereo", "mp3"),
     ("d.flac", 8000, "mono", "flac"), ("e.ogg", 48000, "mono", "libopus"), ("f.m4a", 22050, "stereo", "aac")],
)  # fmt: skip
def test_audio_of_any_kind_and_rate_becomes_mono_at_16_khz(tmp_path, name, rate, layout, codec) -> None:
    write_audio(tmp_path / name, rate, layout, codec)
    pieces = list(read_audio(tmp_path / name))
    heard = torch.cat(pieces)
    assert heard.dtype == torch.float32 and abs(len(heard) / 16000 - 1.5) < 0.1 and len(pieces) > 1
    assert abs(pitch(heard) - 440) < 2 and 0.32 < heard[4000:20000].square().mean().sqrt() < 0.38
    assert seconds_of(tmp_path / name) == pytest.approx(1.5, abs=0.1)


def test_both_channels_of_a_stereo_file_are_heard(tmp_path) -> None:
    write_audio(tmp_path / "two.wav", 32000, "stereo", "pcm_s16le", channels=(300, 900))
    spectrum = torch.fft.rfft(torch.cat(list(read_audio(tmp_path / "two.wav")))[:16000]).abs()
    assert spectrum[300] / spectrum[900] == pytest.approx(1, abs=0.05) and spectrum[900] > 50 * spectrum[600]


def test_what_cannot_be_read_as_audio_is_told_in_one_sentence(tmp_path) -> None:
    (tmp_path / "text.wav").write_text("no sound")
    film = tmp_path / "silent.mp4"
    with av.open(str(film), "w") as container:
        stream = container.add_stream("libx264", rate=24)
        stream.width = stream.height = 32
        container.mux(stream.encode(av.VideoFrame.from_ndarray(np.zeros((32, 32, 3), np.uint8), format="rgb24")))
        container.mux(stream.encode())
    with wave.open(str(tmp_path / "empty.wav"), "wb") as empty:
        empty.setparams((1, 2, 16000, 0, "NONE", ""))
    wanted = {
        "gone.wav": "cannot be read: No such file",
        "text.wav": "cannot be read as audio",
        "silent.mp4": "no sound",
        "empty.wav": "holds no audio",
        ".": "cannot be read",
    }
    for name, sentence in wanted.items():
        with pytest.raises(ValueError, match=sentence) as told:
            list(read_audio(tmp_path / name))
        assert "\n" not in str(told.value)


# ---- film -------------------------------------------------------------------------------------------------


def decoded(source: str | bytes) -> tuple[np.ndarray, Tensor]:
    """Pictures [F, H, W, 3] and sound [S] of a film, by its name or its bytes."""

    def opened() -> str | io.BytesIO:
        return io.BytesIO(source) if isinstance(source, bytes) else source

    with av.open(opened()) as container:
        pictures = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    with av.open(opened()) as container:
        sound = [torch.from_numpy(frame.to_ndarray()[0]) for frame in container.decode(audio=0)]
    return np.stack(pictures), torch.cat(sound)


def test_a_film_in_pieces_is_the_film_in_one_piece(tmp_path) -> None:
    frames = torch.zeros(48, 3, 32, 32, dtype=torch.uint8)
    for number in range(48):
        frames[number, :, :, : number // 2] = 200
    sound = 0.3 * torch.sin(torch.arange(32000) / 16000 * 2 * torch.pi * 440)
    with open_film(tmp_path / "film.mp4", 32, 32) as film:
        for start in range(0, 48, 12):
            film.sound(sound[start * 16000 // 24 : (start + 12) * 16000 // 24])
            film.show(frames[start : start + 12])
    pieces, whole = decoded(str(tmp_path / "film.mp4")), decoded(mp4_bytes(frames, sound, scale=1))
    assert pieces[0].shape == whole[0].shape == (48, 32, 32, 3)
    # The encoder's threads may weigh a block differently from run to run; a picture out of place differs by 200.
    assert np.abs(pieces[0].astype(int) - whole[0]).max() < 40
    assert np.abs(pieces[0].astype(int) - frames.permute(0, 2, 3, 1).numpy()).mean() < 6
    assert abs(pitch(pieces[1]) - 440) < 2 and torch.allclose(pieces[1][:30000], whole[1][:30000], atol=0.05)


def test_a_film_that_fails_leaves_nothing_and_keeps_what_was_there(tmp_path) -> None:
    (tmp_path / "film.mp4").write_text("the old one")
    with pytest.raises(ZeroDivisionError), open_film(tmp_path / "film.mp4", 32, 32) as film:
        film.show(torch.zeros(12, 3, 32, 32, dtype=torch.uint8))
        raise ZeroDivisionError
    assert [path.name for path in tmp_path.iterdir()] == ["film.mp4"]
    assert (tmp_path / "film.mp4").read_text() == "the old one"


def test_a_film_without_sound_is_silent_to_its_end() -> None:
    buffer = io.BytesIO()
    film = Film(buffer, 33, 33)
    film.show(torch.zeros(36, 3, 33, 33, dtype=torch.uint8))
    film.close()
    pictures, sound = decoded(buffer.getvalue())
    assert pictures.shape == (36, 32, 32, 3) and abs(len(sound) - 24000) <= 2048 and sound.abs().max() < 1e-3


# ---- make stream ------------------------------------------------------------------------------------------


@pytest.fixture
def exported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small export with one character and one recording; the working folder is empty."""
    folder = tmp_path / "lpm"
    small_model().save_pretrained(folder)
    for number, picture in enumerate(images()):
        Image.fromarray((picture.permute(1, 2, 0) * 255).byte().numpy()).save(folder / f"{number}.png")
    write_audio(folder / "hello.wav", 16000, "mono", "pcm_s16le", 1.2)
    index = {
        "characters": {"ada": {"references": ["0.png", "1.png"]}},
        "voices": {"hello": {"file": "hello.wav", "role": "speak", "text": "Hello."}},
        "texts": {"calm": "a calm person"},
    }
    (folder / "demo.json").write_text(json.dumps(index))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(streaming, "SIDE", 64)
    return folder


def options(folder: Path, **own: str) -> Options:
    given = {"audio": "", "listen": "", "character": "", "text": "", "out": "", "model": str(folder), **own}
    return Options(run="mine", several=True, own=given)


def test_make_stream_films_two_recordings_of_different_length_to_the_end_of_the_longer(exported, capsys) -> None:
    write_audio(exported.parent / "heard.ogg", 48000, "stereo", "libopus", 2.2, channels=(880, 880))
    said = streaming.stream(options(exported, audio="hello", listen="heard.ogg"))
    target = Path("runs/mine/streams/ada-hello-heard.mp4")
    assert said.startswith(f"Wrote {target} (2.5 s of video, ") and "x real time" in said and "next: " in said
    pictures, sound = decoded(str(target))
    assert pictures.shape == (60, 64, 64, 3) and abs(len(sound) - 40000) <= 2048
    early, late = (torch.fft.rfft(sound[s : s + 8000]).abs() for s in (4000, 22000))
    assert early[220] > 50 and early[440] > 50 and late[440] > 50 and late[220] < 5  # both voices, then only one
    assert np.abs(np.diff(pictures.astype(int), axis=0)).max() > 0


def test_a_film_is_what_the_session_shows_for_that_audio_text_and_character(exported, monkeypatch) -> None:
    shown: list[Tensor] = []
    monkeypatch.setattr(Film, "show", lambda self, frames: shown.append(frames))
    monkeypatch.setattr(streaming, "SIDE", 32)  # as they come, not enlarged
    streaming.stream(options(exported, audio="hello", text="calm", out="mine.mp4"))
    session = streaming.load(exported).stream(load_images([exported / "0.png", exported / "1.png"]), "a calm person")
    session.push(speak=torch.cat(list(read_audio(exported / "hello.wav"))))
    session.finish()
    expected = torch.cat([chunk.frames for chunk in session]).permute(0, 3, 1, 2)
    assert torch.equal(torch.cat(shown), expected)


@pytest.mark.parametrize(
    ("own", "sentence", "code"),
    [({}, "nothing to play.*recording of the model: hello", 2), ({"audio": "gone.wav"}, "cannot be read", 3),
     ({"audio": "lpm/config.json"}, "cannot be read as audio", 3),
     ({"audio": "hello", "character": "zoe"}, "no character", 2),
     ({"audio": "hello", "text": "a " * 17}, "17 words", 2),
     ({"audio": "hello", "model": "nowhere"}, "no Online LPM at", 2)],
)  # fmt: skip
def test_a_mistake_is_one_sentence_and_leaves_no_film(exported, own: dict, sentence: str, code: int) -> None:
    with pytest.raises(UserError, match=sentence) as told:
        streaming.stream(options(exported, **own))
    assert told.value.code == code and "\n" not in told.value.message
    assert not list(exported.parent.rglob("*.mp4*"))


def test_long_recordings_pass_in_blocks_however_their_files_are_cut(monkeypatch) -> None:
    """Neither side runs ahead of the other by more than a block, so neither is kept."""
    pulled = [0, 0]

    def pieces(path: str):
        which, size = (0, 1152) if path == "speak" else (1, 97)
        for _ in range(200_000 // size):
            pulled[which] += size
            yield torch.full((size,), float(which + 1))

    monkeypatch.setattr(streaming, "read_audio", pieces)
    total = 0
    for said, heard in streaming._pieces("speak", "listen"):  # type: ignore[arg-type]
        assert len(said) == len(heard) and set(said.unique().tolist()) <= {0.0, 1.0}
        total += len(said)
        assert max(pulled) - total < streaming.BLOCK + 1152
    assert total == max(pulled)


# ---- latency ----------------------------------------------------------------------------------------------


def test_quantiles_are_those_of_the_nearest_rank() -> None:
    values = list(range(1, 101))
    assert [latency.quantile(values, q) for q in (0.5, 0.95, 0.99, 1.0)] == [50, 95, 99, 100]
    assert latency.quantile([7.0], 0.95) == 7.0


def test_growth_is_found_where_it_is_and_not_where_noise_is() -> None:
    generator = torch.Generator().manual_seed(0)
    noise = (1 + 0.3 * torch.rand(4000, generator=generator)).tolist()
    spikes = [20.0 if i % 50 == 0 else x for i, x in enumerate(noise)]  # a busy machine
    flat = latency.Track(spikes, spikes, [100_000_000 + 1000 * (i % 7) for i in range(4000)])
    assert all(abs(value) < latency.GROWTH for value in latency.growth(flat).values())
    rising = [x * (1 + 0.05 * i / 4000) for i, x in enumerate(noise)]
    grown = latency.growth(latency.Track(rising, rising, [100_000_000 + 1000 * i for i in range(4000)]))
    assert grown["cpu"] > latency.GROWTH and grown["memory"] > latency.GROWTH


def test_horizons_are_read_off_one_run_at_their_marks() -> None:
    track = latency.Track([0.1] * 100 + [0.2] * 40, [0.05] * 140, list(range(2**20, 2**20 + 140)))
    found = latency.read_off(track, 0.5)
    assert list(found) == ["10 s", "1 min", "70 s"] and [f["chunks"] for f in found.values()] == [20, 120, 140]
    assert found["10 s"]["p95_s"] == 0.1 and found["1 min"]["p95_s"] == 0.2
    assert found["70 s"]["real_time_factor"] == pytest.approx((10 + 8) / 70)
    assert found["10 s"]["peak_memory_mib"] == pytest.approx((2**20 + 19) / 2**20)


def test_simulated_turns_hold_every_sample_once_and_go_on_for_ever() -> None:
    recordings = [("speak", tone(5000, 1)), ("listen", tone(7000, 2))]
    pieces = list(itertools.islice(latency.turns(recordings, 1000), 90))
    speak, listen = (torch.cat([piece[i] for piece in pieces]) for i in range(2))
    assert torch.equal(speak[:5000], recordings[0][1]) and not listen[:21000].any()
    assert torch.equal(listen[21000:28000], recordings[1][1]) and not speak[5000:44000].any()
    assert torch.equal(speak[44000:49000], recordings[0][1])


def test_the_first_frame_waits_for_its_chunk_of_audio_and_one_computation() -> None:
    model = small_model(chunk=1)
    [found] = latency.first_frames(model, images(), "", tone(3000), trials=1, later=2)
    assert 1 / 6 < found["first_frame_s"] < 1 / 6 + found["compute_s"] + 1.5  # a busy machine wakes late
    assert len(found["later_s"]) == 2 and min(found["later_s"]) > 0


def test_the_comparison_counts_what_passes_through_the_networks() -> None:
    from conftest import conditions, small_dit

    model, teacher = small_model(), small_dit(7, torch.float32, mels=32)
    cond = conditions(12, batch=1, dtype=torch.float32)
    cond = type(cond)(**{**vars(cond), "speak": torch.zeros(1, 168, 32), "listen": torch.zeros(1, 168, 32)})

    def sample(cond, generator):
        refs, x = teacher.encode_refs(cond), torch.randn(1, 12, 4, 4, 4, generator=generator)
        for _ in range(5):
            x = teacher(x, torch.ones(1), cond, refs)
        time.sleep(0.05)
        return x

    audio = latency.turns([("speak", tone(9000))], 4000)
    found = latency.compare(model, images(), "", teacher, sample, cond, audio, rounds=1)
    assert found["video_seconds"] == 2.0
    assert found["student"]["evaluations"] == 3 and found["student"]["with_writes"] == 5
    assert (
        found["student"]["calls"] == 4 * 3 and found["teacher"]["calls"] == 5 and found["teacher"]["evaluations"] == 5
    )
    assert found["evaluations_ratio"] == pytest.approx(5 / 3) and found["calls_ratio"] == pytest.approx(5 / 12)
    assert found["time_ratio"] > 0.05 and not teacher.patch_embedding._forward_pre_hooks


def test_a_session_that_gets_slower_is_noticed_beside_a_young_one(monkeypatch) -> None:
    monkeypatch.setattr(latency, "PAIRED", 5)
    model = small_model(chunk=1)
    audio = latency.turns([("speak", tone(9000))], 4000)
    old, young = (model.stream(images(), seed=seed, look_ahead=0) for seed in range(2))
    slow = old.next_chunk

    def slower():
        until = time.process_time() + 0.02
        while time.process_time() < until:
            pass
        return slow()

    old.next_chunk = slower  # type: ignore[method-assign]
    assert latency.against_young(old, young, audio) > latency.GROWTH


def told(**changes) -> dict:
    horizon = {"chunks": 20, "p50_s": 0.1, "p95_s": 0.2, "p99_s": 0.3, "cpu_p50_s": 0.1}
    horizon |= {"real_time_factor": 0.2, "peak_memory_mib": 300.0}
    pair = {"evaluations_ratio": 33.3, "evaluations_ratio_with_writes": 20.0, "time_ratio": 16.0, "cpu_ratio": 16.0}
    return {
        "model": "lpm", "chunk_seconds": 0.5, "horizons": {"10 s": horizon},
        "first_frame": [{"first_frame_s": 0.6, "later_s": [0.1, 0.2]}],
        "growth": {"memory": 0.0, "cpu": 0.0, "cpu_against_young": 0.0}, "against_teacher": pair, **changes,
    }  # fmt: skip


def test_every_aim_of_the_latency_report_can_be_missed() -> None:
    assert all(reached for _, _, reached in verdicts(told()))
    late = dict(told()["horizons"]["10 s"], p95_s=0.6)
    pair = told()["against_teacher"]
    misses = [
        {"horizons": {"10 s": late}},
        {"first_frame": [{"first_frame_s": 0.6, "later_s": [0.05, 0.06]}]},
        {"growth": {"memory": 0.03, "cpu": 0.0, "cpu_against_young": 0.0}},
        {"against_teacher": {**pair, "evaluations_ratio": 20.0}},
        {"against_teacher": {**pair, "time_ratio": 9.0}},
    ]
    for number, change in enumerate(misses):
        assert [reached for _, _, reached in verdicts(told(**change))].index(False) == number
    assert "✗ 15x less time" in table(told(**misses[-1])) and "✓ p95 per chunk" in table(told())


def test_the_latency_page_draws_medians_and_needs_nothing_from_outside() -> None:
    x, y = thinned(list(range(1000)), [50.0 if i == 500 else 1.0 for i in range(1000)])
    assert len(x) == len(y) <= 120 and set(y) == {1.0}
    html = page(told(), latency.Track([0.1] * 300, [0.1] * 300, [2**28] * 300))
    assert html.count("<svg") == 2 and "http" not in html.replace("http://www.w3.org", "") and "<script" not in html
