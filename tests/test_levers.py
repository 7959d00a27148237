"""Terms beside distribution matching: identity forms under a cap, their baselines, and what keeps motion."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import at_step, batch_of, conditions, gradients, has_gradient, latents, small_roles, small_student
from safetensors.torch import save_file
from test_recipes import STREAM, Compass, facing
from test_trainer import RECIPE, make
from torch import Tensor, nn

from distill.balance import capped
from distill.config import load
from distill.contracts import Roll
from distill.errors import UserError
from distill.faces import Face, embedder_of, natural_level
from recipes import consistency, data_forcing, dmd, identity_drift, latent_statistics, recover, reward_dmd
from recipes.self_forcing import Config as SelfConfig
from recipes.self_forcing import roll_self
from student.history import History
from student.stream import denoise_chunk, remember_chunk
from teacher.draws import gaussian
from teacher.flow import add_noise, sample_time, x0_from_v

Y = torch.tensor(2.0, dtype=torch.float64)


# ---- the cap ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("weight", "scale"), [(0.01, 1.0), (10.0, 0.1 * 5 / (10 * 2**0.5))])
def test_a_capped_term_has_at_most_its_share_of_the_others_gradient(weight: float, scale: float) -> None:
    x0 = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    rest, term = (x0 * torch.tensor([3.0, 4.0])).sum(), weight * (x0 * torch.tensor([1.0, 1.0])).sum()
    value, seen = capped(term, rest, x0, 0.1)
    (gradient,) = torch.autograd.grad(value, x0)
    torch.testing.assert_close(gradient, torch.full((2,), weight * scale, dtype=torch.float64))
    assert seen["scale"].item() == pytest.approx(scale) and gradient.norm() <= 0.1 * 5 + 1e-9
    assert seen["cosine"].item() == pytest.approx(7 / (5 * 2**0.5))
    assert seen["share"].item() == pytest.approx(weight * 2**0.5 / 5)


def test_a_cap_without_another_term_is_refused_and_a_silent_term_passes() -> None:
    x0 = torch.zeros(2, requires_grad=True)
    with pytest.raises(ValueError, match="another one beside it"):
        capped(x0.sum(), torch.zeros(()), x0, 0.1)
    value, seen = capped(torch.zeros(()), x0.sum(), x0, 0.1)
    assert value == 0 and seen["share"] == 0


def test_the_trainer_caps_whatever_the_order_of_the_terms(tmp_path: Path) -> None:
    losses = []
    for number, terms in enumerate(
        ("latent_statistics: {cap: 0.1, weight: 50.0}, dmd: {}", "dmd: {}, latent_statistics: {cap: 0.1, weight: 50.0}")
    ):
        text = RECIPE.replace("dmd: {cfg: {text: 2.0, audio: 3.0}}", terms)
        (tmp_path / f"{number}.yaml").write_text(text)
        recipe = load(tmp_path / f"{number}.yaml")
        assert recipe.phases[1].terms[number].cap == 0.1 and "cap" not in str(recipe.resolved["phases"][0])
        trainer = make(recipe, tmp_path / str(number))
        roles = replace(trainer.roles, key=(0, 0, 2, 0, 1))
        batch = trainer.source.sample(2, roles.generator("batch"))
        roll = trainer.roll(batch, roles, recipe.phases[1])
        loss, logs = trainer.loss(roll, roles, recipe.phases[1], 2)
        whole = torch.autograd.grad(loss, roll.x0, retain_graph=True)[0]
        alone = torch.autograd.grad(dmd.term(roll, roles, dmd.Config()).value, roll.x0, retain_graph=True)[0]
        assert (whole - alone).norm() == pytest.approx(0.1 * float(alone.norm()), rel=1e-3)
        assert {"train/latent_statistics_cosine", "train/latent_statistics_scale"} <= logs.keys()
        losses.append(float(loss.detach()))
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


# ---- identity ---------------------------------------------------------------------------------------------


def pair() -> tuple[Tensor, Roll]:
    """Two characters whose references point along (1, 0) and (0, 1); two chunks each."""
    x0 = torch.cat([facing(0.9, 0.9, 0.6, 0.6), facing(0.2, 0.2, 0.2, 0.2)]).detach().requires_grad_()
    refs = torch.cat([facing(1.0, 1.0), facing(0.0, 0.0)]).detach()
    return x0, Roll(x0, replace(conditions(4), refs=refs))


def test_contrast_pushes_only_from_those_who_are_nearly_as_like() -> None:
    x0, roll = pair()
    cfg = identity_drift.Config(anchor=0.0, drift=0.0, contrast=1.0, gap=0.2)
    term = identity_drift.term(roll, small_roles(STREAM, embedder=Compass()), cfg)
    # Row 0: own .9 and .6, other sqrt(1 - s^2) = .436 and .8. Row 1: own sqrt(1 - .04) = .98, other .2.
    assert term.value.item() == pytest.approx((0.8 - 0.6 + 0.2) / 4)
    (gradient,) = torch.autograd.grad(term.value, x0)
    assert gradient.abs().sum((2, 3, 4)).ne(0).tolist() == [[False, False, True, True], [False] * 4]


def test_contrast_knows_two_clips_of_one_character() -> None:
    x0, roll = pair()
    cfg, roles = identity_drift.Config(anchor=0.0, drift=0.0, contrast=1.0), small_roles(STREAM, embedder=Compass())
    both = identity_drift.term(roll, roles, cfg).value
    one = identity_drift.term(replace(roll, identity=torch.tensor([5, 5])), roles, cfg).value
    (gradient,) = torch.autograd.grad(one, x0)
    assert one == 0 and not gradient.any()
    named = replace(roll, identity=torch.tensor([5, 6]))
    assert identity_drift.term(named, roles, cfg).value == both > 0
    # A second clip of row 0's character adds pairs with the stranger, none with its own.
    twice = replace(
        named,
        x0=x0[[0, 1, 0]],
        cond=replace(conditions(4, batch=3), refs=roll.cond.refs[[0, 1, 0]]),
        identity=torch.tensor([5, 6, 5]),
    )
    assert identity_drift.term(twice, roles, cfg).value.item() == pytest.approx(both.item())
    # Whoever has no reference is left out, and the others keep their names.
    masked = replace(twice.cond, ref_mask=torch.tensor([[False], [True], [True]]).expand_as(twice.cond.ref_mask))
    assert identity_drift.term(replace(twice, cond=masked), roles, cfg).value.item() == pytest.approx(both.item())


def test_the_trainer_tells_terms_who_is_who(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(RECIPE)
    trainer = make(load(tmp_path / "r.yaml"), tmp_path / "run")
    batch = trainer.source.sample(2, trainer.roles.generator("batch"))
    roll = trainer.roll(batch, trainer.roles, trainer.recipe.phases[1])
    assert roll.identity is not None and torch.equal(roll.identity, batch.identity)


def test_late_chunks_weigh_more_and_the_streams_first_chunk_is_the_measure() -> None:
    x0 = facing(0.5, 0.5, 0.5, 0.5)
    cond = replace(conditions(4, batch=1, present=(1, 0)), refs=facing(1.0, -1.0).detach())
    age, first = torch.tensor([30, 30, 31, 31]), facing(0.7, 0.7).detach()
    roles = small_roles(STREAM, embedder=Compass())
    cfg = identity_drift.Config(anchor=0.0, late=2.0, horizon=31, margin=0.0)
    term = identity_drift.term(Roll(x0, cond, age=age, first=first), roles, cfg)
    weights = [1 + 2 * 30 / 31, 3.0]
    assert term.value.item() == pytest.approx(sum(weights) * 0.2 / 2)
    (gradient,) = torch.autograd.grad(term.value, x0)
    sizes = gradient.abs().sum((0, 2, 3, 4))
    assert (sizes[2] / sizes[0]).item() == pytest.approx(weights[1] / weights[0])
    assert identity_drift.term(Roll(x0, cond), roles, cfg).value == 0  # the clip's own first chunk is no better


@pytest.mark.parametrize(("time", "speaks"), [(0.45, True), (0.8, False)])
def test_identity_and_statistics_are_silent_at_high_noise(time: float, speaks: bool) -> None:
    x0 = facing(0.5, 0.5, 0.3, 0.3)
    cond = replace(conditions(4, batch=1, present=(1, 0)), refs=facing(1.0, -1.0).detach())
    roll, roles = Roll(x0, cond, time=time), small_roles(STREAM, embedder=Compass())
    for term in (
        identity_drift.term(roll, roles, identity_drift.Config(high=0.5)),
        latent_statistics.term(roll, roles, latent_statistics.Config(high=0.5)),
    ):
        (gradient,) = torch.autograd.grad(term.value, x0)
        assert bool(gradient.ne(0).any()) == speaks == bool(term.value > 0)


class Eye(nn.Module):
    """Mean color of the left and the right half."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, images: Tensor) -> Tensor:
        return self.scale * torch.cat([half.mean((2, 3)) for half in images.chunk(2, -1)], 1)


