"""Adapters: no effect at the start, one set of base weights, gradients where they belong, plain weights at the end."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from conftest import SMALL, batch_of, conditions, has_gradient, latents, normal, randomize, small_codec, small_dit
from torch import Tensor
from torch.utils.checkpoint import checkpoint as recompute

from distill import adapters, roles
from distill.config import Recipe, load
from distill.contracts import Roles
from distill.data.batch import Batch
from distill.engine import Engine
from distill.errors import UserError
from distill.runs import StageRun
from distill.state import checkpoint, lineage
from distill.state.lineage import Manifest, describe
from distill.trainer import Trainer
from teacher.adapted import AdaptedDiT
from teacher.dit import DiT
from teacher.lora import TARGETS, LoRAConfig

LORA = LoRAConfig(rank=2, alpha=3.0)
T = torch.tensor([0.3, 0.8]).double()


def trained(base: DiT, seed: int = 5, config: LoRAConfig = LORA) -> AdaptedDiT:
    """A view whose adapters have learned something."""
    view = AdaptedDiT(base, config)
    randomize(view, seed)
    return view


def velocity(model: DiT) -> Tensor:
    return model(latents(2), T, conditions(2))


# ---- one network ------------------------------------------------------------------------------------------


def test_adapters_start_without_any_effect_and_then_have_one() -> None:
    base = small_dit(1)
    assert torch.equal(velocity(AdaptedDiT(base, LORA)), velocity(base))
    before = velocity(base)
    assert (velocity(trained(base)) - before).abs().max() > 1e-2
    assert torch.equal(velocity(base), before), "using a view leaves no trace on the base"


def test_a_view_is_the_network_with_merged_weights() -> None:
    base, view = small_dit(1), trained(small_dit(1))
    plain = small_dit(2)
    plain.load_state_dict(view.merged())
    torch.testing.assert_close(velocity(view), velocity(plain), rtol=0, atol=1e-10)
    changed = [name for name, t in view.merged().items() if not torch.equal(t, base.state_dict()[name])]
    assert len(changed) == SMALL["depth"] * len(TARGETS)
    layer, slot = next(iter(view.adapters.slots.items()))
    adapter = view.adapters.of(layer)
    expected = layer.weight + LORA.alpha / LORA.rank * adapter.up @ adapter.down
    torch.testing.assert_close(view.merged()[slot.replace("-", ".") + ".weight"], expected)


@pytest.mark.parametrize("target", TARGETS)
def test_every_target_alone_has_an_effect_and_merges(target: str) -> None:
    base = small_dit(1)
    view, plain = trained(base, config=LoRAConfig(1, 1.0, (target,))), small_dit(2)
    plain.load_state_dict(view.merged())
    assert sum(p.numel() for p in view.parameters()) > 0
    assert (velocity(view) - velocity(base)).abs().max() > 1e-4
    torch.testing.assert_close(velocity(view), velocity(plain), rtol=0, atol=1e-10)


def test_unknown_targets_are_refused() -> None:
    with pytest.raises(ValueError, match="self_attn.w"):
        LoRAConfig(targets=("self_attn.w",))
    with pytest.raises(ValueError, match="merge them first"):
        AdaptedDiT(AdaptedDiT(small_dit(), LORA), LORA)


# ---- several views ----------------------------------------------------------------------------------------


def test_student_critic_and_teacher_lie_in_the_same_memory() -> None:
    teacher = small_dit(1)
    student, critic = trained(teacher, 2), trained(teacher, 3)
    addresses = {name: p.data_ptr() for name, p in teacher.named_parameters()}
    for view in (student, critic, copy.deepcopy(student)):
        assert {name: p.data_ptr() for name, p in view.base.named_parameters()} == addresses
        assert not {p.data_ptr() for p in view.parameters()} & set(addresses.values())
        assert all(name.startswith("adapters.") for name in view.state_dict())
    teacher.float()  # as a move to another device does: all of them see it
    assert student.base.head.head.weight.dtype == torch.float32


def test_a_copy_has_adapters_of_its_own() -> None:
    view = trained(small_dit(1))
    twin = copy.deepcopy(view)
    assert torch.equal(velocity(twin), velocity(view))
    randomize(view, 9)
    assert not torch.allclose(velocity(twin), velocity(view))


@pytest.mark.parametrize("checkpoint_blocks", [False, True])
def test_gradients_reach_the_active_adapters_alone_whoever_runs_in_between(checkpoint_blocks: bool) -> None:
    """With checkpointing the blocks run again in the backward pass, when the critic has been the last to run."""
    base = small_dit(1, checkpoint_blocks=checkpoint_blocks).requires_grad_(False)
    student, critic = trained(base, 2), trained(base, 3)
    loss = velocity(student).square().sum()
    with torch.no_grad():
        velocity(critic), velocity(base)
    loss.backward()
    assert has_gradient(student) and not has_gradient(critic) and not has_gradient(base)

    plain = small_dit(4)
    plain.load_state_dict(student.merged())
    velocity(plain).square().sum().backward()
    for layer, slot in student.adapters.slots.items():
        adapter = student.adapters.of(layer)
        down, up = adapter.down, adapter.up
        whole = plain.get_parameter(slot.replace("-", ".") + ".weight").grad
        assert whole is not None and layer.weight.grad is None
        torch.testing.assert_close(down.grad, adapter.scale * up.T @ whole, rtol=1e-8, atol=1e-9)
        torch.testing.assert_close(up.grad, adapter.scale * whole @ down.T, rtol=1e-8, atol=1e-9)


def test_a_checkpointed_call_of_a_whole_view_repeats_itself() -> None:
    base = small_dit(1).requires_grad_(False)
    view = trained(base)
    recompute(lambda x: view(x, T, conditions(2)), latents(2), use_reentrant=False).square().sum().backward()
    assert has_gradient(view)


# ---- stages -----------------------------------------------------------------------------------------------

RECIPE = """
name: r
scale: tiny
stage: stage3
parent: stage2
model: {dim: 16, depth: 2, heads: 1, ffn_dim: 16, channels: 4, text_dim: 6, mels: 4, references: [global, expression]}
student: {chunk_frames: 1, sink_chunks: 1, window_chunks: 1, steps: [1.0, 0.5]}
rollout: {kind: self, chunks: 3, grad_chunks: 2}
lora: {student: {rank: 2, alpha: 3.0}, critic: {rank: 2, alpha: 3.0}}
phases:
  - {update: critic, every: 1, terms: {flow_matching: {role: critic}}}
  - {update: student, every: 1, terms: {dmd: {}}}
