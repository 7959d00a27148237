"""The causal student: cache against mask, chunk 3 against chunk 30, nothing of the future, nothing in place."""

from __future__ import annotations

import gc
import weakref
from dataclasses import replace

import pytest
import torch
from conftest import SIDE, conditions, latents, normal, small_student
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from student.causal_dit import CausalDiT, StreamConfig
from student.kv_cache import KVCache
from student.mask import causal_mask, visible_chunks
from student.stream import denoise_chunk, gaussian, remember_chunk, stream
from teacher.attention import KV
from teacher.conditions import AUDIO_PER_LATENT, PAST, Conditions
from teacher.flow import add_noise, x0_from_v
from teacher.rope import grid_positions

TOKENS = SIDE * SIDE // 4  # per latent frame


def config(chunk: int = 2, sink: int = 1, window: int = 2, **changes) -> StreamConfig:
    return StreamConfig(chunk_frames=chunk, sink_chunks=sink, window_chunks=window, **changes)


def cached(model: CausalDiT, xt: Tensor, t: Tensor, cond: Conditions, hist: Tensor, t_hist: Tensor) -> Tensor:
    """Velocities of a clip chunk by chunk, every chunk remembered as `hist` at t_hist. t, t_hist [B, T]."""
    size, cache, out = model.stream.chunk_frames, model.start(cond), []
    for start in range(0, xt.shape[1], size):
        now, told = slice(start, start + size), cond.frames(start, start + size)
        out.append(model.velocity(xt[:, now], t[:, now], told, cache))
        cache = model.remember(hist[:, now], t_hist[:, now], told, cache)
    return torch.cat(out, 1)


def times(frames: int, seed: int) -> Tensor:
    return normal(2, frames, seed=seed).sigmoid()


# ---- cache and mask ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("history", ["clean", "noisy", "own"])
@pytest.mark.parametrize("present", [(1, 1), (1, 0), (0, 0)])
@pytest.mark.parametrize(
    ("chunk", "sink", "window", "chunks"), [(1, 1, 3, 5), (2, 1, 2, 4), (3, 0, 2, 3), (2, 2, 0, 3)]
)
def test_cached_rollout_equals_full_forward(
    chunk: int, sink: int, window: int, chunks: int, present: tuple[int, int], history: str
) -> None:
    model = small_student(config(chunk, sink, window))
    frames = chunk * chunks
    cond, xt, t = conditions(frames, present=present), latents(frames, seed=1), times(frames, 2)
    if history == "own":
        whole, hist, t_hist = model(xt, t, cond), xt, t
    else:
        hist = latents(frames, seed=3)
        t_hist = torch.zeros_like(t) if history == "clean" else times(frames, 4)
        whole = model(xt, t, cond, hist, t_hist)
    torch.testing.assert_close(cached(model, xt, t, cond, hist, t_hist), whole, rtol=0, atol=1e-10)


