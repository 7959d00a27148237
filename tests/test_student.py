"""The causal student: nothing of the future reaches a chunk; the streaming loop (its cache: test_cache.py)."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import pytest
import torch
from conftest import conditions, latents, normal, small_student
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from student.causal_dit import CausalDiT, StreamConfig
from student.history import History
from student.kv_cache import KVCache
from student.stream import denoise_chunk, gaussian, remember_chunk, stream
from teacher.conditions import AUDIO_PER_LATENT, PAST, Conditions
from teacher.flow import add_noise, x0_from_v


def config(chunk: int = 2, sink: int = 1, window: int = 2, **changes) -> StreamConfig:
    return StreamConfig(chunk_frames=chunk, sink_chunks=sink, window_chunks=window, **changes)


def times(frames: int, seed: int) -> Tensor:
    return normal(2, frames, seed=seed).sigmoid()


# ---- causality --------------------------------------------------------------------------------------------


def shaped(frames: int, rows: int, columns: int, present: tuple[int, ...]) -> tuple[Conditions, Tensor, Tensor]:
    """Conditions, x_t and history of clips with this many token rows and columns."""
    cond = replace(conditions(frames, present=present), refs=normal(2, 2, 4, 2 * rows, 2 * columns, seed=4))
    return cond, *(normal(2, frames, 4, 2 * rows, 2 * columns, seed=seed) for seed in (501, 503))


ARRANGEMENTS = {
    "chunk": st.integers(1, 3),
    "sink": st.integers(0, 2),
    "window": st.integers(0, 3),
    "grid": st.tuples(st.integers(1, 3), st.integers(1, 3)),
    "present": st.sampled_from([(0, 0), (1, 0), (1, 1)]),
}


@settings(max_examples=25, deadline=None, derandomize=True)
@given(**ARRANGEMENTS, given_history=st.booleans(), data=st.data())
def test_nothing_after_a_chunk_reaches_it(chunk, sink, window, grid, present, given_history, data) -> None:
    """Neither by gradient, which is exactly zero, nor by one bit of the result."""
    model = small_student(config(chunk, sink, window))
    chunks = sink + window + 1
    frames, last = chunk * chunks, data.draw(st.integers(0, chunks - 1), label="last chunk looked at")
    end = chunk * (last + 1)  # frames from here on are the future
    cond, xt, hist = shaped(frames, *grid, present)
    t, t_hist = times(frames, 2), times(frames, 4)
    sources = (cond.speak, cond.listen, xt, hist)
    for tensor in sources:
        tensor.requires_grad_()
    v = model(xt, t, cond, hist, t_hist) if given_history else model(xt, t, cond)
    found = torch.autograd.grad(v[:, :end].square().sum(), sources, allow_unused=True)
    speak, listen, latent, past = (torch.zeros_like(s) if g is None else g for g, s in zip(found, sources, strict=True))
    heard = AUDIO_PER_LATENT * (PAST + end)
    assert torch.count_nonzero(speak[:, heard:]) + torch.count_nonzero(listen[:, heard:]) == 0
    assert torch.count_nonzero(latent[:, end:]) + torch.count_nonzero(past[:, chunk * last :]) == 0
    assert speak[:, heard - 1].abs().min() > 0 and latent[:, end - 1].abs().min() > 0
    if given_history and last and window:
        assert past[:, chunk * last - 1].abs().min() > 0
    if not sink + window:  # a chunk by itself hears no further back than its first frame's window
        deaf = AUDIO_PER_LATENT * (PAST + 1 - model.dit.config.speak_window)
        assert deaf > 0 and torch.count_nonzero(speak[:, :deaf]) == 0 and speak[:, deaf].abs().min() > 0

    with torch.no_grad():
        for tensor, first in ((cond.speak, heard), (cond.listen, heard), (xt, end), (t, end), (hist, chunk * last)):
            tensor[:, first:] = 0.3
        t_hist[:, chunk * last :] = 0.9
        after = model(xt, t, cond, hist, t_hist) if given_history else model(xt, t, cond)
    assert torch.equal(after[:, :end], v[:, :end])
    assert end == frames or not torch.allclose(after[:, end:], v[:, end:])


@settings(max_examples=10, deadline=None, derandomize=True)
@given(**ARRANGEMENTS)
def test_text_told_at_a_chunk_border_has_no_gradient_from_any_chunk_before(chunk, sink, window, grid, present) -> None:
    """Every chunk is told its own text, the cache carries gradients: chunk i depends on the texts up to its own."""
    model, chunks = small_student(config(chunk, sink, window)), sink + window + 2
    cond, xt, _ = shaped(chunk * chunks, *grid, present)
    t, texts = times(chunk * chunks, 2), [normal(2, 3, 6, seed=seed).requires_grad_() for seed in range(chunks)]
    cache, out = model.start(cond), []
    for index, text in enumerate(texts):
        now = slice(index * chunk, (index + 1) * chunk)
        told = replace(cond.frames(now.start, now.stop), text=text)
        out.append(model.velocity(xt[:, now], t[:, now], told, cache))
        cache = model.remember(xt[:, now], t[:, now], told, cache)
    for index, v in enumerate(out):
        found = torch.autograd.grad(v.square().sum(), texts, allow_unused=True, retain_graph=True)
        assert all(gradient is None for gradient in found[index + 1 :])
        assert found[index] is not None and found[index][:, :2].abs().min() > 0
        if index and window:
            assert found[index - 1] is not None and found[index - 1].abs().max() > 0  # through what was remembered


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
            noise = backbone.stream.history.noise
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


@dataclass(frozen=True)
class TextChanges(Conditions):
    """Conditions whose text becomes `later` from latent frame `border` on."""

    later: Tensor = field(default_factory=lambda: torch.zeros(0))
    border: int = 0

    def frames(self, start: int, stop: int) -> Conditions:
        told = super().frames(start, stop)
        return replace(told, text=self.later if start >= self.border else self.text)


@settings(max_examples=8, deadline=None, derandomize=True)
@given(chunk=st.integers(1, 3), border=st.integers(0, 4), refined=st.booleans())
def test_a_text_change_at_a_chunk_border_changes_every_chunk_from_there_and_none_before(chunk, border, refined) -> None:
    backbone, cond = small_student(config(chunk, 1, 1)), conditions(5 * chunk)
    refiner = small_student(config(chunk, 1, 1), seed=5) if refined else None
    changed = TextChanges(**vars(cond), later=normal(2, 3, 6, seed=77), border=border * chunk)
    a, b = (list(stream(backbone, refiner, c, torch.Generator().manual_seed(3))) for c in (cond, changed))
    assert all(torch.equal(x, y) for x, y in zip(a[:border], b[:border], strict=True))
    assert not any(torch.allclose(x, y) for x, y in zip(a[border:], b[border:], strict=True))


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
    cache = remember_chunk(model, x0, cond, model.start(cond), History(), torch.Generator().manual_seed(0))
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
              {"chunk": 0}, {"positions": "sideways"}],
)  # fmt: skip
def test_a_stream_that_cannot_be_is_refused(wrong: dict) -> None:
    with pytest.raises(ValueError):
        config(**wrong)
