"""Flow time and the samplers that go down it, each against a known answer."""

from __future__ import annotations

import math

import pytest
import torch
from conftest import latents, normal
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from teacher import flow
from teacher.sampler import euler, heun


@pytest.mark.parametrize("shape", [(2,), (2, 5)])
def test_x0_v_and_eps_are_recovered_from_each_other(shape: tuple[int, ...]) -> None:
    x0, eps = latents(5, seed=1), latents(5, seed=2)
    t = 0.05 + 0.9 * normal(*shape, seed=3).sigmoid()
    xt, v = flow.add_noise(x0, eps, t), flow.velocity(x0, eps)
    torch.testing.assert_close(flow.x0_from_v(xt, v, t), x0)
    torch.testing.assert_close(flow.eps_from_v(xt, v, t), eps)
    torch.testing.assert_close(flow.v_from_x0(xt, x0, t), v)
    torch.testing.assert_close(flow.v_from_eps(xt, eps, t), v)


PREDICTIONS = ("x0", "v", "eps")


def predictions(xt: Tensor, t: Tensor, kind: str, value: Tensor) -> dict[str, Tensor]:
    """What a prediction of one kind means in all three."""
    v = {"x0": flow.v_from_x0, "v": lambda xt, v, t: v, "eps": flow.v_from_eps}[kind](xt, value, t)
    return {"x0": flow.x0_from_v(xt, v, t), "v": v, "eps": flow.eps_from_v(xt, v, t)}


@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.floats(0.01, 0.99), st.sampled_from(PREDICTIONS), st.sampled_from(PREDICTIONS), st.booleans())
def test_any_prediction_goes_to_any_other_and_back(time: float, first: str, second: str, by_frame: bool) -> None:
    """For any numbers at all: a network's x0, v and eps need not be those that made x_t."""
    xt, value = latents(3, seed=1), latents(3, seed=2)
    t = torch.full((2, 3) if by_frame else (2,), time, dtype=torch.float64)
    there = predictions(xt, t, first, value)
    back = predictions(xt, t, second, there[second])
    torch.testing.assert_close(back[first], value, rtol=0, atol=1e-10)
    torch.testing.assert_close(flow.add_noise(there["x0"], there["eps"], t), xt, rtol=0, atol=1e-10)
    torch.testing.assert_close(flow.velocity(there["x0"], there["eps"]), there["v"], rtol=0, atol=1e-10)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.floats(0, 1), st.floats(0.2, 12), st.floats(0.2, 12))
def test_shift_and_unshift_are_inverse_both_ways_and_shifts_multiply(time: float, a: float, b: float) -> None:
    t = torch.tensor(time, dtype=torch.float64)
    for there, back in ((flow.shift_time, flow.unshift_time), (flow.unshift_time, flow.shift_time)):
        torch.testing.assert_close(back(there(t, a), a), t, rtol=0, atol=1e-10)
    torch.testing.assert_close(flow.unshift_time(t, a), flow.shift_time(t, 1 / a), rtol=0, atol=1e-10)
    torch.testing.assert_close(flow.shift_time(flow.shift_time(t, a), b), flow.shift_time(t, a * b), rtol=0, atol=1e-10)
    ratio = flow.shift_time(t, a) * (1 - t), a * t * (1 - flow.shift_time(t, a))  # noise to signal, times the shift
    torch.testing.assert_close(*ratio, rtol=0, atol=1e-10)


def test_guiding_v_by_w_is_guiding_x0_or_eps_by_scale_s_of_w_minus_one() -> None:
    """Ours: v = u + w (c - u). Self-Forcing's: x0 = c + s (c - u), s = guidance_scale 3.0, which is w = 4 here."""
    s, w = 3.0, 4.0
    xt, c, u = (latents(3, seed=seed) for seed in (1, 2, 3))
    t = 0.05 + 0.9 * normal(2, 3, seed=4).sigmoid()
    guided = predictions(xt, t, "v", u + w * (c - u))
    told, untold = predictions(xt, t, "v", c), predictions(xt, t, "v", u)
    for kind in PREDICTIONS:
        theirs = told[kind] + s * (told[kind] - untold[kind])
        torch.testing.assert_close(guided[kind], theirs, rtol=0, atol=1e-10)


def test_time_zero_is_clean_and_time_one_is_noise() -> None:
    x0, eps = latents(2, seed=1), latents(2, seed=2)
    assert torch.equal(flow.add_noise(x0, eps, torch.zeros(2)), x0)
    assert torch.equal(flow.add_noise(x0, eps, torch.ones(2)), eps)


def test_unshift_inverts_shift_and_shift_moves_towards_noise() -> None:
    t = torch.linspace(0, 1, 101, dtype=torch.float64)
    shifted = flow.shift_time(t, 5.0)
    torch.testing.assert_close(flow.unshift_time(shifted, 5.0), t)
    assert (shifted[1:-1] > t[1:-1]).all() and (shifted.diff() > 0).all()
    assert flow.shift_time(torch.tensor(0.5), 5.0).item() == pytest.approx(5 / 6)


@pytest.mark.parametrize(("steps", "shift"), [(1, 1.0), (4, 5.0), (50, 3.0)])
def test_a_schedule_falls_from_exactly_one_to_exactly_zero(steps: int, shift: float) -> None:
    times = flow.schedule(steps, shift)
    assert len(times) == steps + 1 and times[0] == 1 and times[-1] == 0
    assert (times.diff() < 0).all() and times.dtype == torch.float64


def test_sampled_times_are_clamped_and_keyed() -> None:
    draw = [flow.sample_time((999,), 5.0, torch.Generator().manual_seed(s), 0.02, 0.98) for s in (0, 0, 1)]
    assert torch.equal(draw[0], draw[1]) and not torch.equal(draw[0], draw[2])
    assert draw[0].min() >= 0.02 and draw[0].max() == 0.98
    assert draw[0].median() == pytest.approx(5 / 6, abs=0.03)  # the shift of the uniform median


# ---- samplers ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("sampler", "order"), [(euler, 1), (heun, 2)])
def test_a_sampler_converges_with_its_order(sampler, order: int) -> None:
    x = torch.ones(1, 1, dtype=torch.float64)
    exact = math.exp(-(1 + 1 / 3))  # dx/dt = (1 + t^2) x, from t = 1 down to 0

    def error(steps: int) -> float:
        states = sampler(lambda x, t: (1 + t[:, None] ** 2) * x, x, flow.schedule(steps, 1.0))
        assert len(states) == steps + 1 and torch.equal(states[0], x)
        return abs(states[-1].item() - exact)

    assert math.log2(error(40) / error(80)) == pytest.approx(order, abs=0.15)