@pytest.mark.parametrize(("chunk", "window"), [(1, 1), (1, 3), (2, 2)])
def test_a_sliding_window_equals_masked_attention_over_the_whole_past(chunk: int, window: int) -> None:
    """Without sink and references only differences of positions count, hence one mask can stand for a long stream."""
    model, frames = small_student(config(chunk, 0, window)), 9 * chunk
    cond, x, t = conditions(frames, present=(0, 0)), latents(frames), times(frames, 2)
    refs = model.dit.encode_refs(cond)
    mask = causal_mask(9, chunk * TOKENS, 0, window, 2 * TOKENS)
    whole = model.dit.run(x, t, cond, grid_positions(frames, SIDE // 2, SIDE // 2), refs, mask)[0]
    torch.testing.assert_close(cached(model, x, t, cond, x, t), whole, rtol=0, atol=1e-10)


def empty_cache(sink: int, window: int) -> KVCache:
    grid = (2, 1, 1)
    refs = KV(torch.zeros(1, 1, 2), torch.zeros(1, 1, 2), torch.tensor([[-10.0, 0, 0]]).double())
    return KVCache([[refs]], grid, sink, window)


@pytest.mark.parametrize(("sink", "window"), [(0, 0), (1, 0), (0, 1), (1, 2), (3, 2)])
def test_the_mask_shows_what_the_cache_holds(sink: int, window: int) -> None:
    mask, cache = visible_chunks(12, sink, window), empty_cache(sink, window)
    for chunk in range(12):
        held = [int(keys[0, 0, 0]) for [(keys, _)] in cache.visible]
        assert held == mask[chunk].nonzero()[:, 0].tolist() and cache.seen == chunk
        first, latest = set(range(min(chunk, sink))), set(range(max(0, chunk - window), chunk))
        assert set(held) == first | latest
        cache = cache.push([(torch.full((1, 2, 2), float(chunk)), torch.zeros(1, 2, 2))])


def test_positions_are_those_within_the_window_however_long_the_stream() -> None:
    cache, places = empty_cache(1, 2), []
    for _ in range(30):
        places.append([*(kv.positions[:, 0].tolist() for kv in cache.context()[0]), cache.positions()[:, 0].tolist()])
        cache = cache.push([(torch.zeros(1, 2, 2), torch.zeros(1, 2, 2))])
    assert places[1] == [[-10], [0, 1], [2, 3]]
    assert places[3] == places[29] == [[-10], [0, 1], [2, 3], [4, 5], [6, 7]]


def test_the_same_content_gives_the_same_result_at_chunk_12_as_at_chunk_30() -> None:
    """Same audio, latents and times in every chunk: what two blocks can see is the same once the window is full."""
    model, one = small_student(config(2, 1, 2)), conditions(2)
    x, t, t_hist = latents(2), times(2, 1), times(2, 2)
    cache, out = model.start(one), []
    for _ in range(31):
        out.append(model.velocity(x, t, one, cache))
        cache = model.remember(x, t_hist, one, cache)
    assert torch.equal(out[30], out[12])
    assert not torch.allclose(out[0], out[12]) and not torch.allclose(out[2], out[3])


def test_the_same_memory_gives_the_same_result_at_chunk_3_as_at_chunk_30() -> None:
    model, one = small_student(config(2, 1, 2)), conditions(2)
    x, t = latents(2), times(2, 1)
    chunks = [model.dit.run(latents(2, seed=s), t, one, grid_positions(2, 2, 2), None)[1] for s in range(5)]
    early, late = model.start(one), model.start(one)
    for index in [0, 3, 4]:
        early = early.push(chunks[index])
    for index in [0, *[1, 2] * 14, 3, 4]:
        late = late.push(chunks[index])
    assert (early.seen, late.seen) == (3, 31)
    assert torch.equal(model.velocity(x, t, one, early), model.velocity(x, t, one, late))


def test_pushing_leaves_older_caches_as_they_were() -> None:
    model, one = small_student(config(2, 1, 2)), conditions(2)
    t = times(2, 1)
    cache = model.start(one)
    for seed in range(3):
        cache = model.remember(latents(2, seed=seed), t, one, cache)
    old, before = cache, model.velocity(latents(2), t, one, cache)
    copies = [(k.clone(), v.clone()) for chunk in old.visible for k, v in chunk]
    for seed in range(5):
        cache = model.remember(latents(2, seed=seed), t, one, cache)
    assert old.seen == 3 and torch.equal(model.velocity(latents(2), t, one, old), before)
    held = [pair for chunk in old.visible for pair in chunk]
    assert all(
        torch.equal(a, b) for pair, copy in zip(held, copies, strict=True) for a, b in zip(pair, copy, strict=True)
    )


def test_memory_is_bounded_and_forgotten_chunks_are_freed() -> None:
    cache, made = empty_cache(3, 2), []
    for _ in range(50):
        keys = torch.zeros(1, 2, 2)
        made.append(weakref.ref(keys))
        cache = cache.push([(keys, torch.zeros(1, 2, 2))])
        assert len(cache.visible) <= 5
    del keys
    gc.collect()
    assert [index for index, keys in enumerate(made) if keys() is not None] == [0, 1, 2, 48, 49]


def test_gradients_through_a_rollout_are_the_same_with_recomputed_activations() -> None:
    grads = []
    for recompute in (False, True):
        model = small_student(config(1, 1, 1), checkpoint_blocks=recompute)
        cond, x, t = conditions(5), latents(5), times(5, 1)
        cached(model, x, t, cond, x, t).square().sum().backward()  # through the cache as well: nothing is detached
        grads.append([p.grad for p in model.parameters()])
    for plain, again in zip(*grads, strict=True):
        torch.testing.assert_close(plain, again, rtol=1e-9, atol=1e-11)


# ---- causality --------------------------------------------------------------------------------------------


@settings(max_examples=12, deadline=None, derandomize=True)
@given(
    chunk=st.integers(1, 3),
    sink=st.integers(0, 2),
    window=st.integers(0, 2),
    given_history=st.booleans(),
    data=st.data(),
)
def test_nothing_after_a_chunk_reaches_it(chunk: int, sink: int, window: int, given_history: bool, data) -> None:
    model = small_student(config(chunk, sink, window))
    chunks = sink + window + 1
    frames, last = chunk * chunks, data.draw(st.integers(0, chunks - 1), label="last chunk looked at")
    end = chunk * (last + 1)  # frames from here on are the future
    cond, xt, t = conditions(frames), latents(frames, seed=1), times(frames, 2)
    hist, t_hist = latents(frames, seed=3), times(frames, 4)
    for tensor in (cond.speak, cond.listen, xt, hist):
        tensor.requires_grad_()
    v = model(xt, t, cond, hist, t_hist) if given_history else model(xt, t, cond)
    sources = (cond.speak, cond.listen, xt, hist)
    found = torch.autograd.grad(v[:, :end].square().sum(), sources, allow_unused=True)
    speak, listen, latent, past = (torch.zeros_like(s) if g is None else g for g, s in zip(found, sources, strict=True))
    heard = AUDIO_PER_LATENT * (PAST + end)
    assert torch.count_nonzero(speak[:, heard:]) + torch.count_nonzero(listen[:, heard:]) == 0
    assert torch.count_nonzero(latent[:, end:]) + torch.count_nonzero(past[:, chunk * last :]) == 0
    assert speak[:, heard - 1].abs().min() > 0 and latent[:, end - 1].abs().min() > 0
    if given_history and last and window:
        assert past[:, chunk * last - 1].abs().min() > 0


def test_future_latents_and_audio_change_no_earlier_velocity_by_one_bit() -> None:
    model, frames = small_student(config(2, 1, 2)), 8
    cond, xt, t = conditions(frames), latents(frames), times(frames, 1)
    before = model(xt, t, cond)
    for start in (2, 4, 6):
        x2, t2, speak, listen = xt.clone(), t.clone(), cond.speak.clone(), cond.listen.clone()
        x2[:, start:], t2[:, start:] = 9.0, 0.1
        speak[:, AUDIO_PER_LATENT * (PAST + start) :] += 3
        listen[:, AUDIO_PER_LATENT * (PAST + start) :] += 3
        after = model(x2, t2, replace(cond, speak=speak, listen=listen))
        assert torch.equal(after[:, :start], before[:, :start])
        assert not torch.allclose(after[:, start:], before[:, start:])


# ---- streaming --------------------------------------------------------------------------------------------


def by_hand(backbone: CausalDiT, refiner: CausalDiT | None, cond: Conditions, seed: int) -> list[Tensor]:
    """What `stream` is meant to do, written out: noise, x0, re-noise, ..., then one more pass to remember."""
    generator, size = torch.Generator().manual_seed(seed), backbone.stream.chunk_frames
    like = latents(size)
    caches, chunks = {False: backbone.start(cond), True: refiner.start(cond) if refiner else None}, []

    def at(time: float) -> Tensor:
        return torch.full((2,), time, dtype=torch.float64)

    def evaluate(model: CausalDiT, x0: Tensor, time: float, told: Conditions, cache: KVCache) -> Tensor:
        xt = (1 - time) * x0 + time * gaussian(like, generator)
        return xt - time * model.velocity(xt, at(time), told, cache)

    with torch.no_grad():
        for start in range(0, cond.num_frames, size):
            told, x0 = cond.frames(start, start + size), torch.zeros_like(like)
            for time in backbone.stream.steps if refiner is None else backbone.stream.steps[:-1]:
                x0 = evaluate(backbone, x0, time, told, caches[False])
            noise = backbone.stream.history_noise
            seen = (1 - noise) * x0 + noise * gaussian(like, generator)
            caches[False] = backbone.remember(seen, at(noise), told, caches[False])
            if refiner is not None:
                x0 = evaluate(refiner, x0, backbone.stream.steps[-1], told, caches[True])
                caches[True] = refiner.remember(x0, at(0.0), told, caches[True])
            chunks.append(x0)
    return chunks


@pytest.mark.parametrize("refined", [False, True])
def test_a_stream_with_a_seed_is_the_loop_written_out(refined: bool) -> None:
    backbone, cond = small_student(config(2, 1, 1)), conditions(10)
    refiner = small_student(config(2, 1, 1), seed=5) if refined else None
    streamed = list(stream(backbone, refiner, cond, torch.Generator().manual_seed(3)))
    assert len(streamed) == 5 and not streamed[0].requires_grad
    torch.testing.assert_close(streamed, by_hand(backbone, refiner, cond, 3), rtol=0, atol=1e-10)


@pytest.mark.parametrize("refined", [False, True])
def test_audio_still_to_come_changes_no_chunk_already_emitted(refined: bool) -> None:
    backbone, cond = small_student(config(2, 1, 1)), conditions(10)
    refiner = small_student(config(2, 1, 1), seed=5) if refined else None
    heard = AUDIO_PER_LATENT * (PAST + 6)
    later = replace(cond, speak=cond.speak.clone(), listen=cond.listen.clone())
    later.speak[:, heard:] += 2
    later.listen[:, heard:] += 2
    a, b = (list(stream(backbone, refiner, c, torch.Generator().manual_seed(3))) for c in (cond, later))
    assert all(torch.equal(x, y) for x, y in zip(a[:3], b[:3], strict=True))
    assert not any(torch.allclose(x, y) for x, y in zip(a[3:], b[3:], strict=True))


def test_only_the_exit_step_carries_gradient() -> None:
    model, cond = small_student(config(2, 1, 1)), conditions(2)
    steps, cache = model.stream.steps, model.start(cond)
    for exit_step in range(3):
        model.zero_grad()
        x0 = denoise_chunk(model, cond, cache, steps, latents(2), torch.Generator().manual_seed(1), exit_step)
        found = torch.autograd.grad(x0.square().sum(), model.dit.head.head.weight, retain_graph=True)[0]
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            before = latents(2)
            for time in steps[:exit_step]:
                t = torch.full((2,), time, dtype=torch.float64)
                xt = add_noise(before, gaussian(before, generator), t)
                before = x0_from_v(xt, model.velocity(xt, t, cond, cache), t)
        t = torch.full((2,), steps[exit_step], dtype=torch.float64)
        xt = add_noise(before, gaussian(before, generator), t)
        last = x0_from_v(xt, model.velocity(xt, t, cond, cache), t)
        torch.testing.assert_close(x0, last)
        expected = torch.autograd.grad(last.square().sum(), model.dit.head.head.weight, retain_graph=True)[0]
        torch.testing.assert_close(found, expected)


def test_remembering_carries_no_gradient() -> None:
    model, cond = small_student(config(2, 1, 1)), conditions(2)
    x0 = latents(2).requires_grad_()
    cache = remember_chunk(model, x0, cond, model.start(cond), 0.1, torch.Generator().manual_seed(0))
    assert not any(tensor.requires_grad for chunk in cache.visible for pair in chunk for tensor in pair)


def test_clips_longer_than_the_window_or_with_broken_chunks_are_refused() -> None:
    model = small_student(config(2, 1, 1))
    for frames in (8, 5):
        with pytest.raises(ValueError, match="whole chunks of 2"):
            model(latents(frames), torch.ones(2), conditions(frames))
    with pytest.raises(ValueError, match="t_hist"):
        model(latents(4), torch.ones(2), conditions(4), latents(4))


@pytest.mark.parametrize(
    "wrong", [{"steps": (0.9, 0.5)}, {"steps": (1.0, 0.5, 0.5)}, {"steps": (1.0, 0.0)}, {"steps": ()}, {"sink": -1},
              {"chunk": 0}, {"history_noise": 1.0}],
)  # fmt: skip
def test_a_stream_that_cannot_be_is_refused(wrong: dict) -> None:
    with pytest.raises(ValueError):
        config(**wrong)
