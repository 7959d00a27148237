"""A live session: the numbers of the offline stream however audio arrives; text, interruption, save and resume."""

from __future__ import annotations

import threading
from collections import deque
from concurrent.futures import Future
from dataclasses import is_dataclass, replace

import pytest
import torch
from conftest import conditions, latents, small_student
from hypothesis import given, settings
from hypothesis import strategies as st
from small_online import images, small_model, tone
from torch import Tensor

import student.sight as sight_module
from student.causal_dit import CausalDiT, StreamConfig
from student.fast import FastDiT
from student.hearing import Heard, Waiting, border, whole_frames
from student.online import OnlineLPM
from student.session import Chunk, Session
from student.stream import stream
from teacher.adapted import AdaptedDiT
from teacher.audio import MELS, log_mel
from teacher.conditions import AUDIO_PER_LATENT, PAST, Conditions, encode_text
from teacher.lora import LoRAConfig
from teacher.randomness import keyed_generator


def offline(model: OnlineLPM, refs: Tensor, speak: Tensor, listen: Tensor, texts: list[str], seed: int) -> list[Tensor]:
    """Frames of the shared loop over the whole audio at once; one text per chunk."""
    size, past = model.backbone.stream.chunk_frames, torch.zeros(border(PAST))
    told = [encode_text([text], dim=model.backbone.dit.config.text_dim) for text in texts]

    class Changing(Conditions):
        def frames(self, start: int, stop: int) -> Conditions:
            text, mask = told[start // size]
            return replace(super().frames(start, stop), text=text, text_mask=mask)

    features = [log_mel(torch.cat([past, wave]))[None] for wave in (speak, listen)]
    latents = model.codec.encode_image(refs)[None]
    cond = Changing(*features, *told[0], latents, torch.ones(latents.shape[:2], dtype=torch.bool))
    frames = model.frames(cond, lambda index, part: keyed_generator(seed, index, part))
    return [(chunk[0] * 255).round().byte().permute(0, 2, 3, 1) for chunk in frames]


def same(chunks: list[Chunk], frames: list[Tensor]) -> bool:
    return len(chunks) == len(frames) and all(torch.equal(c.frames, f) for c, f in zip(chunks, frames, strict=True))


# ---- hearing ----------------------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None, derandomize=True)
@given(chunk=st.integers(1, 5), chunks=st.integers(1, 12), seed=st.integers(0, 99))
def test_features_made_chunk_by_chunk_are_bitwise_those_of_the_whole_wave(chunk: int, chunks: int, seed: int) -> None:
    wave = torch.stack([tone(border(chunk * chunks), seed), tone(border(chunk * chunks), seed + 1)])
    whole = log_mel(torch.cat([torch.zeros(2, border(PAST)), wave], 1))
    heard, waiting = Heard.nothing(MELS), Waiting()
    waiting.push(wave)
    for index in range(chunks):
        assert whole_frames(heard, waiting.length) == (chunks - index) * chunk
        length = heard.missing(chunk)
        assert whole_frames(heard, length - 1) == chunk - 1
        features, heard = heard.listen(waiting.look(0, length), chunk)
        waiting.drop(length)
        window = slice(AUDIO_PER_LATENT * index * chunk, AUDIO_PER_LATENT * ((index + 1) * chunk + PAST))
        assert torch.equal(features, whole[:, window])
        assert heard.samples.shape[1] <= 1667 and heard.features.shape[1] == AUDIO_PER_LATENT * PAST
        assert all(kept.untyped_storage().nbytes() == kept.nbytes for kept in (heard.samples, heard.features))
    assert waiting.length == 0


# ---- equal to the offline stream ---------------------------------------------------------------------------


@settings(max_examples=6, deadline=None, derandomize=True)
@given(chunk=st.integers(1, 3), look_ahead=st.integers(0, 1), cuts=st.lists(st.integers(1, 9000), max_size=6))
def test_a_session_is_the_offline_stream_however_the_audio_is_cut(chunk: int, look_ahead: int, cuts: list[int]) -> None:
    model, refs, samples = small_model(chunk), images(), border(6 * chunk)
    speak, listen = tone(samples, 1), tone(samples, 2)
    session, chunks, at = model.stream(refs, "smiling", 5, look_ahead), [], 0
    for cut in [*cuts, samples]:
        session.push(speak[at : at + cut], listen[at : at + cut])
        at += cut
        chunks += list(session)
    expected = offline(model, refs, speak, listen, ["smiling"] * 6, 5)
    assert same(chunks, expected)
    assert len({frame.sum().item() for frame in expected}) == 6
    assert [c.index for c in chunks] == list(range(6))
    assert [c.start for c in chunks] == pytest.approx([i * chunk / 6 for i in range(6)])
    assert chunks[0].frames.shape == (4 * chunk, 32, 32, 3) and chunks[0].compute_seconds > 0


@pytest.mark.parametrize("look_ahead", [0, 1])
def test_a_text_holds_from_the_first_chunk_that_is_not_yet_made(look_ahead: int) -> None:
    model, refs, samples = small_model(), images(), 8000 * 6
    session = model.stream(refs, "smiling", 5, look_ahead)
    session.push(speak=tone(samples))
    chunks = [session.next_chunk(), session.next_chunk()]
    first = session.set_text("angry, looking left")
    assert first == 2 + look_ahead  # with look-ahead, chunk 2 is made already
    chunks += list(session)
    texts = ["smiling"] * first + ["angry, looking left"] * (6 - first)
    assert same(chunks, offline(model, refs, tone(samples), torch.zeros(samples), texts, 5))
    assert not same(chunks, offline(model, refs, tone(samples), torch.zeros(samples), ["smiling"] * 6, 5))


def test_missing_audio_is_silence_and_states_come_from_the_audio() -> None:
    model, refs = small_model(), images()
    session = model.stream(refs)
    session.push(speak=tone(8000))
    session.push(listen=tone(8000))
    session.push(speak=torch.zeros(8000))
    session.push(speak=tone(8000), listen=tone(8000, 3))
    quiet, loud = torch.zeros(8000), tone(8000)
    chunks = list(session)
    assert [c.state for c in chunks] == ["speak", "listen", "silence", "speak"]
    speak, listen = torch.cat([loud, quiet, quiet, loud]), torch.cat([quiet, loud, quiet, tone(8000, 3)])
    expected = offline(model, refs, speak, listen, [""] * 4, 0)
    assert same(chunks, expected)


def test_finish_pads_the_rest_to_a_whole_chunk_once() -> None:
    model = small_model()
    session = model.stream(images())
    session.push(speak=tone(8001))
    assert len(list(session)) == 1
    session.finish()
    session.finish()
    assert session.ready == 1 and len(list(session)) == 1
    session.finish()
    assert session.ready == 0 and session.next_chunk() is None


@pytest.mark.parametrize("kept", [0, 2**30])
@pytest.mark.parametrize("present", [(1, 1), (1, 0), (0, 0)])
@torch.no_grad()
def test_what_is_made_once_per_chunk_gives_what_the_causal_student_gives(monkeypatch, kept: int, present) -> None:
    """Chunk after chunk with new audio, a new text in mid-stream, references missing in a part of the batch."""
    monkeypatch.setattr(sight_module, "KEPT_BYTES", kept)  # 0: nothing is kept, layers are made at every call
    model = small_student(StreamConfig(chunk_frames=2, sink_chunks=1, window_chunks=2))
    fast, cond = FastDiT(model), conditions(14, present=present)
    cond.ref_mask[1] = True  # the other item has all
    slow_cache, fast_cache = model.start(cond), fast.start(cond)
    for index in range(7):
        told = cond.frames(2 * index, 2 * index + 2)
        if index >= 4:
            told = replace(told, text=told.text + 1)
        for time in (1.0, 0.4, 1.0):
            x, t = latents(2, seed=index), torch.full((2,), time, dtype=torch.float64)
            expected = model.velocity(x, t, told, slow_cache)
            torch.testing.assert_close(fast.velocity(x, t, told, fast_cache), expected, rtol=0, atol=1e-10)
        before = model.start(cond)  # the same conditions over another past
        expected = model.velocity(x, t, told, before)
        torch.testing.assert_close(fast.velocity(x, t, told, before), expected, rtol=0, atol=1e-10)
        x, t = latents(2, seed=50 + index), torch.full((2,), 0.1, dtype=torch.float64)
        slow_cache, fast_cache = model.remember(x, t, told, slow_cache), fast.remember(x, t, told, fast_cache)
        for ours, theirs in zip(replace(fast_cache).visible[-1], slow_cache.visible[-1], strict=True):  # of a copy
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10)


