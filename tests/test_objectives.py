"""Objectives against a teacher that is known exactly: gradients, aims, and what a student learns of its own past."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from analytic import Causal, Exact, World, best_gaussian, blobs, codec, conditions, energy_distance, video
from conftest import batch_of, has_gradient, latents, small_roles, small_student
from conftest import conditions as small_conditions
from objectives import COUNT, generate, lags, measured, trained
from objectives_cases import BY_LABEL, CASES, PLAIN, STAGE1
from objectives_table import FLOW_MAP, PAGE, any_steps
from torch import Tensor

from distill import rollout
from distill.contracts import Roles, Roll
from recipes import consistency, dmd, self_forcing
from student.causal_dit import StreamConfig
from teacher.flow import add_noise, sample_time, v_from_x0
from teacher.sampler import heun

STREAM = StreamConfig(chunk_frames=2, sink_chunks=0, window_chunks=1, steps=(1.0, 0.5))
ON_POLICY = next(case for case in CASES if case.module == "self_forcing").label


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def score(world: World, x: Tensor, t: float) -> Tensor:
    """The gradient of log p_t at noised clips, by automatic differentiation of torch's own distributions."""
    flat = x.flatten(1).clone().requires_grad_()
    (gradient,) = torch.autograd.grad(world.log_density(flat, t).sum(), flat)
    return world.clips(gradient)


# ---- the instruments --------------------------------------------------------------------------------------


@pytest.mark.parametrize("world", [blobs(), video()], ids=["blobs", "video"])
def test_the_exact_teacher_is_the_flow_of_its_world_at_every_time(world: World) -> None:
    teacher, cond, x = Exact(world), conditions(world, 64), world.sample(64, seeded(1))
    for time in (0.05, 0.3, 0.7, 0.95):
        t = torch.full((64,), time, dtype=torch.float64)
        xt = add_noise(x, torch.randn(x.shape, generator=seeded(2), dtype=torch.float64), t)
        s = score(world, xt, time)
        torch.testing.assert_close(teacher(xt, t, cond), -time * s - (xt + time**2 * s) / (1 - time))  # Tweedie
    ends = [torch.full((64,), end, dtype=torch.float64) for end in (0.0, 1.0)]
    torch.testing.assert_close(teacher(x, ends[0], cond), -x)
    mean = world.clips((world.weights[:, None] * world.means).sum(0, keepdim=True))
    torch.testing.assert_close(teacher(x, ends[1], cond), x - mean)


@pytest.mark.parametrize("world", [blobs(), video()], ids=["blobs", "video"])
def test_the_paths_of_the_exact_teacher_lead_to_its_world(world: World) -> None:
    noise = torch.randn(COUNT, world.frames, world.channels, 1, 1, generator=seeded(3), dtype=torch.float64)
    teacher, cond = Exact(world), conditions(world, COUNT)
    ends = heun(lambda x, t: teacher(x, t, cond), noise, torch.linspace(1, 0, 13, dtype=torch.float64))[-1]
    assert energy_distance(ends, world.sample(COUNT, seeded(4))) < 0.005
    if world.frames > 1:
        assert lags(ends) == pytest.approx((0.9, 0.9), abs=0.06)


def test_energy_distance_is_that_of_the_formula_and_near_zero_for_equal_distributions_alone() -> None:
    x, y = torch.tensor([[0.0], [1.0]]), torch.tensor([[3.0], [5.0]])
    assert energy_distance(x, y) == pytest.approx(2 * (3 + 5 + 2 + 4) / 4 - 1 - 2)
    world = blobs()
    a, b = (world.sample(COUNT, seeded(seed)) for seed in (1, 2))
    assert abs(energy_distance(a, b)) < 0.004 < energy_distance(a + 0.2, b)
    assert energy_distance(a * torch.nan, b) == math.inf
    # No Gaussian passes the bounds: what passes has found the three blobs.
    assert energy_distance(best_gaussian(a), b) > max(case.bound for case in CASES if case.world.frames == 1)


