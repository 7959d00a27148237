"""Objectives and rollouts: gradients against closed forms, and where they go."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from conftest import (
    at_step,
    batch_of,
    conditions,
    gradients,
    has_gradient,
    latents,
    small_dit,
    small_roles,
)
from torch import Tensor, nn

from distill import rollout
from distill.contracts import Roles, Roll
from recipes import dmd, flow_matching, identity_drift, ode_regression, perceptual, self_forcing
from student.causal_dit import CausalDiT, StreamConfig
from teacher.attention import KV
from teacher.conditions import SILENCE, Conditions
from teacher.dit import DiT
from teacher.flow import add_noise, sample_time, v_from_x0, velocity
from teacher.guidance import Guidance

STREAM = StreamConfig(chunk_frames=2, sink_chunks=1, window_chunks=1, steps=(1.0, 0.8, 0.45))
PLAIN = dmd.Config(cfg=Guidance(1.0, 1.0))


class Gaussian(DiT):
    """The exact network of data ~ N(mean, deviation^2), every number of the latents by itself."""

    def __init__(self, mean: float | Tensor, deviation: float):
        nn.Module.__init__(self)
        self.mean, self.deviation, self.heard = mean, deviation, list[Conditions]()

    def encode_refs(self, cond: Conditions) -> list[list[KV]]:
        return []

    def forward(self, x: Tensor, t: Tensor, cond: Conditions, refs: list[list[KV]] | None = None) -> Tensor:
        self.heard.append(cond)
        a = t.reshape(-1, 1, 1, 1, 1)
        gain = self.deviation**2 * (1 - a) / ((1 - a) ** 2 * self.deviation**2 + a**2)
        return v_from_x0(x, self.mean + gain * (x - (1 - a) * self.mean), t)


def gaussian_roles(teacher: float | Tensor, critic: float | Tensor, deviation: float = 0.5) -> Roles:
    return small_roles(STREAM, {"teacher": Gaussian(teacher, deviation), "critic": Gaussian(critic, deviation)})


# ---- distribution matching --------------------------------------------------------------------------------


def test_the_dmd_surrogate_has_the_gradient_g_over_the_number_of_elements() -> None:
    roles, x0, cond = small_roles(STREAM), latents(4).requires_grad_(), conditions(4)
    term = dmd.term(Roll(x0, cond), roles, dmd.Config(cfg=Guidance(3.0, 2.0)))
    term.value.backward()
    with torch.no_grad():
        expected = dmd.dmd_gradient(x0.detach(), Roll(x0, cond), roles, dmd.Config(cfg=Guidance(3.0, 2.0)))
    assert x0.grad is not None and expected.abs().mean() > 1e-3
    torch.testing.assert_close(x0.grad, expected / x0.numel(), rtol=1e-10, atol=1e-14)
    assert not has_gradient(roles.models["critic"]) and not has_gradient(roles.models["teacher"])


def test_dmd_is_zero_where_critic_and_teacher_agree() -> None:
    teacher = small_dit(1)
    roles = small_roles(STREAM, {"teacher": teacher, "critic": small_dit(1)})
    gradient = dmd.dmd_gradient(latents(4), Roll(latents(4), conditions(4)), roles, PLAIN)
    assert torch.equal(gradient, torch.zeros_like(gradient))
    guided = dmd.dmd_gradient(latents(4), Roll(latents(4), conditions(4)), roles, dmd.Config())
    assert guided.abs().max() > 0


def test_dmd_is_the_score_difference_of_two_gaussians() -> None:
    real, fake, s, cond = 1.5, -0.5, 0.5, conditions(4)
    x0 = fake + s * latents(4)
    roles = gaussian_roles(real, fake, s)
    g = dmd.dmd_gradient(x0, Roll(x0, cond), roles, PLAIN)
    t = sample_time((2,), PLAIN.shift, roles.generator("dmd/time"), PLAIN.low, PLAIN.high).reshape(2, 1, 1, 1, 1)
    xt = (1 - t) * x0 + t * roles.noise(x0, "dmd/noise")
    variance = (1 - t) ** 2 * s**2 + t**2  # of x_t, whose score is ((1 - t) mean - x_t) / variance
    scores = [((1 - t) * mean - xt) / variance for mean in (fake, real)]
    x0_real = (xt + t**2 * scores[1]) / (1 - t)  # Tweedie
    difference = t**2 / (1 - t) * (scores[0] - scores[1])
    chunks = (x0 - x0_real).abs().unflatten(1, (2, 2)).mean((2, 3, 4, 5))  # [B, chunks]
    torch.testing.assert_close(g, difference / chunks.repeat_interleave(2, 1)[:, :, None, None, None])


def test_the_dmd_normalizer_is_that_of_the_chunk_alone() -> None:
    roles, x0, cond = gaussian_roles(1.5, -0.5), latents(4), conditions(4)
    other = torch.cat([x0[:, :2], 10 * x0[:, 2:]], 1)
    a, b = (dmd.dmd_gradient(x, Roll(x, cond), roles, PLAIN) for x in (x0, other))
    assert torch.equal(a[:, :2], b[:, :2]) and not torch.allclose(a[:, 2:], b[:, 2:])


@pytest.mark.parametrize(("sign", "arrives"), [(1.0, True), (-1.0, False), (0.0, False)])
def test_dmd_brings_a_generator_to_the_teacher_and_with_the_wrong_sign_or_none_does_not(
    sign: float, arrives: bool
) -> None:
    """x0 = z + b, with a critic that always knows where the samples are: b must find the teacher's mean."""
    target, b, cond = 2.0, torch.zeros(4, 1, 1, dtype=torch.float64, requires_grad=True), conditions(4)
    for step in range(60):
        roles = at_step(gaussian_roles(target, b.detach(), deviation=1.0), step)
        x0 = roles.noise(latents(4), "z") + b
        (gradient,) = torch.autograd.grad(dmd.term(Roll(x0, cond), roles, PLAIN).value, b)
        b.data -= sign * 1.0 * gradient
    distance = (b.detach() - target).abs().max().item()
    assert distance < 0.3 if arrives else distance > 1.9