# ---- interruption -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("look_ahead", [0, 1])
def test_after_an_interruption_the_character_goes_on_from_what_was_shown(look_ahead: int) -> None:
    """Bit for bit the session that never got the audio that was dropped."""
    model, refs = small_model(), images()
    session, never = (model.stream(refs, "smiling", 3, look_ahead) for _ in range(2))
    session.push(speak=tone(8000 * 5 + 77))
    shown = [session.next_chunk(), session.next_chunk()]
    assert session.set_text("sad") == 2 + look_ahead
    assert session.interrupt() == pytest.approx((8000 * 3 + 77) / 16000)
    assert session.next_chunk() is None
    never.push(speak=tone(8000 * 5 + 77)[:16000])
    assert same(shown, [chunk.frames for chunk in never])
    never.set_text("sad")
    for one in (session, never):
        one.push(listen=tone(16000, 9))
    after = list(session)
    assert [c.index for c in after] == [2, 3] and [c.state for c in after] == ["listen", "listen"]
    assert same(after, [chunk.frames for chunk in never])


@pytest.mark.parametrize("kind", ["adapters", "pieces"])
def test_a_student_whose_weights_cannot_be_read_layer_by_layer_streams_through_run(kind: str) -> None:
    config = StreamConfig(2, sink_chunks=0, window_chunks=1)
    plain = small_student(config, 3)
    student = CausalDiT(AdaptedDiT(plain.dit, LoRAConfig(rank=2)), config) if kind == "adapters" else plain
    expected = torch.cat(list(stream(plain, None, conditions(4), torch.Generator().manual_seed(0))), 1)
    student.whole = kind == "adapters"
    assert student.streaming() is student
    seen = torch.cat(list(stream(student, None, conditions(4), torch.Generator().manual_seed(0))), 1)
    torch.testing.assert_close(seen, expected)


