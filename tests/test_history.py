"""What is remembered of a chunk (history), what stays for ever (sinks), and where things stand (positions)."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import SIDE, batch_of, conditions, latents, small_roles, small_student
from small_online import images, small_model, tone
from torch import Tensor

from distill.rollout import TrajectoryRollConfig, given_history, renoised
from recipes import self_forcing
from student.causal_dit import CausalDiT, Sink, StreamConfig
from student.history import CLEAN, KINDS, History, blurred
from student.kv_cache import KVCache
from student.stream import denoise_chunk, remember_chunk, stream, write_chunk
from teacher.draws import RowGenerator, gaussian
from teacher.flow import add_noise

STEPS = (1.0, 0.7, 0.4)


def config(**changes) -> StreamConfig:
    return StreamConfig(**{"chunk_frames": 2, "sink_chunks": 1, "window_chunks": 1, "steps": STEPS, **changes})


def seeded(seed: int = 0) -> RowGenerator:
    generator = RowGenerator()
    generator.manual_seed(seed)
    return generator


# ---- history ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("history", "level"), [(CLEAN, 0.0), (History("fixed", 0.2), 0.2), (History("matched"), 0.7)])
def test_a_uniform_history_is_the_chunk_noised_to_its_level(history: History, level: float) -> None:
    x0 = latents(4)
    seen, t = history.spoiled(x0, seeded(), step=0.7)
    assert t.tolist() == [level] * 2
    expected = (1 - level) * x0 + level * gaussian(x0, seeded())
    torch.testing.assert_close(seen, expected, rtol=0, atol=1e-12)


def test_a_random_history_spoils_every_frame_in_one_of_three_ways() -> None:
    history, x0 = History("random", noise=0.3, coarse=2, exposure=0.5), latents(400, batch=1)
    seen, t = history.spoiled(x0, seeded())
    coarse = blurred(x0, 2)
    ratio = (seen / x0).flatten(2)
    exposed = (ratio.std(-1) < 1e-9)[0]
    softened = (seen - coarse).abs().flatten(2).amax(-1)[0] < 1e-9
    noised = t[0] > 0
    assert (exposed.int() + softened.int() + noised.int() == 1).all()
    assert all(90 < int(kind.sum()) < 180 for kind in (exposed, softened, noised))
    assert t.max() <= 0.3 and ratio[0, exposed, 0].min() < 0.6 and ratio[0, exposed, 0].max() > 1.4
    eps = (seen - (1 - t[..., None, None, None]) * x0)[0, noised] / t[0, noised, None, None, None]
    assert abs(float(eps.std()) - 1) < 0.05


def test_blurring_keeps_means_and_takes_away_what_alternates() -> None:
    flat = torch.ones(1, 1, 1, SIDE, SIDE)
    checks = torch.tensor([[1.0, -1.0] * 2, [-1.0, 1.0] * 2] * 2)[None, None, None]
    assert torch.equal(blurred(flat, 2), flat) and blurred(checks, 2).abs().max() == 0
    torch.testing.assert_close(blurred(checks, 1), checks)


@pytest.mark.parametrize("kind", KINDS)
def test_training_and_streaming_remember_alike(kind: str) -> None:
    """The student's own rollout to the last step is the stream of a backbone alone, whatever the history."""
    told = config(history=History(kind, 0.2))
    roles, cond = small_roles(told), conditions(6)
    for step in range(50):
        roles = replace(roles, key=(0, 0, step, 0, 0))
        if int(torch.randint(3, (), generator=roles.generator("rollout/exit", shared=True))) == 2:
            break
    roll = self_forcing.roll_self(batch_of(cond), roles, self_forcing.Config(chunks=3))
    shipped = torch.cat(list(stream(roles.causal("student"), None, cond, roles.rows("rollout/noise"))), 1)
    torch.testing.assert_close(roll.x0, shipped, rtol=0, atol=1e-10)


