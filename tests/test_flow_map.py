"""A flow map: the identity that it is trained by, the steps that it streams with, and weights that know none."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from analytic import Causal, Exact, World, codec, video
from analytic import conditions as world_conditions
from conftest import (
    SMALL,
    batch_of,
    conditions,
    has_gradient,
    latents,
    randomize,
    small_dit,
    small_roles,
    small_student,
)
from einops import repeat
from torch import Tensor

from distill.contracts import Roles, Roll
from recipes import flow_map, self_forcing
from student.causal_dit import CausalDiT, StreamConfig
from student.stream import denoise_chunk, stream
from teacher.dit import DiT, DiTConfig
from teacher.flow import per_frame

WHOLE = StreamConfig(chunk_frames=4, sink_chunks=0, window_chunks=1, steps=(1.0,))  # one chunk: no past to speak of
STREAM = StreamConfig(chunk_frames=2, sink_chunks=1, window_chunks=1, steps=(1.0, 0.6, 0.3))


class ExactMap(Causal):
    """The flow map of a Gaussian world, for clips of a single chunk; `wrong` is added to it away from r = t."""

    def __init__(self, world: World, stream: StreamConfig, wrong: float = 0.0):
        super().__init__(world, stream, flow_map=True)
        self.world, self.wrong = world, wrong

    def mean_velocity(self, xt: Tensor, t: Tensor, r: Tensor) -> Tensor:
        (rotation, spread), mean = (part[0] for part in self.world.spectra), self.world.means[0]
        a, b = t.double()[:, None], r.double()[:, None]
        d = (xt.flatten(1) - (1 - a) * mean) @ rotation
        scale = (((1 - b) ** 2 * spread + b**2) / ((1 - a) ** 2 * spread + a**2)).sqrt()
        jump = (xt - self.world.clips((1 - b) * mean + (d * scale) @ rotation.T)) / per_frame(
            (t - r).clamp_min(1e-9), xt
        )
        now = Exact(self.world)(xt, t, None)
        return torch.where(per_frame(t - r, xt) > 1e-6, jump, now) + self.wrong * per_frame(t - r, xt)

    def velocity(self, xt, t, cond, cache, r=None):
        return self.mean_velocity(xt, t, torch.zeros_like(t) if r is None else r)

    def forward(self, xt, t, cond, hist=None, t_hist=None, r=None):
        return self.velocity(xt, t, cond, None, r)


def value(step: float, wrong: float = 0.0, **shares: float) -> float:
    world = video()
    roles = Roles(
        {"teacher": Exact(world), "student": ExactMap(world, WHOLE, wrong)}, WHOLE, codec(world), key=(0, 0, 1, 0, 0)
    )
    x0 = world.sample(512, torch.Generator().manual_seed(1))
    cfg = flow_map.Config(shift=1.0, step=step, velocity="teacher", **shares)
    return flow_map.term(Roll(x0, world_conditions(world, 512)), roles, cfg).value.item()


def test_the_exact_flow_map_satisfies_the_identity_to_the_second_order_of_the_step_and_another_does_not() -> None:
    coarse, fine = value(0.02), value(0.005)
    assert fine < 1e-7 < coarse and coarse / fine > 50  # second order, squared: 256 times, were it not for the ends
    assert value(0.005, wrong=0.3) > 1e-2
    assert value(0.005, wrong=0.3, instant=1.0, to_clean=0.0) < 1e-10  # r = t: there it is the velocity, and right


@pytest.mark.parametrize("p", [0.0, 0.5, 1.0])
def test_a_clip_counts_by_its_own_error_to_the_power_that_the_weight_leaves(p: float) -> None:
    shares = {"instant": 0.0, "to_clean": 1.0}
    roles = Roles({}, WHOLE, codec(video()), key=(0, 0, 1, 0, 0))
    t, _ = flow_map.draw_times(512, roles, flow_map.Config(shift=1.0, **shares))
    errors = (2 * 0.3 * t) ** 2  # .3 (t - r) is wrong in itself, and once more as the slope over t - r
    expected = (errors / (errors + 1e-3) ** p).mean().item()
    assert value(0.005, wrong=0.3, adaptive=p, **shares) == pytest.approx(expected, rel=1e-3)


def test_times_are_split_between_the_velocity_the_clean_end_and_any_end() -> None:
    t, r = flow_map.draw_times(4000, small_roles(STREAM), flow_map.Config())
    assert (r <= t).all() and (t <= 1).all()
    instant, clean = (r == t).double().mean().item(), (r == 0).double().mean().item()
    assert instant == pytest.approx(0.5, abs=0.03) and clean == pytest.approx(0.25, abs=0.03)
    between = (r / t)[(r > 0) & (r < t)]
    assert between.mean().item() == pytest.approx(0.5, abs=0.03) and len(between) > 900


@pytest.mark.parametrize("steps", [(1.0,), (1.0, 0.5), (1.0, 0.9, 0.2), (1.0, 0.75, 0.5, 0.25)], ids=len)
def test_an_exact_flow_map_makes_the_same_clip_in_any_number_of_steps(steps: tuple[float, ...]) -> None:
    world = video()
    model, cond = ExactMap(world, replace(WHOLE, steps=steps)), world_conditions(world, 64)
    noise = torch.randn(64, 4, 1, 1, 1, generator=torch.Generator().manual_seed(3)).double()
    blank = torch.zeros_like(noise)
    made = denoise_chunk(model, cond, model.start(cond), steps, blank, torch.Generator().manual_seed(3))
    one = torch.ones(64, dtype=torch.float64)
    torch.testing.assert_close(made, noise - model.mean_velocity(noise, one, 0 * one), rtol=1e-9, atol=1e-9)


# ---- the network ------------------------------------------------------------------------------------------


def test_a_second_time_input_changes_nothing_until_it_is_trained_and_something_then() -> None:
    plain = small_dit(3)
    dit = DiT(DiTConfig(**SMALL, flow_map=True)).double()  # as it begins
    missing = dit.load_state_dict(plain.state_dict(), strict=False)
    assert missing.unexpected_keys == [] and all(k.startswith("interval_embedding.") for k in missing.missing_keys)
    before, after, cond = CausalDiT(plain, STREAM), CausalDiT(dit, STREAM), conditions(4)
    xt, t, r = latents(4), torch.tensor([0.9, 0.6]).double(), torch.tensor([0.5, 0.0]).double()
    assert before.flow_map is False and after.flow_map is True
    for ends in (None, r):
        assert torch.equal(after(xt, t, cond, r=ends), before(xt, t, cond))
    randomize(dit.interval_embedding, 5)
    assert not torch.allclose(after(xt, t, cond, r=r), before(xt, t, cond))
    torch.testing.assert_close(after(xt, t, cond), after(xt, t, cond, r=0 * t))  # not told: to the clean end
    assert not torch.allclose(after(xt, t, cond, r=r)[0], after(xt, t, cond, r=0 * t)[0])  # r = 0.5 is heard
    torch.testing.assert_close(after(xt, t, cond, r=repeat(r, "b -> b t", t=4)), after(xt, t, cond, r=r))


def test_one_chunk_against_the_cache_hears_r_as_a_whole_clip_does() -> None:
    model, cond, hist, xt = small_student(STREAM, 3, flow_map=True), conditions(4), latents(4), latents(4, seed=1)
    t, r, none = (torch.full((2,), value, dtype=torch.float64) for value in (0.8, 0.3, 0.0))
    whole = model(xt, t, cond, hist, none, r)
    cache = model.remember(hist[:, :2], none, cond.frames(0, 2), model.start(cond))
    torch.testing.assert_close(model.velocity(xt[:, 2:], t, cond.frames(2, 4), cache, r), whole[:, 2:])


def test_a_flow_map_goes_along_its_path_and_others_noise_afresh(monkeypatch: pytest.MonkeyPatch) -> None:
    for flow in (True, False):
        model, cond, seen = small_student(STREAM, 3, flow_map=flow), conditions(2), []
        fast = model.streaming()
        velocity = fast.velocity

        def spy(xt, t, cond, cache, r=None, velocity=velocity, seen=seen):
            v = velocity(xt, t, cond, cache, r)
            seen.append((xt, float(t[0]), float(r[0]), v))
            return v

        monkeypatch.setattr(fast, "velocity", spy)
        monkeypatch.setattr(model, "streaming", lambda fast=fast: fast)
        (chunk,) = stream(model, None, cond, torch.Generator().manual_seed(0))
        assert [(t, r) for _, t, r, _ in seen] == list(
            zip(STREAM.steps, (0.6, 0.3, 0.0) if flow else (0, 0, 0), strict=True)
        )
        for (xt, t, r, v), (following, *_) in zip(seen, seen[1:], strict=False):
            assert torch.allclose(following, xt - (t - r) * v) == flow
        torch.testing.assert_close(chunk, seen[-1][0] - seen[-1][1] * seen[-1][3])


def test_the_term_trains_the_student_alone_by_the_first_evaluation_alone_and_refuses_one_without_r() -> None:
    models = {"student": small_student(STREAM, 3, flow_map=True), "teacher": small_dit(1)}
    roles, roll = small_roles(STREAM, models), Roll(latents(4), conditions(4))
    graphs = []
    models["student"].register_forward_hook(lambda module, inputs, out: graphs.append(out.requires_grad))
    flow_map.term(roll, roles, flow_map.Config(instant=0.0)).value.backward()
    assert graphs == [False, False, True] and has_gradient(models["student"].dit.interval_embedding)
    assert not has_gradient(models["teacher"]) and not has_gradient(roles.models["critic"])
    with pytest.raises(ValueError, match="model.flow_map must be true"):
        flow_map.term(roll, small_roles(STREAM), flow_map.Config())


def test_a_flow_maps_own_rollout_gives_gradient_through_the_exit_step() -> None:
    roles = small_roles(STREAM, {"student": small_student(STREAM, 3, flow_map=True)})
    roll = self_forcing.roll_self(batch_of(conditions(4)), roles, self_forcing.Config(chunks=2))
    roll.x0.square().mean().backward()
    assert has_gradient(roles.models["student"]) and roll.x0.isfinite().all()