# ---- distribution matching --------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["blobs", "video"])
def test_the_dmd_gradient_is_the_analytic_score_difference(kind: str) -> None:
    """Teacher and critic both exact: two mixtures, and two AR(1) processes of other memory, mean and spread."""
    if kind == "blobs":
        real, fake = blobs(), replace(blobs(), means=0.7 * blobs().means + 0.3, weights=blobs().weights.flip(0))
    else:
        real, fake = video(), video(memory=0.5, mean=-0.3, spread=0.8)
    stream = replace(STREAM, chunk_frames=min(real.frames, 2))
    roles = Roles({"teacher": Exact(real), "critic": Exact(fake)}, stream, codec(real), key=(0, 0, 1, 0, 0))
    x0, cfg = fake.sample(16, seeded(7)), dmd.Config(cfg=PLAIN, shift=2.0)
    found = dmd.dmd_gradient(x0, Roll(x0, conditions(real, 16)), roles, cfg)
    t = sample_time((16,), cfg.shift, roles.generator("dmd/time"), cfg.low, cfg.high)
    xt = add_noise(x0, roles.noise(x0, "dmd/noise"), t)
    for row, time in enumerate(t.tolist()):
        one = slice(row, row + 1)
        scores = {name: score(world, xt[one], time) for name, world in (("real", real), ("fake", fake))}
        x0_real = (xt[one] + time**2 * scores["real"]) / (1 - time)
        size = (x0[one] - x0_real).abs().unflatten(1, (-1, stream.chunk_frames)).mean((0, 2, 3, 4, 5))  # [chunks]
        expected = time**2 / (1 - time) * (scores["fake"] - scores["real"])
        expected = expected / size.repeat_interleave(stream.chunk_frames)[:, None, None, None]
        torch.testing.assert_close(found[one], expected, rtol=1e-6, atol=1e-6)


# ---- the student's own past -------------------------------------------------------------------------------


def test_a_bidirectional_teachers_step_tells_less_of_the_past_than_the_causal_flow_and_the_datas_step_all_of_it() -> (
    None
):
    """In a Gaussian world what a regression on (own noisy chunk, clean past) learns is linear: compare coefficients."""
    world, count = video(), 40_000
    x0 = world.sample(count, seeded(1))
    eps = torch.randn(x0.shape, generator=seeded(2), dtype=torch.float64)
    t = torch.full((count,), 0.8, dtype=torch.float64)
    xt = add_noise(x0, eps, t)
    batch = batch_of(conditions(world, count), x0)
    roles = Roles({"teacher": Exact(world)}, STREAM, codec(world))
    seen = torch.cat([xt[:, 2:].flatten(1), x0[:, :2].flatten(1), torch.ones(count, 1)], 1)
    of_past = {}
    for kind in ("data", "teacher"):
        v = consistency.path_velocity(x0, eps, xt, t, batch.cond, roles, consistency.RollConfig(velocity=kind))
        of_past[kind] = torch.linalg.lstsq(seen, v[:, 2:].flatten(1)).solution[2:4].sum(0)
    s, a = world.covariances[0], 0.8  # the exact causal flow: E[eps - x0 | own x_t, past], second chunk
    joint = torch.block_diag((1 - a) ** 2 * s[2:, 2:] + a**2 * torch.eye(2), s[:2, :2])
    joint[:2, 2:], joint[2:, :2] = (1 - a) * s[2:, :2], (1 - a) * s[:2, 2:]
    cross = torch.cat([a * torch.eye(2) - (1 - a) * s[2:, 2:], -s[2:, :2]], 1)  # cov(eps - x0, seen)
    exact = torch.linalg.solve(joint, cross.T)[2:].sum(0)
    torch.testing.assert_close(of_past["data"], exact, atol=0.05, rtol=0)
    assert (of_past["teacher"].abs() < 0.7 * exact.abs()).all()


# ---- consistency ------------------------------------------------------------------------------------------