def test_matched_history_shows_every_step_the_past_at_its_own_level() -> None:
    """Against caches of fixed noise, one per step, written with the same noise."""
    model, cond, x0 = small_student(config(history=History("matched")), 3), conditions(2), latents(2)
    cache = remember_chunk(model, x0, cond, model.start(cond), model.stream.history, seeded(1))
    assert len(cache.later) == 2 and cache.seen == 1
    draft, eps = torch.zeros_like(x0), gaussian(x0, seeded(1))
    for index, step in enumerate(STEPS):
        t = torch.full((2,), step, dtype=torch.float64)
        alone = model.remember(add_noise(x0, eps, t), t, cond, replace(model.start(cond), later=()))
        for (k, v), (k2, v2) in zip(cache.at(index).sink[0], alone.sink[0], strict=True):
            assert torch.equal(k, k2) and torch.equal(v, v2)
    seen: list[KVCache] = []
    velocity = model.velocity

    def spy(xt: Tensor, t: Tensor, cond, cache, r=None) -> Tensor:
        seen.append(cache)
        return velocity(xt, t, cond, cache, r)

    model.velocity = spy  # type: ignore[method-assign]
    denoise_chunk(model, cond, cache, STEPS, draft, seeded(2))
    assert [one is cache.at(index) for index, one in enumerate(seen)] == [True] * 3
    assert not torch.equal(cache.at(0).sink[0][0][0], cache.at(1).sink[0][0][0])


def test_off_policy_history_is_spoiled_as_the_stream_does_for_half_of_the_clips() -> None:
    x0, t = latents(4, batch=40), torch.full((40,), 0.4, dtype=torch.float64)
    for kind, level in (("fixed", 0.2), ("matched", 0.4), ("clean", 0.0)):
        hist, t_hist = given_history(x0, small_roles(config(history=History(kind, 0.2))), t)
        clean = t_hist == 0
        assert set(t_hist.tolist()) <= {0.0, level} and torch.equal(hist[clean], x0[clean])
        assert kind == "clean" or 10 < int(clean.sum()) < 30
    _, t_hist = given_history(x0, small_roles(config(history=History("random", 0.2))), t)
    assert t_hist.shape == (40, 4) and 0 < float((t_hist > 0).double().mean()) < 0.34


def test_with_a_matched_history_an_off_policy_clip_has_one_step() -> None:
    stored = torch.stack([latents(4, seed=s) for s in range(4)], 1)
    roles = small_roles(config(history=History("matched")), trajectories=SimpleNamespace(states=lambda i: stored))
    told: list[tuple[Tensor, Tensor]] = []
    student = roles.causal("student")
    forward = student.forward

    def spy(xt, t, cond, hist, t_hist):
        told.append((t, t_hist))
        return forward(xt, t, cond, hist, t_hist)

    student.forward = spy  # type: ignore[method-assign]
    for step in range(6):
        renoised(batch_of(conditions(4)), replace(roles, key=(0, 0, step, 0, 0)), TrajectoryRollConfig())
    for t, t_hist in told:
        assert (t == t[:, :1]).all() and all(h in (0.0, float(row[0])) for h, row in zip(t_hist, t, strict=True))


# ---- sinks ------------------------------------------------------------------------------------------------


def chunk_of(value: float, dtype: torch.dtype = torch.float64, **grad) -> list[tuple[Tensor, Tensor]]:
    return [(torch.full((1, 2, 2), value, dtype=dtype, **grad), torch.full((1, 2, 2), -value, dtype=dtype, **grad))]


def test_an_ema_sink_is_the_average_of_what_left_the_window() -> None:
    student = small_student(config(sink=Sink("ema", 0.9), window_chunks=2))
    cache = student.start(conditions(2))
    values, sink = [3.0, 1.0, 4.0, 1.5, 9.0, 2.0], 3.0
    for index, value in enumerate(values):
        cache = cache.push(chunk_of(value))
        if index >= 3:  # the chunk that was pushed two before it leaves
            sink = 0.9 * sink + 0.1 * values[index - 2]
        assert float(cache.sink[0][0][0].mean()) == pytest.approx(sink, abs=1e-12)
        assert float(cache.sink[0][0][1].mean()) == pytest.approx(-sink, abs=1e-12)
        assert len(cache.window) == min(index, 2)


