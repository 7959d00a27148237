"""The adversarial term: what its head learns, who gets gradient, and how the head travels with the critic."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from analytic import Bidirectional, blobs, codec, conditions, video
from conftest import at_step, batch_of, has_gradient, latents, small_dit, small_roles, small_student
from conftest import conditions as small_conditions
from test_trainer import SIZES, FakeSource, same
from torch import nn

from distill import config
from distill.contracts import Roles, Roll
from distill.engine import Engine
from distill.heads import term_heads
from distill.roles import network
from distill.runs import StageRun
from distill.state import checkpoint
from distill.state.lineage import Manifest
from distill.trainer import Trainer
from recipes import adversarial, self_forcing
from student.causal_dit import StreamConfig
from teacher.flow import add_noise

STREAM = StreamConfig(chunk_frames=2, sink_chunks=0, window_chunks=1, steps=(1.0, 0.5))
RECIPE = """
name: r
scale: tiny
stage: stage2
model: {dim: 16, depth: 2, heads: 1, ffn_dim: 16, channels: 4, text_dim: 6, mels: 4, references: [global, expression]}
student: {chunk_frames: 1, sink_chunks: 1, window_chunks: 1, steps: [1.0, 0.5]}
rollout: {kind: self, chunks: 2, grad_chunks: 2}
phases:
  - {update: critic, terms: {flow_matching: {role: critic}, adversarial: {role: critic}}}
  - {update: student, every: 2, terms: {adversarial: {role: student}}}