class FlowMap(Causal):
    """The exact end of the path from any state of a Gaussian world, for clips of a single chunk."""

    def forward(self, xt, t, cond, hist=None, t_hist=None):
        (rotation, spread), a = (part[0] for part in self.world.spectra), t.double()[:, None]
        d = (xt.flatten(1) - (1 - a) * self.world.means[0]) @ rotation
        ends = self.world.means[0] + (d * (spread / ((1 - a) ** 2 * spread + a**2)).sqrt()) @ rotation.T
        return torch.where(t[:, None, None, None, None] > 0, v_from_x0(xt, self.world.clips(ends), t), 0.0)


def flow_map_gap(steps: int) -> tuple[float, Roll]:
    world, stream = video(), replace(STREAM, chunk_frames=4)
    student = FlowMap(world, stream)
    student.world = world
    roles = Roles({"teacher": Exact(world), "student": student}, stream, codec(world), key=(0, 0, 1, 0, 0))
    cfg = consistency.RollConfig(steps=steps, shift=1.0, velocity="teacher")
    roll = consistency.roll_consistency(batch_of(conditions(world, 512), world.sample(512, seeded(1))), roles, cfg)
    return consistency.term(roll, roles, consistency.Config()).logs["gap"].item(), roll


def test_the_exact_flow_map_is_consistent_up_to_the_error_of_an_euler_step() -> None:
    coarse, fine = flow_map_gap(32)[0], flow_map_gap(128)[0]
    assert fine < 0.01 and 8 < coarse / fine < 32  # a step's error is of second order: 16 times less


def test_consistency_at_time_zero_asks_for_the_clip_itself() -> None:
    """At the last step of the grid the target is where the Euler step ends, whatever the student says there."""
    roles, given = small_roles(STREAM), []
    student = roles.causal("student")
    student.register_forward_hook(lambda module, inputs, out: given.append((inputs[0], inputs[1])))
    batch = batch_of(small_conditions(4, batch=16), latents(4, batch=16))
    roll = consistency.roll_consistency(batch, roles, consistency.RollConfig(steps=2))
    (xt, t), (xs, s) = given
    last = s == 0
    assert last.any() and not last.all() and (s < t).all()
    assert roll.target is not None and torch.equal(roll.target[last], xs[last])
    eps = roles.noise(xt, "consistency/noise")
    torch.testing.assert_close(xs, add_noise(batch.latents, eps, s))  # the data's step stays on the clip's own line
    assert {*t.tolist()} <= {1.0, 0.5, 0.75, *consistency.grid(consistency.RollConfig(steps=2), STREAM.steps).tolist()}


def test_consistency_gives_gradient_to_the_students_earlier_prediction_alone() -> None:
    roles = small_roles(STREAM)
    batch = batch_of(small_conditions(4), latents(4))
    roll = consistency.roll_consistency(batch, roles, consistency.RollConfig(cfg=replace(PLAIN, text=2.0)))
    assert roll.target is not None and not roll.target.requires_grad and roll.real is batch.latents
    value = consistency.term(roll, roles, consistency.Config(huber=0.5)).value
    distance = (roll.x0 - roll.target).unflatten(1, (2, 2)).square().mean((2, 3, 4, 5))
    torch.testing.assert_close(value, ((distance + 0.25).sqrt() - 0.5).mean())
    value.backward()
    assert has_gradient(roles.models["student"])
    assert not has_gradient(roles.models["teacher"]) and not has_gradient(roles.models["critic"])
    with pytest.raises(ValueError, match="target"):
        consistency.term(Roll(roll.x0, roll.cond), roles, consistency.Config())


def test_the_datas_step_takes_guidance_from_the_teacher() -> None:
    roles, cond, x0 = small_roles(STREAM), small_conditions(4), latents(4)
    t = torch.full((2,), 0.6, dtype=torch.float64)
    eps = latents(4, seed=3)
    xt = add_noise(x0, eps, t)
    steps = {}
    for kind, w in ((kind, w) for kind in ("data", "teacher") for w in (1.0, 3.0)):
        cfg = consistency.RollConfig(velocity=kind, cfg=replace(PLAIN, text=w, audio=w))
        steps[kind, w] = consistency.path_velocity(x0, eps, xt, t, cond, roles, cfg)
    torch.testing.assert_close(steps["data", 1.0], eps - x0)
    torch.testing.assert_close(
        steps["data", 3.0] - steps["data", 1.0], steps["teacher", 3.0] - steps["teacher", 1.0], atol=1e-10, rtol=0
    )