def test_any_image_network_can_be_the_embedder_by_name_and_weights(tmp_path: Path) -> None:
    save_file({"scale": torch.tensor([-1.0])}, tmp_path / "eye.safetensors")
    roles, x0 = small_roles(STREAM), latents(2).requires_grad_()
    faces = []
    for weights in ("", str(tmp_path / "eye.safetensors")):
        embed = embedder_of(Face("test_levers:Eye", weights, 0.6), roles, x0.device)
        faces.append(embed(x0))
        assert embed.natural == 0.6
    assert faces[0].shape == (2, 2, 6)
    torch.testing.assert_close(faces[0].norm(dim=-1), torch.ones_like(faces[0][..., 0]))
    torch.testing.assert_close(faces[1], -faces[0])
    faces[0].sum().backward()
    assert x0.grad is not None and x0.grad.abs().sum() > 0
    for face, message in (
        (Face("nowhere_at_all:Eye"), "install it or mend the name"),
        (Face("test_levers:Eye", str(tmp_path / "no.safetensors")), "does not exist"),
        (Face(), "make data"),
    ):
        with pytest.raises(ValueError, match=message):
            embedder_of(face, roles, x0.device)
    with pytest.raises(ValueError, match="package.module:function"):
        Face("resnet")


def test_the_natural_level_is_the_likeness_of_other_clips_of_the_same_person() -> None:
    clips = torch.cat([facing(1.0, 0.6), facing(0.8, 1.0), facing(0.0, 0.0)]).detach()
    level = natural_level(Compass(), clips, torch.tensor([7, 7, 3]))
    assert level == pytest.approx((1.0 * 1.0 + (0.6 * 0.8 + 0.8 * 0.6)) / 2)
    with pytest.raises(ValueError, match="two clips"):
        natural_level(Compass(), clips, torch.tensor([1, 2, 3]))