def test_dmd_gives_gradient_to_the_student_alone() -> None:
    roles = small_roles(STREAM)
    roll = self_forcing.roll_self(batch_of(conditions(4)), roles, self_forcing.Config(chunks=2))
    dmd.term(roll, roles, dmd.Config()).value.backward()
    assert has_gradient(roles.models["student"])
    assert not has_gradient(roles.models["critic"]) and not has_gradient(roles.models["teacher"])


# ---- flow matching ----------------------------------------------------------------------------------------


def test_critic_flow_matching_gives_gradient_to_the_critic_alone() -> None:
    roles = small_roles(STREAM)
    roll = self_forcing.roll_self(batch_of(conditions(4)), roles, self_forcing.Config(chunks=2))
    assert roll.x0.requires_grad
    flow_matching.term(roll, roles, flow_matching.Config(role="critic")).value.backward()
    assert has_gradient(roles.models["critic"])
    assert not has_gradient(roles.models["student"]) and not has_gradient(roles.models["teacher"])


def test_flow_matching_is_least_for_the_exact_network_and_zero_without_spread() -> None:
    cond, cfg = conditions(4), flow_matching.Config(role="teacher", low=0.05)
    point = Roll(torch.full_like(latents(4), 1.5), cond)
    assert flow_matching.term(point, gaussian_roles(1.5, 0.0, deviation=1e-9), cfg).value.item() < 1e-12
    spread = Roll(1.5 + 0.5 * latents(4), cond)
    losses = {mean: flow_matching.term(spread, gaussian_roles(mean, 0.0), cfg).value for mean in (1.0, 1.5, 2.0)}
    assert losses[1.5] < losses[1.0] and losses[1.5] < losses[2.0]


@pytest.mark.parametrize(
    ("rates", "text", "audio", "refs"),
    [
        ({}, False, False, False),
        ({"drop_text": 1.0}, True, False, False),
        ({"drop_audio": 1.0}, False, True, False),
        ({"drop_both": 1.0}, True, True, False),
        ({"drop_refs": 1.0}, False, False, True),
    ],
)
def test_flow_matching_drops_the_modality_it_names(
    rates: dict[str, float], text: bool, audio: bool, refs: bool
) -> None:
    roles = gaussian_roles(0.0, 0.0)
    flow_matching.term(Roll(latents(4), conditions(4)), roles, flow_matching.Config(role="teacher", low=0.1, **rates))
    teacher = roles.models["teacher"]
    assert isinstance(teacher, Gaussian)
    (heard,) = teacher.heard
    silent = (heard.speak == SILENCE).all() and (heard.listen == SILENCE).all()
    assert (not heard.text_mask.any(), bool(silent), not heard.ref_mask.any()) == (text, audio, refs)