optimizer: {lr: 1.0e-2}
train: {steps: 6, batch_size: 2, ema: 0.9, save_every: 3, log_every: 1}
"""


def adversarial_roles(**models: nn.Module) -> Roles:
    roles = small_roles(STREAM, models)
    critic = roles.dit("critic")
    critic.add_module("heads", nn.ModuleDict({"adversarial": adversarial.head(critic.config).double()}))
    return roles


def test_a_new_head_has_no_opinion() -> None:
    roles = adversarial_roles()
    x0 = latents(4).requires_grad_()
    roll = Roll(x0, small_conditions(4), real=latents(4, seed=2))
    for role, value in (("critic", 2 * math.log(2)), ("student", math.log(2))):
        assert adversarial.term(roll, roles, adversarial.Config(role=role)).value.item() == pytest.approx(value)
    adversarial.term(roll, roles, adversarial.Config(role="student")).value.backward()
    assert x0.grad is not None and torch.count_nonzero(x0.grad) == 0


def test_a_head_starts_like_any_other_and_moves_faster_than_the_critic_under_one_rate() -> None:
    torch.manual_seed(0)
    head, tokens = adversarial.Head(32), torch.randn(2, 5, 64)
    acting = {name: adversarial.PACE * weight.detach() for name, weight in head.named_parameters()}
    usual = (64 * 3) ** -0.5  # of what is uniform within +-1/sqrt(fan in)
    assert acting["hidden.weight"].std().item() == pytest.approx(usual, rel=0.1)
    optimizer = torch.optim.Adam(head.parameters(), 1e-3)
    head(tokens).mean().backward()
    optimizer.step()
    hidden = nn.functional.silu(tokens @ acting["hidden.weight"].T + acting["hidden.bias"])
    slope = hidden.mean((0, 1)).sign()  # Adam's first step is the rate, against the sign
    expected = -adversarial.PACE * 1e-3 * (hidden @ slope + 1)
    torch.testing.assert_close(head(tokens), expected, rtol=1e-4, atol=1e-6)


def test_the_critics_side_gives_no_gradient_to_the_student_and_the_students_side_does() -> None:
    roles = adversarial_roles()
    nn.init.normal_(roles.dit("critic").get_submodule("heads.adversarial.out").weight)
    batch = batch_of(small_conditions(4), latents(4))
    roll = self_forcing.roll_self(batch, roles, self_forcing.Config(chunks=2))
    adversarial.term(roll, roles, adversarial.Config(role="critic")).value.backward()
    assert not has_gradient(roles.models["student"])
    head, backbone = roles.dit("critic").get_submodule("heads"), roles.dit("critic").blocks
    assert has_gradient(head) and has_gradient(backbone)
    adversarial.term(roll, roles, adversarial.Config(role="student")).value.backward()
    assert has_gradient(roles.models["student"]) and not has_gradient(roles.models["teacher"])
    with pytest.raises(ValueError, match="real latents"):
        adversarial.term(replace(roll, real=None), roles, adversarial.Config(role="critic"))


def test_a_trained_head_knows_the_logarithm_of_the_density_ratio() -> None:
    """The best judge of samples noised to t says log p_t(x) / q_t(x)."""
    real, fake = blobs(), replace(blobs(), means=blobs().means.flip(1))
    torch.manual_seed(0)
    critic = Bidirectional(real)
    critic.add_module("heads", nn.ModuleDict({"adversarial": adversarial.head(critic.config)}))
    roles = Roles({"critic": critic}, STREAM, codec(real))
    optimizer = torch.optim.AdamW(critic.parameters(), 5e-3, weight_decay=0.0, fused=True)
    cfg = adversarial.Config(role="critic", shift=1.0)
    for step in range(400):
        roles = at_step(roles, step)
        optimizer.param_groups[0]["lr"] = 1e-2 * (1 - step / 400)
        x0, data = (w.sample(256, roles.generator(name)).float() for name, w in (("fake", fake), ("real", real)))
        optimizer.zero_grad()
        adversarial.term(Roll(x0, conditions(real, 256), real=data), roles, cfg).value.backward()
        optimizer.step()
    draw = torch.Generator().manual_seed(1)
    x, cond = real.sample(1000, draw).float(), conditions(real, 1000)
    for time in (0.3, 0.6):
        t = torch.full((1000,), time, dtype=torch.float64)
        xt = add_noise(x, torch.randn(x.shape, generator=draw), t)
        with torch.no_grad():
            said = adversarial.judge(critic, xt, t, Roll(x, cond))[:, 0].double()
        exact = real.log_density(xt.flatten(1).double(), time) - fake.log_density(xt.flatten(1).double(), time)
        assert torch.corrcoef(torch.stack([said, exact]))[0, 1] > 0.95 and 0.6 < said.std() / exact.std() < 1.5
    x0 = fake.sample(1000, draw).float().requires_grad_()
    adversarial.term(Roll(x0, cond), roles, replace(cfg, role="student")).value.backward()
    assert x0.grad is not None
    before, after = (
        real.log_density(x, 0.3) - fake.log_density(x, 0.3)
        for x in (x0.detach().flatten(1).double(), (x0 - 100 * x0.grad).detach().flatten(1).double())
    )
    assert (after > before).double().mean() > 0.7  # the student's side climbs it


def adversarial_trainer(folder: Path, source: FakeSource, seed: int = 0) -> Trainer:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "r.yaml").write_text(RECIPE)
    recipe = config.load(folder / "r.yaml")
    critic = small_dit(seed + 2, **SIZES)
    critic.add_module("heads", term_heads(recipe))
    models = {"teacher": small_dit(1, **SIZES), "critic": critic, "student": small_student(recipe.student, 3, **SIZES)}
    roles = Roles(models, recipe.student, codec(video()))
    return Trainer(recipe, StageRun(folder, done=False), roles, source, Engine("fp32"), parent=None)


def test_each_update_of_the_adversarial_game_moves_one_side_alone(tmp_path: Path) -> None:
    trainer = adversarial_trainer(tmp_path, FakeSource())
    nn.init.normal_(trainer.roles.dit("critic").get_submodule("heads.adversarial.out").weight)

    def moved(index: int) -> dict[str, bool]:
        before = {r: {n: p.clone() for n, p in trainer.roles.models[r].state_dict().items()} for r in trainer.trained}
        trainer.update(2, index, trainer.recipe.phases[index])
        assert not any(has_gradient(model) for model in trainer.roles.models.values())
        return {role: not same(before[role], trainer.roles.models[role].state_dict()) for role in trainer.trained}

    assert moved(0) == {"critic": True, "student": False}
    assert moved(1) == {"critic": False, "student": True}


def test_the_head_is_saved_and_resumed_with_the_critic(tmp_path: Path) -> None:
    whole = adversarial_trainer(tmp_path / "whole", FakeSource()).fit()
    with pytest.raises(KeyboardInterrupt):
        adversarial_trainer(tmp_path / "parts", FakeSource(fail_at=6)).fit()  # in step 4; step 3 is saved
    parts = adversarial_trainer(tmp_path / "parts", FakeSource(), seed=50).fit()
    critics = [checkpoint.load(folder, "critic") for folder in (whole, parts)]
    assert same(*critics) and critics[0]["heads.adversarial.out.weight"].abs().sum() > 0
    assert same(*(checkpoint.load(folder, "optimizer_critic") for folder in (whole, parts)))


def test_a_critic_without_a_head_is_given_one_and_a_head_not_asked_for_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(RECIPE)
    recipe = config.load(tmp_path / "r.yaml")
    plain, headed = small_dit(1, **SIZES), small_dit(2, **SIZES)
    headed.add_module("heads", term_heads(recipe))
    nn.init.ones_(headed.get_submodule("heads.adversarial.out").weight)
    for name, model in (("plain", plain), ("headed", headed)):
        checkpoint.write_tensors(tmp_path / name, dict(model.state_dict()))
    source = Manifest(tmp_path, "", {})
    fresh = network(recipe.model, source, "plain", term_heads(recipe)).state_dict()
    assert fresh["heads.adversarial.out.weight"].eq(0).all() and fresh["heads.adversarial.hidden.weight"].ne(0).any()
    assert same({n: t for n, t in fresh.items() if not n.startswith("heads.")}, dict(plain.state_dict()))
    assert same(
        dict(network(recipe.model, source, "headed", term_heads(recipe)).state_dict()), dict(headed.state_dict())
    )
    assert not any(name.startswith("heads.") for name in network(recipe.model, source, "headed").state_dict())