# ---- baselines --------------------------------------------------------------------------------------------


def test_statistics_are_held_at_the_first_chunks() -> None:
    noise = latents(2, batch=1)
    x0 = torch.cat([noise, 2 * noise + 0.5], 1).requires_grad_()
    term = latent_statistics.term(Roll(x0, conditions(4, batch=1)), small_roles(STREAM), latent_statistics.Config())
    mean, spread = latent_statistics.statistics(noise, 2)[:, 0, 0]
    expected = ((mean + 0.5).abs() + spread).mean() / 2
    assert term.value.item() == pytest.approx(float(expected), rel=1e-6)
    (gradient,) = torch.autograd.grad(term.value, x0)
    assert gradient[:, 2:].abs().sum() > 0
    first = Roll(x0, conditions(4, batch=1), first=x0[:, 2:].detach())
    moved = latent_statistics.term(first, small_roles(STREAM), latent_statistics.Config())
    (gradient,) = torch.autograd.grad(moved.value, x0)
    assert gradient[:, :2].abs().sum() > 0 and gradient[:, 2:].abs().sum() == 0


def test_a_reward_scales_the_gradient_of_its_clip_and_is_never_differentiated() -> None:
    roles, x0 = small_roles(STREAM, embedder=Compass()), pair()[0]
    roll = Roll(x0, pair()[1].cond)
    plain = torch.autograd.grad(dmd.term(roll, roles, dmd.Config()).value, x0)[0]
    cfg = reward_dmd.Config(beta=2.0)
    found = torch.autograd.grad(reward_dmd.term(roll, roles, cfg).value, x0)[0]
    own = torch.tensor([(0.9 + 0.6) / 2, (1 - 0.04) ** 0.5], dtype=torch.float64)
    torch.testing.assert_close(found, plain * (2 * own).exp()[:, None, None, None, None])
    level = torch.autograd.grad(reward_dmd.term(roll, roles, replace(cfg, baseline=0.75)).value, x0)[0]
    torch.testing.assert_close(level[0], plain[0])  # a clip of the baseline's reward is DMD's
    torch.testing.assert_close(level, found / math.exp(2 * 0.75))
    still = torch.ones(1, 4, 4, 4, 4).cumsum(-1)
    assert reward_dmd.motion(Roll(still, roll.cond), roles, cfg).item() == 0
    with pytest.raises(ValueError, match="package.module:function"):
        reward_dmd.Config(reward="beauty")


# ---- what keeps motion ------------------------------------------------------------------------------------