# ---- off-policy rollouts and ODE regression ---------------------------------------------------------------


class StraightPaths:
    """Trajectories that lead straight from noise to x0: the velocity eps - x0 is exact at each of their points."""

    def __init__(self, frames: int, batch: int = 2):
        self.x0, self.eps = latents(frames, batch, seed=1), latents(frames, batch, seed=2)
        times = torch.tensor([*STREAM.steps, 0.0], dtype=torch.float64)
        states = [add_noise(self.x0, self.eps, t.expand(batch)) for t in times]
        self._states = torch.stack(states, 1)

    def states(self, index: Tensor) -> Tensor:
        return self._states[index]


class Oracle(CausalDiT):
    """Knows the path. Records what it was given."""

    def __init__(self, paths: StraightPaths):
        nn.Module.__init__(self)
        self.paths, self.given = paths, list[Any]()

    def forward(
        self, xt: Tensor, t: Tensor, cond: Conditions, hist: Tensor | None = None, t_hist: Tensor | None = None
    ) -> Tensor:
        self.given.append((xt, t, hist, t_hist))
        return velocity(self.paths.x0, self.paths.eps)


def test_the_teacher_rollout_takes_each_chunk_at_the_state_of_its_own_time() -> None:
    paths = StraightPaths(6, batch=8)
    oracle = Oracle(paths)
    roles = small_roles(STREAM, {"student": oracle}, trajectories=paths)
    roll = rollout.teacher(batch_of(conditions(6, batch=8)), roles, rollout.TrajectoryRollConfig())
    assert roll.target is not None
    torch.testing.assert_close(roll.x0, roll.target)  # only if state and time of every frame belong together
    torch.testing.assert_close(roll.target, paths.x0)
    (_, t, hist, t_hist) = oracle.given[0]
    assert set(t.flatten().tolist()) == set(STREAM.steps)
    assert torch.equal(t[:, 0::2], t[:, 1::2]) and not torch.equal(t[:, 0], t[:, 2])  # one time per chunk
    assert set(t_hist.tolist()) == {0.0, 0.1}  # the refiner's history and the backbone's
    torch.testing.assert_close(hist, add_noise(paths.x0, roles.noise(paths.x0, "rollout/history"), t_hist))


def test_the_renoised_rollout_noises_the_end_of_the_path_afresh() -> None:
    paths = StraightPaths(6)
    oracle = Oracle(paths)
    roles = small_roles(STREAM, {"student": oracle}, trajectories=paths)
    roll = rollout.renoised(batch_of(conditions(6)), roles, rollout.TrajectoryRollConfig())
    (xt, t, _, _) = oracle.given[0]
    torch.testing.assert_close(xt, add_noise(paths.x0, roles.noise(paths.x0, "rollout/noise"), t))
    assert roll.target is not None and torch.equal(roll.target, paths.x0)


@pytest.mark.parametrize("kind", [rollout.teacher, rollout.renoised])
def test_ode_regression_gives_gradient_to_the_student_alone(kind) -> None:
    roles = small_roles(STREAM, trajectories=StraightPaths(6))
    roll = kind(batch_of(conditions(6)), roles, rollout.TrajectoryRollConfig())
    value = ode_regression.term(roll, roles, ode_regression.Config()).value
    torch.testing.assert_close(value, (roll.x0 - roll.target).square().mean())
    value.backward()
    assert all(g is not None and g.abs().sum() > 0 for g in gradients(roles.models["student"]))
    assert not has_gradient(roles.models["critic"]) and not has_gradient(roles.models["teacher"])
    with pytest.raises(ValueError, match="target"):
        ode_regression.term(Roll(roll.x0, roll.cond), roles, ode_regression.Config())


# ---- perceptual and identity ------------------------------------------------------------------------------