def test_an_interruption_throws_away_at_most_one_chunk(monkeypatch) -> None:
    import student.session as sessions

    made: list[int] = []
    real = sessions.draft_chunk
    monkeypatch.setattr(sessions, "draft_chunk", lambda *given, **how: (made.append(1), real(*given, **how))[1])
    session = small_model().stream(images(), look_ahead=1)
    session.push(speak=tone(8000 * 8))
    for shown in range(1, 5):
        session.next_chunk()
        session._worker.submit(lambda: None).result()  # the worker has nothing left to do
        assert len(made) == shown + 1
    session.interrupt()
    session.push(speak=tone(8000))
    assert len(list(session)) == 1 and len(made) == 6  # four shown, one thrown away, one more shown


def test_a_failure_in_the_middle_leaves_the_session_where_it_was(monkeypatch) -> None:
    import student.session as sessions

    model = small_model()
    session = model.stream(images(), look_ahead=1)
    session.push(speak=tone(8000 * 3))
    first = session.next_chunk()
    with monkeypatch.context() as patch:
        patch.setattr(sessions, "refine_chunk", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            session.next_chunk()
    expected = offline(model, images(), tone(24000), torch.zeros(24000), [""] * 3, 0)
    assert same([first, *session], expected)


# ---- save, resume, many at once ---------------------------------------------------------------------------


@pytest.mark.parametrize("look_ahead", [0, 1])
@pytest.mark.parametrize("chunks", [0, 1, 6])  # nothing in the cache yet; the sink; a full window
def test_a_session_goes_on_bit_for_bit_after_save_and_resume(tmp_path, look_ahead: int, chunks: int) -> None:
    model, refs = small_model(chunk=2), images()
    session = model.stream(refs, "smiling", 4, look_ahead)
    session.push(speak=tone(border(2 * 9) - 5, 1), listen=tone(border(2 * 9) - 5, 2))
    for _ in range(chunks):
        session.next_chunk()
    session.set_text("sad")
    back = model.resume(session.save(tmp_path / "kept"))
    for one in (session, back):
        one.push(speak=tone(5000, 3))
    expected = list(session)
    assert len(expected) == 9 - chunks + 1 - (border(20) > border(18) - 5 + 5000)
    assert same(list(back), [chunk.frames for chunk in expected])
    assert back.index == session.index and back.texts == session.texts


def test_what_is_no_saved_session_of_this_model_is_refused_in_one_sentence(tmp_path) -> None:
    model = small_model()
    with pytest.raises(ValueError, match="holds no saved session"):
        model.resume(tmp_path)
    model.stream(images()).save(tmp_path)
    with pytest.raises(ValueError, match="another model"):
        small_model(seed=5).resume(tmp_path)
    (tmp_path / "session.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{broken")
    with pytest.raises(ValueError, match="damaged"):
        model.resume(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["session.safetensors"]


def test_many_sessions_of_one_model_do_not_hear_each_other() -> None:
    """Interleaved and in threads of their own, each is bitwise its solo run."""
    model, count = small_model(), 6
    alone = []
    for number in range(count):
        session = model.stream(images(seed=number), seed=number, look_ahead=0)
        session.push(speak=tone(24000, number))
        alone.append([chunk.frames for chunk in session])
    sessions = [model.stream(images(seed=n), seed=n, look_ahead=n % 2) for n in range(count)]
    for number, session in enumerate(sessions):
        session.push(speak=tone(24000, number))
    found: list[list[Chunk]] = [[] for _ in sessions]
    for _ in range(2):
        for number, session in enumerate(sessions):
            found[number].append(session.next_chunk())  # type: ignore[arg-type]
    rest = [threading.Thread(target=lambda n=n: found[n].extend(sessions[n])) for n in range(count)]
    for thread in rest:
        thread.start()
    for thread in rest:
        thread.join()
    assert all(same(mine, solo) for mine, solo in zip(found, alone, strict=True))


def storage_of(thing: object, found: dict[int, int]) -> dict[int, int]:
    """Bytes of every tensor storage that can be reached from a session, by address."""
    if isinstance(thing, Tensor):
        found[thing.untyped_storage().data_ptr()] = thing.untyped_storage().nbytes()
    elif isinstance(thing, Future):
        storage_of(thing.result(), found)
    elif isinstance(thing, (list, tuple, deque)):
        for part in thing:
            storage_of(part, found)
    elif isinstance(thing, dict):
        storage_of(list(thing.values()), found)
    elif isinstance(thing, (Session, Waiting, FastDiT)) or is_dataclass(thing):
        storage_of(list(vars(thing).values()), found)
    return found


@pytest.mark.parametrize("look_ahead", [0, 1])
def test_a_session_holds_no_more_after_many_chunks_than_after_a_few(look_ahead: int) -> None:
    session = small_model(chunk=1).stream(images(), look_ahead=look_ahead)
    session.push(speak=tone(border(1)))
    sizes, texts = [], []
    for number in range(16):
        session.push(speak=tone(8000, number), listen=tone(8000, number + 1))
        session.set_text("smiling" if number % 2 else "sad")
        for _ in range(3):  # one chunk of audio is left, and made ahead
            session.next_chunk()
        sizes.append(sum(storage_of(session, {}).values()))
        texts.append(len(session.texts))
    # Which of two texts the networks hold when it is counted is a matter of moments; a chunk leaves 2 KB in each cache.
    assert session.index == 48 and max(sizes[5:]) - min(sizes[5:]) < 8_000 and sizes[-1] > 10_000
    assert max(texts) <= 2


# ---- misuse -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "given, complaint",
    [({}, "needs speak or listen"), ({"speak": torch.zeros(2, 9)}, r"one channel"),
     ({"speak": torch.zeros(9, dtype=torch.int16)}, "int16"), ({"listen": torch.tensor([0.0, float("nan")])}, "finite"),
     ({"speak": torch.zeros(4), "listen": torch.zeros(5)}, "one length, they have 4 and 5")],
)  # fmt: skip
def test_audio_that_is_none_is_refused_and_changes_nothing(given: dict, complaint: str) -> None:
    session = small_model().stream(images())
    with pytest.raises(ValueError, match=complaint):
        session.push(**given)
    assert session.waiting.length == 0


@pytest.mark.parametrize(
    "references, complaint",
    [(torch.zeros(3, 3, 32, 32), "1 to 2 images"), (torch.zeros(0, 3, 32, 32), "1 to 2"),
     (torch.zeros(1, 3, 32, 24), "divisible by 16"),
     (torch.full((1, 3, 32, 32), 2.0), "divide bytes"), (torch.zeros(1, 32, 32, 3), "float images"),
     (torch.zeros(1, 3, 32, 32, dtype=torch.uint8), "float images")],
)  # fmt: skip
def test_references_that_are_no_images_are_refused(references: Tensor, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        small_model().stream(references)


def test_a_text_too_long_and_a_look_ahead_too_far_are_refused() -> None:
    session = small_model().stream(images(), "smiling")
    with pytest.raises(ValueError, match="17 words"):
        session.set_text("a " * 17)
    assert session.texts == [(0, "smiling")]
    with pytest.raises(ValueError, match="look_ahead"):
        small_model().stream(images(), look_ahead=2)