# ---- what the recipes ask for -----------------------------------------------------------------------------


def test_every_rollout_over_clips_brings_the_datas_latents() -> None:
    cond, x0 = small_conditions(4), latents(4)
    batch = batch_of(cond, x0)
    models = {"backbone": small_student(STREAM, 4), "refiner": small_student(STREAM, 5)}
    roles = small_roles(STREAM, models, trajectories=SmallPaths())
    cfg = self_forcing.Config(chunks=3)
    for roll in (
        self_forcing.roll_self(batch, roles, cfg),
        self_forcing.roll_refine(batch, roles, cfg),
        rollout.teacher(batch, roles, rollout.TrajectoryRollConfig()),
        rollout.renoised(batch, roles, rollout.TrajectoryRollConfig()),
    ):
        assert roll.real is x0 and roll.cond.num_frames == 4


class SmallPaths:
    def states(self, index: Tensor) -> Tensor:
        return torch.stack([latents(4, seed=seed) for seed in (1, 2, 3)], 1)


# Terms without a distribution of their own as an aim: gradients in tests/test_recipes.py and tests/test_levers.py.
OTHERS = {"identity_drift", "latent_statistics", "recover", "reward_dmd", "data_forcing"}


# ---- every objective, trained (last, since these take seconds) --------------------------------------------


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.label)
def test_the_objective_leads_to_the_teacher_and_its_opposite_and_no_training_do_not(case) -> None:
    found = measured(case.label)
    assert found.after < case.bound < min(found.before, found.wrong)
    assert case.bound < min(found.before, found.wrong) / 2  # not by a hair


def test_the_kept_table_has_every_objective_with_the_bounds_of_the_tests() -> None:
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in PAGE.read_text().splitlines() if "|" in line]
    rows = [row for row in rows if len(row) == 9]  # the first table
    named = {re.match(r"`(\w+)`", row[0])[1] for row in rows if row[0].startswith("`")}
    modules = {path.stem for path in Path("recipes").glob("*.py") if "\ndef term(" in path.read_text()}
    assert modules <= named and {case.module for case in CASES} >= modules - OTHERS
    for case in CASES:
        (row,) = [row for row in rows if row[0] == case.label]
        before, after, wrong, bound = row[4:8]
        assert bound == f"{case.bound:g}" and float(after) < case.bound < float(before)
        assert case.bound < float(wrong.removeprefix("over "))


def test_on_policy_chunks_continue_their_own_past() -> None:
    """Covariance 0.9 between neighbors, across the border of chunks as inside them; without history there is none."""
    case = BY_LABEL[ON_POLICY]
    inside, border = lags(measured(ON_POLICY).clips)
    assert border > 0.75 and abs(inside - border) < 0.1
    blind = Causal(case.world, case.stream)
    blind.load_state_dict(trained(ON_POLICY).models["student"].state_dict())
    blind.remember = lambda x, t, cond, cache: cache
    roles = replace(trained(ON_POLICY), models={"student": blind})
    assert abs(lags(generate(case, roles))[1]) < 0.1


def test_regression_on_autoregressive_paths_keeps_the_past_that_bidirectional_paths_lose() -> None:
    inside, across = lags(measured("`ode_regression`, paths of teacher forcing").clips)
    assert min(inside, across) > 0.75
    assert max(lags(generate(STAGE1, trained(STAGE1.label)))) < 0.65
    exact = lags(measured("`causal_flow_matching`, teacher forcing").clips)
    assert min(exact) > 0.8


def test_one_trained_flow_map_makes_good_clips_in_one_two_four_and_eight_steps() -> None:
    for count in (1, 2, 4, 8):
        assert any_steps(FLOW_MAP, count) < BY_LABEL[FLOW_MAP].bound