optimizer: {lr: 1.0e-2}
train: {steps: 2, batch_size: 2, ema: 0.5}
"""
REFINE = (
    "stage=stage4",
    "parent=stage3",
    "rollout={kind: refine, chunks: 3, grad_chunks: 2}",
    "phases.1.update=refiner",
    "lora={refiner: {rank: 2, alpha: 3.0}, critic: {rank: 2, alpha: 3.0}}",
)


class Source:
    fingerprint = made_by = "none"

    def sample(self, batch_size: int, generator: torch.Generator) -> Batch:
        seed = int(torch.randint(2**30, (), generator=generator))
        cond = conditions(2, batch_size, seed=seed, dtype=torch.float32)
        return batch_of(cond, latents(2, batch_size, seed=seed, dtype=torch.float32))


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A function that trains a stage from parents on the disk: (overrides, teacher, parent) -> trainer, manifest."""
    monkeypatch.setattr(roles.dataset, "load_codec", lambda folder: small_codec())
    monkeypatch.setattr(roles.IdentityEmbedder, "load", lambda folder: None)
    (tmp_path / "r.yaml").write_text(RECIPE)

    def run(overrides: tuple[str, ...], teacher: Manifest, parent: Manifest) -> tuple[Trainer, Manifest]:
        recipe = load(tmp_path / "r.yaml", overrides)
        nets = roles.build_roles(recipe, teacher, parent, tmp_path)
        for role in ("student", "refiner", "critic"):  # B starts at zero, where A learns nothing in two steps
            if recipe.lora and role in nets.models and recipe.stage == "stage2":
                randomize(nets.models[role], len(role))
        folder = tmp_path / recipe.stage
        folder.mkdir()
        trainer = Trainer(recipe, StageRun(folder, done=False), nets, Source(), Engine("fp32"), parent)
        return trainer, lineage.read(trainer.fit())

    return run


def first(tmp_path: Path, recipe: Recipe) -> Manifest:
    """A teacher on the disk."""
    weights = dict(DiT(recipe.model).state_dict())
    randomized = {name: normal(*t.shape, seed=i).float() / 4 for i, (name, t) in enumerate(weights.items())}
    meta = {**describe(recipe, 0), "stage": "teacher"}
    return lineage.read(checkpoint.save(tmp_path / "teacher", 1, {"ema": randomized}, meta))


def averaged_student(trainer: Trainer) -> DiT:
    with trainer.averaged_roles() as averaged:
        return averaged.causal("student").dit