def test_an_ema_sink_moves_in_bf16_too_and_leaves_older_caches_alone() -> None:
    cache = small_student(config(sink=Sink("ema", 0.999), window_chunks=0)).start(conditions(2))
    first = cache.push(chunk_of(1.0, torch.bfloat16))
    cache = first
    for _ in range(50):
        cache = cache.push(chunk_of(1.01, torch.bfloat16))
    assert 1.0003 < float(cache.sink[0][0][0].mean()) < 1.001
    assert float(first.sink[0][0][0].float().mean()) == 1.0 and cache.seen == 51 and len(cache.visible) == 1


def test_gradient_goes_through_an_ema_sink_by_its_weights() -> None:
    chunks = [chunk_of(float(i), requires_grad=True) for i in range(4)]
    cache = small_student(config(sink=Sink("ema", 0.9), window_chunks=1)).start(conditions(2))
    for chunk in chunks:
        cache = cache.push(chunk)
    cache.sink[0][0][0].sum().backward()
    grads = [chunk[0][0].grad for chunk in chunks]
    assert [None if g is None else round(float(g.mean()), 12) for g in grads] == [0.81, 0.09, 0.1, None]


@pytest.mark.parametrize("sink", [Sink(), Sink("ema", 0.5)])
@pytest.mark.parametrize("positions", ["relative", "absolute"])
@torch.no_grad()
def test_cached_rollout_equals_full_forward_with_every_sink_and_position(sink: Sink, positions: str) -> None:
    """Within what the window holds, where no sink has moved yet; with absolute positions and a kept sink beyond it."""
    model = small_student(config(sink=sink, positions=positions), 3)
    frames = 10 if positions == "absolute" and sink.kind == "first" else 6
    cond, xt, hist = conditions(frames), latents(frames, seed=1), latents(frames, seed=2)
    t, t_hist = torch.full((2,), 0.6).double(), torch.full((2,), 0.1).double()
    whole, cache = model(xt, t, cond, hist, t_hist), model.start(cond)
    for start in range(0, frames, 2):
        told, now = cond.frames(start, start + 2), slice(start, start + 2)
        torch.testing.assert_close(model.velocity(xt[:, now], t, told, cache), whole[:, now], rtol=0, atol=1e-10)
        cache = model.remember(hist[:, now], t_hist, told, cache)


def test_absolute_positions_count_from_the_beginning_of_the_stream() -> None:
    cache = small_student(config(window_chunks=2, positions="absolute")).start(conditions(2))
    for _ in range(9):
        cache = cache.push(2 * chunk_of(0.0))  # of two layers
    starts = [int(kv.positions[0, 0]) for kv in cache.context()[0] if kv.positions[0, 0] >= 0]
    assert starts == [0, 14, 16] and int(cache.positions()[0, 0]) == 18


# ---- sessions and exports ---------------------------------------------------------------------------------

SHIPPED = {
    "ema sink": {"sink": Sink("ema", 0.6)},
    "matched history": {"history": History("matched")},
    "random history": {"history": History("random", 0.2)},
    "references alone": {"sink_chunks": 0},
    "absolute positions": {"positions": "absolute"},
}


@pytest.mark.parametrize("kind", SHIPPED)
def test_a_saved_session_goes_on_bitwise(kind: str, tmp_path: Path) -> None:
    model = small_model(2, **{"steps": STEPS, "window_chunks": 1, **SHIPPED[kind]})
    session = model.stream(images(), look_ahead=0)
    session.push(tone(40000))
    chunks = iter(session)
    for _ in range(4):
        next(chunks)
    again = iter(model.resume(session.save(tmp_path / "kept")))
    for _ in range(2):
        assert torch.equal(next(chunks).frames, next(again).frames)


@pytest.mark.parametrize("kind", SHIPPED)
def test_a_streams_configuration_survives_plain_data(kind: str) -> None:
    told = config(**SHIPPED[kind])
    assert StreamConfig.read(asdict(told)) == told


def test_gradient_flows_from_chunk_to_chunk_only_where_it_is_asked_for() -> None:
    model, cond = small_student(config(), 3), conditions(2)
    for write, flows in ((remember_chunk, False), (write_chunk, True)):
        x0 = latents(2).requires_grad_()
        cache = write(model, x0, cond, model.start(cond), History(), seeded())
        assert isinstance(model, CausalDiT) and cache.sink[0][0][0].requires_grad == flows
