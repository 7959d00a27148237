"""Keys and values of a chunk written together with the next chunk's first step: the numbers of two passes, in every
kind of stream; and a promise that is thrown away, saved, or asked for what it holds changes nothing."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from conftest import conditions, latents, normal, small_student
from small_online import images, small_model, tone
from torch import Tensor

from student.causal_dit import CausalDiT, StreamConfig
from student.fast import FastDiT
from student.history import CLEAN
from student.kv_cache import ChunkKV, KVCache
from student.online import OnlineLPM
from student.promise import Promise
from student.session import Session
from student.stream import stream
from teacher.conditions import Conditions

ARRANGEMENTS = [(1, 2), (0, 1), (1, 0), (0, 0), (2, 1)]  # sink, window; with none at all a chunk is gone at once


def at(time: float) -> Tensor:
    return torch.full((2,), time, dtype=torch.float64)


@dataclass(frozen=True)
class TextChanges(Conditions):
    """Conditions whose text becomes `later` from latent frame 8 on."""

    later: Tensor = field(default_factory=lambda: torch.zeros(0))

    def frames(self, start: int, stop: int) -> Conditions:
        return replace(super().frames(start, stop), text=self.later if start >= 8 else self.text)


KINDS: dict[str, dict[str, Any]] = {
    "refined": {"refined": True, "passes": 3},
    "no refiner": {"passes": 3},
    "single step": {"steps": (1.0,), "passes": 1},
    "clean history": {"history": CLEAN, "passes": 3},
    "flow map": {"flow_map": True, "passes": 3},
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("sink", "window"), ARRANGEMENTS)
def test_a_stream_that_writes_with_the_next_step_is_the_stream_that_writes_at_once(sink, window, kind: str) -> None:
    """Seven chunks of two items whose text changes in mid-stream; every chunk but the first has one pass per step."""
    told = dict(KINDS[kind])
    refined, passes, flow_map = told.pop("refined", False), told.pop("passes"), told.pop("flow_map", False)
    config = StreamConfig(2, sink_chunks=sink, window_chunks=window, **told)
    nets = [small_student(config, seed, torch.float32, flow_map=flow_map) for seed in range(1 + refined)]
    later = normal(2, 3, 6, seed=77, dtype=torch.float32)
    cond = TextChanges(**vars(conditions(14, dtype=torch.float32)), later=later)
    calls: list[int] = []
    for net in nets:
        net.dit.patch_embedding.register_forward_hook(lambda *_: calls.append(1))
    made = []
    for whole in (True, False):  # a student that is not whole streams as `CausalDiT`, chunk by chunk and pass by pass
        for net in nets:
            net.whole = whole
        calls.clear()
        noise = torch.Generator().manual_seed(3)
        made.append(list(stream(nets[0], nets[1] if refined else None, cond, noise)))
        references = (1 + refined) if nets[0].dit.config.references else 0
        assert len(calls) - references == 7 * (passes if whole else passes + 1 + refined)
    for ours, theirs in zip(*made, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    assert not torch.allclose(made[0][5], made[0][6])


def promised(config: StreamConfig, chunks: int = 4) -> tuple[CausalDiT, FastDiT, Conditions, KVCache, Promise]:
    """A student, the same for streaming, conditions of two chunks more, and both caches after `chunks`."""
    model = small_student(config)
    fast, cond = FastDiT(model), conditions(2 * chunks + 4)
    slow_cache, cache = model.start(cond), fast.start(cond)
    with torch.no_grad():
        for index in range(chunks):
            told = cond.frames(2 * index, 2 * index + 2)
            slow_cache = model.remember(latents(2, seed=index), at(0.1), told, slow_cache)
            fast.velocity(latents(2, seed=9), at(1.0), told, cache)
            cache = fast.remember(latents(2, seed=index), at(0.1), told, cache)
    assert isinstance(cache, Promise)
    return model, fast, cond, slow_cache, cache


@torch.no_grad()
def test_a_promise_that_others_ask_is_the_cache_it_stands_for() -> None:
    model, fast, cond, slow, promise = promised(StreamConfig(2))
    told, x = cond.frames(8, 10), latents(2, seed=50)
    expected = model.velocity(x, at(1.0), told, slow)
    other = FastDiT(small_student(StreamConfig(2), seed=3))
    for network in (model, other):  # another network cannot write it by the way
        copy = replace(promise)
        found = network.velocity(x, at(1.0), told, copy)
        assert copy.written is not None
        if network is model:
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)
    for ours, theirs in zip(replace(promise).visible, slow.visible, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10)
    assert torch.equal(replace(promise).positions(), slow.positions())
    pushed = replace(promise).push(slow.visible[0])
    torch.testing.assert_close(pushed.visible, slow.push(slow.visible[0]).visible, rtol=0, atol=1e-10)
    after = fast.remember(x, at(0.1), told, replace(promise))  # without a step in between
    torch.testing.assert_close(after.visible, model.remember(x, at(0.1), told, slow).visible, rtol=0, atol=1e-10)


@torch.no_grad()
def test_a_draft_that_is_thrown_away_leaves_no_bit_behind() -> None:
    _, fast, cond, _, promise = promised(StreamConfig(2))
    x, told = latents(2, seed=50), cond.frames(8, 10)
    first = [fast.velocity(x, at(t), told, mine) for mine in [replace(promise)] for t in (1.0, 0.4)]
    fast.velocity(latents(2, seed=51), at(0.7), cond.frames(10, 12), replace(promise))
    again = [fast.velocity(x, at(t), told, mine) for mine in [replace(promise)] for t in (1.0, 0.4)]
    assert promise.written is None and all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@torch.no_grad()
def test_a_promise_holds_what_was_remembered_whatever_becomes_of_it() -> None:
    _, fast, cond, _, promise = promised(StreamConfig(2))
    x, told = latents(2, seed=50), cond.frames(8, 10)
    kept = fast.remember(x, at(0.1), told, promise).visible
    after = fast.remember(x, at(0.1), told, promise)
    x.zero_()
    torch.testing.assert_close(after.visible, kept, rtol=0, atol=0)


@dataclass(frozen=True)
class Mixing(KVCache):
    """Keeps one chunk, into which every new one is mixed: what it shows is not what it was given."""

    def push(self, chunk: ChunkKV) -> KVCache:
        old = self.window[0] if self.window else chunk
        mixed = [((k + a) / 2, (v + b) / 2) for (k, v), (a, b) in zip(old, chunk, strict=True)]
        return replace(self, window=(mixed,), seen=self.seen + 1)


@torch.no_grad()
def test_a_cache_that_makes_new_keys_of_those_it_is_given_shows_them_to_the_next_chunk() -> None:
    model, cond = small_student(StreamConfig(2, sink_chunks=0, window_chunks=1)), conditions(8)
    fast, plain = FastDiT(model), model.start(cond)
    slow_cache = fast_cache = Mixing(plain.refs, plain.grid, 0, 1)
    for index in range(4):
        told, x = cond.frames(2 * index, 2 * index + 2), latents(2, seed=index)
        for time in (1.0, 0.4):
            expected = model.velocity(x, at(time), told, slow_cache)
            torch.testing.assert_close(fast.velocity(x, at(time), told, fast_cache), expected, rtol=0, atol=1e-10)
        slow_cache, fast_cache = (
            model.remember(x, at(0.1), told, slow_cache),
            fast.remember(x, at(0.1), told, fast_cache),
        )


# ---- sessions ---------------------------------------------------------------------------------------------


def drawn(session: Session, monkeypatch: pytest.MonkeyPatch, limit: int = 99) -> list[Tensor]:
    """The latents of the chunks that come: pictures of 8 bits would hide a last bit."""
    found: list[Tensor] = []
    real = OnlineLPM.pictures
    with monkeypatch.context() as patch:
        patch.setattr(OnlineLPM, "pictures", lambda self, x: (found.append(x.clone()), real(self, x))[1])
        while len(found) < limit and session.next_chunk() is not None:
            pass
    return found


@pytest.mark.parametrize("look_ahead", [0, 1])
@pytest.mark.parametrize("chunks", [1, 5])
def test_a_session_is_saved_with_its_promises_and_goes_on_to_the_last_bit(
    tmp_path, monkeypatch, look_ahead: int, chunks: int
) -> None:
    model = small_model(chunk=2)
    session, unsaved = (model.stream(images(), "smiling", 4, look_ahead) for _ in range(2))
    for one in (session, unsaved):
        one.push(speak=tone(50_000, 1), listen=tone(50_000, 2))
        drawn(one, monkeypatch, chunks)
        one.set_text("sad")
    back = model.resume(session.save(tmp_path))
    for one in (session, back):
        assert all(isinstance(cache, Promise) and cache.written is None for cache in (one.draft_cache, one.final_cache))
    expected = drawn(unsaved, monkeypatch)
    assert len(expected) > 3
    for one in (session, back):
        assert all(torch.equal(a, b) for a, b in zip(drawn(one, monkeypatch), expected, strict=True))


@pytest.mark.parametrize("look_ahead", [0, 1])
def test_after_an_interruption_a_promise_is_kept_to_the_last_bit(monkeypatch, look_ahead: int) -> None:
    model = small_model()
    session, never = (model.stream(images(), "smiling", 3, look_ahead) for _ in range(2))
    session.push(speak=tone(8000 * 5))
    never.push(speak=tone(8000 * 5)[: 8000 * 3])
    shown = [drawn(one, monkeypatch, 3) for one in (session, never)]
    session.interrupt()
    for one in (session, never):
        assert isinstance(one.draft_cache, Promise) and one.draft_cache.written is None
        one.push(listen=tone(16000, 9))
        shown.append(drawn(one, monkeypatch))
    assert [len(part) for part in shown] == [3, 3, 2, 2]
    for ours, theirs in ((shown[0], shown[1]), (shown[2], shown[3])):
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_a_failure_after_the_refiners_step_leaves_no_bit_behind(monkeypatch) -> None:
    model = small_model()
    session, never = (model.stream(images(), seed=3, look_ahead=0) for _ in range(2))
    for one in (session, never):
        one.push(speak=tone(8000 * 3))
        drawn(one, monkeypatch, 1)
    with monkeypatch.context() as patch:
        patch.setattr(OnlineLPM, "pictures", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            session.next_chunk()
    assert isinstance(session.final_cache, Promise) and session.final_cache.written is None
    ours, theirs = drawn(session, monkeypatch), drawn(never, monkeypatch)
    assert len(ours) == 2 and all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