def same(a: DiT, b: DiT) -> bool:
    """Weights, not outputs: where tensors lie in memory decides how some CPUs round."""
    mine, theirs = a.state_dict(), b.state_dict()
    return mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)


def speed(model: DiT) -> Tensor:
    with torch.no_grad():
        return model(latents(2, dtype=torch.float32), T, conditions(2, dtype=torch.float32))


def test_a_line_of_stages_on_one_base_ends_in_plain_weights(tmp_path: Path, make) -> None:
    (tmp_path / "r.yaml").write_text(RECIPE)
    teacher = first(tmp_path, load(tmp_path / "r.yaml"))
    _, stage2 = make(("stage=stage2", "parent=teacher"), teacher, teacher)
    trainer, stage3 = make((), teacher, stage2)
    nets: Roles = trainer.roles
    student, critic, base = nets.causal("student").dit, nets.dit("critic"), nets.dit("teacher")
    assert isinstance(student, AdaptedDiT) and isinstance(critic, AdaptedDiT)
    assert student.base is base and critic.base is base
    stored = checkpoint.load(stage3.path, "student")
    assert all(
        "adapters." in name for part in ("student", "critic", "ema") for name in checkpoint.load(stage3.path, part)
    )
    assert sum(t.numel() for t in stored.values()) < sum(p.numel() for p in base.parameters())
    assert trainer.ema.average.keys() == dict(nets.causal("student").named_parameters()).keys()
    # both moved on from what stage 2 left
    assert not torch.equal(stored[name := next(iter(stored))], checkpoint.load(stage2.path, "student")[name])

    plain = roles.network(trainer.recipe.model, stage3, "critic")
    assert type(plain) is DiT
    torch.testing.assert_close(speed(plain), speed(critic), rtol=1e-4, atol=1e-5)
    averaged = averaged_student(trainer)
    plain = roles.network(trainer.recipe.model, stage3, "ema")
    torch.testing.assert_close(speed(plain), speed(averaged), rtol=1e-4, atol=1e-5)
    assert (speed(plain) - speed(base)).abs().max() > 1e-3

    refining, stage4 = make(REFINE, teacher, stage3)
    backbone, refiner = (refining.roles.causal(role).dit for role in ("backbone", "refiner"))
    shared = refining.roles.dit("teacher")
    assert isinstance(backbone, AdaptedDiT) and isinstance(refiner, AdaptedDiT)
    assert backbone.base is shared and refiner.base is shared
    assert same(backbone, averaged)
    assert adapters.base_of((stage4, "ema"))[0].hash == teacher.hash
    checkpoint.shutil.rmtree(stage2.path)
    with pytest.raises(UserError, match="which is gone"):
        roles.network(trainer.recipe.model, stage3, "ema")


def test_a_student_that_was_trained_whole_becomes_the_base_of_its_adapters(tmp_path: Path, make) -> None:
    (tmp_path / "r.yaml").write_text(RECIPE)
    teacher = first(tmp_path, load(tmp_path / "r.yaml"))
    whole = ("stage=stage2", "parent=teacher", "lora=null")
    _, stage2 = make(whole, teacher, teacher)
    trainer, stage3 = make((), teacher, stage2)
    student, critic = trainer.roles.causal("student").dit, trainer.roles.dit("critic")
    assert isinstance(student, AdaptedDiT) and student.base is not trainer.roles.dit("teacher")
    assert isinstance(critic, AdaptedDiT) and critic.base is not student.base
    base = roles.network(trainer.recipe.model, stage2, "ema")
    assert same(student.base, base) and not any(p.requires_grad for p in student.base.parameters())
    plain = roles.network(trainer.recipe.model, stage3, "ema")
    torch.testing.assert_close(speed(plain), speed(averaged_student(trainer)), atol=1e-5, rtol=1e-4)
    # another rank cannot go on: what was learned is merged into the base first
    trainer, _ = make(("stage=stage4", "parent=stage3", *REFINE[2:4], "lora={refiner: {rank: 1}}"), teacher, stage3)
    refiner = trainer.roles.causal("refiner").dit
    assert isinstance(refiner, AdaptedDiT) and same(refiner.base, plain)


def test_adapters_without_anyone_to_train_them_are_refused(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(RECIPE)
    with pytest.raises(UserError, match="no phase updates refiner"):
        load(tmp_path / "r.yaml", ["lora.refiner.rank=2"])
    with pytest.raises(UserError, match="did you mean 'rank'"):
        load(tmp_path / "r.yaml", ["lora.critic.ranks=2"])
    with pytest.raises(UserError, match="several roles share"):
        load(tmp_path / "r.yaml", ["train.compile=true"])