def test_perceptual_is_zero_for_the_target_itself_and_positive_for_all_else() -> None:
    roles, target, cond = small_roles(STREAM), latents(4, dtype=torch.float32), conditions(4)

    def value(x0: Tensor) -> Tensor:
        return perceptual.term(Roll(x0, cond, target=target), roles, perceptual.Config()).value

    assert value(target).item() == pytest.approx(0, abs=1e-7)
    near, far = value(target + 0.1), value(target + 0.2)
    assert 0 < near < far
    x0 = (target + 0.1 * latents(4, seed=9, dtype=torch.float32)).requires_grad_()
    step = torch.autograd.grad(value(x0), x0)[0]
    assert value((x0 - 20 * step).detach()) < value(x0.detach())


class Compass(nn.Module):
    """Embeds latents as the direction of their first two channels at one pixel."""

    natural = 0.8

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.normalize(x[:, :, :2, 0, 0], dim=-1)


def facing(*similarities: float) -> Tensor:
    """Latents [1, T, 4, 4, 4] whose frames have these cosines with the reference direction (1, 0)."""
    x = torch.zeros(1, len(similarities), 4, 4, 4, dtype=torch.float64)
    cosine = torch.tensor(similarities, dtype=torch.float64)
    x[0, :, 0, 0, 0], x[0, :, 1, 0, 0] = cosine, (1 - cosine**2).sqrt()
    return x.requires_grad_()


def drift_gradient(x0: Tensor, **settings: float) -> tuple[float, Tensor]:
    cond = replace(conditions(x0.shape[1], batch=1, present=(1, 0)), refs=facing(1.0, -1.0).detach())
    roles = small_roles(STREAM, embedder=Compass())
    term = identity_drift.term(Roll(x0, cond), roles, identity_drift.Config(**settings))
    term.value.backward()
    assert x0.grad is not None
    return term.value.item(), x0.grad.abs().sum((0, 2, 3, 4))


def test_more_than_natural_likeness_is_not_rewarded() -> None:
    value, gradient = drift_gradient(facing(0.9, 0.9, 0.95, 0.95), drift=0.0)
    assert value == 0 and gradient.eq(0).all()
    value, gradient = drift_gradient(facing(0.9, 0.9, 0.6, 0.6), drift=0.0)
    assert value == pytest.approx(0.2 / 2) and gradient.ne(0).tolist() == [False, False, True, True]


def test_drift_pulls_only_chunks_that_fell_behind_the_first() -> None:
    frames = facing(0.6, 0.6, 0.3, 0.3, 0.7, 0.7)
    value, gradient = drift_gradient(frames, anchor=0.0, margin=0.02)
    assert value == pytest.approx((0.6 - 0.3 - 0.02) / 3)
    assert gradient.ne(0).tolist() == [False, False, True, True, False, False]
    assert drift_gradient(facing(0.6, 0.6, 0.59, 0.59), anchor=0.0, margin=0.02)[0] == 0


def test_identity_terms_pull_towards_the_reference() -> None:
    x0 = facing(0.6, 0.6)
    drift_gradient(x0)
    assert x0.grad is not None
    moved = (x0 - x0.grad).detach()
    assert (Compass()(moved)[0, :, 0] > 0.6).all()


def test_a_character_without_references_adds_nothing_and_spoils_nothing() -> None:
    roles = small_roles(STREAM, embedder=Compass())
    x0 = torch.cat([facing(0.6, 0.6), facing(0.1, 0.1)]).detach().requires_grad_()
    cond = replace(conditions(2, batch=2), refs=facing(1.0, 1.0).detach().expand(2, -1, -1, -1, -1))
    cond.ref_mask[1] = False
    for mask, value in ((cond.ref_mask, 0.2), (torch.zeros_like(cond.ref_mask), 0.0)):
        term = identity_drift.term(Roll(x0, replace(cond, ref_mask=mask)), roles, identity_drift.Config())
        (gradient,) = torch.autograd.grad(term.value, x0)
        assert term.value.item() == pytest.approx(value) and gradient.isfinite().all()
        assert gradient[1].eq(0).all() and gradient[0].ne(0).any() == (value > 0)


def test_likeness_is_a_soft_maximum_over_the_images_that_are_there() -> None:
    faces, pool = Compass()(facing(0.6)), Compass()(facing(1.0, -1.0, 0.6))
    alone = torch.tensor([[True, False, False]])
    similarity = identity_drift.reference_similarity(faces, pool, alone, 0.1)
    assert similarity.item() == pytest.approx(0.6)
    every = identity_drift.reference_similarity(faces, pool, torch.ones(1, 3, dtype=torch.bool), 0.1)
    assert 0.95 < every.item() <= 1.0