def test_data_forcing_asks_the_teacher_at_the_data_outside_the_mouth() -> None:
    x0, real, cond = latents(4).requires_grad_(), latents(4, seed=4), conditions(4)
    roles, cfg = small_roles(STREAM), data_forcing.Config(mouth=(0.5, 0.75, 0.25, 0.75))
    found = torch.autograd.grad(data_forcing.term(Roll(x0, cond, real=real), roles, cfg).value, x0)[0] * x0.numel()
    t = sample_time((2,), 5.0, roles.rows("data_forcing/time"), 0.8, 0.98)
    assert (t >= 0.8).all()
    eps = roles.noise(x0, "data_forcing/noise")
    xt, yt = add_noise(x0.detach(), eps, t), add_noise(real, eps, t)
    with torch.no_grad():
        fake = x0_from_v(xt, roles.dit("critic")(xt, t, cond), t)
        score = x0_from_v(yt, roles.dit("teacher")(yt, t, cond), t)
    size = (x0.detach() - score).abs().unflatten(1, (2, 2)).mean((2, 3, 4, 5))
    expected = (fake - score) / size.repeat_interleave(2, 1)[..., None, None, None]
    expected[..., 2:3, 1:3] = 0
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-10)
    with pytest.raises(ValueError, match="the data's clip"):
        data_forcing.term(Roll(x0, cond), roles, cfg)


def test_recovering_is_flow_matching_on_the_true_chunk_after_the_students_own() -> None:
    roles, x0, cond = small_roles(STREAM), latents(8), conditions(8)
    student = roles.causal("student")
    cfg = recover.Config(spoiled=History("fixed", 0.3))
    term = recover.term(Roll(x0, cond, target=x0), roles, cfg)
    term.value.backward()
    found = [None if g is None else g.clone() for g in gradients(student)]
    student.zero_grad()
    noise, cache = roles.rows("recover/noise"), student.start(cond)  # four chunks: it can only begin at the first
    cache = remember_chunk(student, x0[:, :2], cond.frames(0, 2), cache, History("fixed", 0.3), noise)
    for start in (2, 4):
        told = cond.frames(start, start + 2)
        with torch.no_grad():
            own = denoise_chunk(student, told, cache, STREAM.steps, torch.zeros_like(x0[:, :2]), noise)
        cache = remember_chunk(student, own, told, cache, STREAM.history, noise)
    t = sample_time((2,), 2.0, roles.rows("recover/time"), 0.0, 1.0)
    eps = gaussian(x0[:, :2], roles.rows("recover/noise of the aim"))
    v = student.velocity(add_noise(x0[:, 6:], eps, t), t, cond.frames(6, 8), cache)
    loss = (v - (eps - x0[:, 6:])).square().mean()
    loss.backward()
    assert term.value.item() == pytest.approx(loss.item(), abs=1e-10)
    for ours, expected in zip(found, gradients(student), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-10)
    with pytest.raises(ValueError, match="clips of 4 chunks"):
        recover.term(Roll(x0[:, :4], conditions(4), target=x0[:, :4]), roles, cfg)


def test_a_kept_consistency_term_makes_its_own_pair_on_an_on_policy_rollout() -> None:
    stream = replace(STREAM, window_chunks=2)
    roles = at_step(small_roles(stream, {"student": small_student(stream, 3)}), 3)
    batch = batch_of(conditions(4), latents(4))
    roll = roll_self(batch, roles, SelfConfig(chunks=2, grad_chunks=1))
    kept = consistency.RollConfig()
    found = consistency.term(roll, roles, consistency.Config(kept=kept)).value
    expected = consistency.term(consistency.roll_consistency(batch, roles, kept), roles, consistency.Config()).value
    assert found.item() == pytest.approx(expected.item()) and found > 0
    found.backward()
    assert has_gradient(roles.models["student"]) and not has_gradient(roles.models["critic"])
    with pytest.raises(ValueError, match="or `kept`"):
        consistency.term(roll, roles, consistency.Config())


@pytest.mark.parametrize(
    ("block", "message"),
    [
        ("recover: {chunks: 1}", "at least 2"),
        ("data_forcing: {mouth: [0.5, 0.2, 0.0, 1.0]}", "top <= bottom"),
        ("identity_drift: {high: 0.0}", "high must lie in"),
        ("identity_drift: {face: {weights: a.safetensors}}", "needs face.factory"),
        ("latent_statistics: {cap: -1.0}", "out of range"),
        ("reward_dmd: {beta: 1.0, rewards: x}", "did you mean 'reward'"),
    ],
)
def test_settings_that_cannot_be_are_refused_with_their_place(block: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(RECIPE.replace("dmd: {cfg: {text: 2.0, audio: 3.0}}", block))
    with pytest.raises(UserError, match=message):
        load(tmp_path / "r.yaml")
