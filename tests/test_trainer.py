"""The training loop: resume to the bit, updates that must not happen, and who may change."""

from __future__ import annotations

import json
import math
import signal
from pathlib import Path

import pytest
import torch
from conftest import batch_of, conditions, latents, small_codec, small_dit, small_student
from torch import Tensor, nn

from distill.config import OptimConfig, Recipe, load
from distill.contracts import Roles
from distill.data.batch import Batch
from distill.engine import Engine
from distill.errors import ExitCode, UserError
from distill.runs import StageRun
from distill.state import checkpoint
from distill.trainer import Trainer, learning_rate

RECIPE = """
name: r
scale: tiny
stage: stage3
model: {dim: 16, depth: 2, heads: 1, ffn_dim: 16, channels: 4, text_dim: 6, mels: 4, references: [global, expression]}
student: {chunk_frames: 1, sink_chunks: 1, window_chunks: 1, steps: [1.0, 0.5]}
rollout: {kind: self, chunks: 3, grad_chunks: 2}
phases:
  - {update: critic, every: 1, terms: {flow_matching: {role: critic}}}
  - {update: student, every: 2, terms: {dmd: {cfg: {text: 2.0, audio: 3.0}}}}
optimizer: {lr: 1.0e-3, betas: [0.5, 0.9], warmup_steps: 3, schedule: cosine, student: {lr: 2.0e-3}}
train: {steps: 8, batch_size: 2, grad_accumulation: 2, ema: 0.9, save_every: 3, log_every: 1, max_nonfinite: 3}
"""
SIZES = {"dim": 16, "heads": 1, "ffn_dim": 16, "dtype": torch.float32}


class FakeSource:
    """Random batches from the step's generator. `poison` makes the audio of a batch NaN, `calls` are counted, at call
    `fail_at` the training is interrupted, or told to stop."""

    fingerprint = made_by = "none"

    def __init__(self, poison: bool = False, fail_at: int | None = None, gently: bool = False, frames: int = 2):
        self.frames = frames
        self.poison, self.fail_at, self.gently, self.calls = poison, fail_at, gently, 0

    def sample(self, batch_size: int, generator: torch.Generator) -> Batch:
        self.calls += 1
        if self.calls == self.fail_at:
            if not self.gently:
                raise KeyboardInterrupt
            signal.raise_signal(signal.SIGTERM)
        seed = int(torch.randint(2**30, (), generator=generator))
        cond = conditions(self.frames, batch_size, seed=seed, dtype=torch.float32)
        if self.poison:
            cond.speak[:] = math.nan
        return batch_of(cond, latents(self.frames, batch_size, seed=seed, dtype=torch.float32))


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    path = tmp_path / "r.yaml"
    path.write_text(RECIPE)
    return load(path)


def make(recipe: Recipe, folder: Path, source: FakeSource | None = None, seed: int = 0) -> Trainer:
    """A trainer whose student and critic start from `seed`; the teacher is always the same."""
    folder.mkdir(parents=True, exist_ok=True)
    models: dict[str, nn.Module] = {
        "teacher": small_dit(1, **SIZES),
        "critic": small_dit(seed + 2, **SIZES),
        "student": small_student(recipe.student, seed + 3, **SIZES),
    }
    run = StageRun(folder, done=False)
    roles = Roles(models, recipe.student, small_codec())
    return Trainer(recipe, run, roles, source or FakeSource(), Engine(recipe.train.precision), parent=None)


def weights(trainer: Trainer, role: str) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in trainer.roles.models[role].state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def curves(folder: Path) -> list[dict[str, float]]:
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in record.items() if name != "perf/step_s"} for record in records]


# ---- resume -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("variant", "gently", "saved"), [("fp32", False, 3), ("bf16", False, 3), ("fp32", True, 5)])
def test_resume_is_bitwise(tmp_path: Path, recipe: Recipe, variant: str, gently: bool, saved: int) -> None:
    """Interrupted in step 5, after the checkpoint of step 3, or stopped by SIGTERM, which saves step 5 first; the new
    process starts from other weights than the first."""
    recipe = load(tmp_path / "r.yaml", [f"train.precision={variant}"])
    whole = make(recipe, tmp_path / "whole").fit()
    per_two_steps = 3 * recipe.train.grad_accumulation  # the critic twice, the student once
    with pytest.raises(UserError if gently else KeyboardInterrupt):
        make(recipe, tmp_path / "parts", FakeSource(fail_at=2 * per_two_steps + 1, gently=gently)).fit()
    assert checkpoint.newest(tmp_path / "parts" / "checkpoints").name == f"step_{saved:08d}"
    resumed = make(recipe, tmp_path / "parts", seed=50)
    parts = resumed.fit()
    assert whole.name == parts.name == "step_00000008"
    names = sorted(path.name for path in whole.iterdir() if path.is_dir())
    assert names == ["critic", "ema", "optimizer_critic", "optimizer_student", "student"]
    for name in names:
        assert same(checkpoint.load(whole, name), checkpoint.load(parts, name)), name
    assert curves(tmp_path / "whole") == curves(tmp_path / "parts")
    assert (whole / "state.json").read_text() == (parts / "state.json").read_text()


def test_a_finished_stage_trains_no_further(tmp_path: Path, recipe: Recipe) -> None:
    first = make(recipe, tmp_path / "run").fit()
    source = FakeSource()
    again = make(recipe, tmp_path / "run", source, seed=50)
    assert again.fit() == first and source.calls == 0
    assert same(weights(again, "student"), checkpoint.load(first, "student"))


def test_a_finished_stage_that_is_given_more_steps_is_bitwise_the_longer_one(tmp_path: Path, recipe: Recipe) -> None:
    level = ["optimizer.schedule=constant"]  # a cosine's rates are others: runs.open_stage refuses it
    recipe, short = (load(tmp_path / "r.yaml", [*level, f"train.steps={steps}"]) for steps in (8, 4))
    whole = make(recipe, tmp_path / "whole").fit()
    make(short, tmp_path / "parts").fit()
    longer = make(recipe, tmp_path / "parts", seed=50).fit()
    assert longer.name == whole.name == "step_00000008"
    for name in ("critic", "ema", "optimizer_critic", "optimizer_student", "student"):
        assert same(checkpoint.load(whole, name), checkpoint.load(longer, name)), name


def test_another_seed_trains_another_student(tmp_path: Path, recipe: Recipe) -> None:
    other = load(tmp_path / "r.yaml", ["seed=1"])
    a, b = (make(r, tmp_path / str(r.seed)).fit() for r in (recipe, other))
    assert not same(checkpoint.load(a, "student"), checkpoint.load(b, "student"))


# ---- who changes ------------------------------------------------------------------------------------------


def test_the_teacher_never_changes_and_the_trained_roles_do(tmp_path: Path, recipe: Recipe) -> None:
    trainer = make(recipe, tmp_path / "run")
    before = {role: weights(trainer, role) for role in ("teacher", "critic", "student")}
    trainer.fit()
    assert same(weights(trainer, "teacher"), before["teacher"])
    assert not same(weights(trainer, "critic"), before["critic"])
    assert not same(weights(trainer, "student"), before["student"])
    assert not any(p.requires_grad for p in trainer.roles.models["teacher"].parameters())
    assert set(trainer.optimizers) == {"critic", "student"} and trainer.product == "student"


def test_a_phase_changes_its_own_role_only_and_leaves_no_gradient_behind(
    tmp_path: Path, recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make(recipe, tmp_path / "run")
    learning: list[set[str]] = []

    def spy(role: str, loss: Tensor, last: bool) -> None:
        models = trainer.roles.models.items()
        learning.append({role for role, model in models if any(p.requires_grad for p in model.parameters())})
        loss.backward()

    monkeypatch.setattr(trainer.engine, "backward", spy)
    for index, phase in enumerate(recipe.phases):
        before = {role: weights(trainer, role) for role in trainer.roles.models}
        trainer.update(1, index, phase)
        changed = {role for role in before if not same(weights(trainer, role), before[role])}
        assert changed == learning[-1] == {phase.update}
        assert all(p.grad is None for model in trainer.roles.models.values() for p in model.parameters())


def test_a_phase_comes_every_so_many_steps(tmp_path: Path, recipe: Recipe) -> None:
    make(recipe, tmp_path / "run").fit()
    records = curves(tmp_path / "run")
    assert [r["step"] for r in records if "train/critic_flow_matching" in r] == [1, 2, 3, 4, 5, 6, 7, 8]
    assert [r["step"] for r in records if "train/dmd" in r] == [2, 4, 6, 8]


def test_accumulated_micro_steps_are_the_mean_of_their_gradients(tmp_path: Path, recipe: Recipe) -> None:
    trainer = make(recipe, tmp_path / "run")
    critic, phase = trainer.roles.models["critic"], recipe.phases[0]
    expected: list[Tensor] = []
    for micro in range(2):
        roles = Roles(trainer.roles.models, recipe.student, small_codec(), key=(recipe.seed, 0, 1, micro, 0))
        batch = trainer.source.sample(2, roles.generator("batch"))
        loss, _ = trainer.loss(trainer.roll(batch, roles, phase), roles, phase, 1)
        found = torch.autograd.grad(loss, list(critic.parameters()))
        expected = [e + g / 2 for e, g in zip(expected, found, strict=True)] if expected else [g / 2 for g in found]
    norm = torch.stack([g.norm() for g in expected]).norm()
    logs = trainer.update(1, 0, phase)
    torch.testing.assert_close(logs["optim/grad_norm_critic"], norm)


def test_weights_and_ramps_scale_a_term(tmp_path: Path, recipe: Recipe) -> None:
    critic = "{update: critic, terms: {flow_matching: {weight: 3.0, ramp_steps: 4}}}"
    weighted = load(tmp_path / "r.yaml", [f"phases=[{critic}, {{update: student, terms: {{dmd: {{}}}}}}]"])
    trainer, phase = make(weighted, tmp_path / "run"), weighted.phases[0]
    roles = Roles(trainer.roles.models, recipe.student, small_codec(), key=(0, 0, 1, 0, 0))
    roll = trainer.roll(FakeSource().sample(2, roles.generator("batch")), roles, phase)
    for step, factor in ((1, 0.75), (2, 1.5), (4, 3.0), (9, 3.0)):
        total, logs = trainer.loss(roll, roles, phase, step)
        torch.testing.assert_close(total, factor * logs["train/critic_flow_matching"])


def test_the_average_follows_the_student_and_not_the_critic(tmp_path: Path, recipe: Recipe) -> None:
    trainer = make(recipe, tmp_path / "run")
    expected = {name: value.clone() for name, value in trainer.ema.state().items()}
    trainer.update(1, 0, recipe.phases[0])
    assert same(trainer.ema.state(), expected)
    for step in (2, 4):
        trainer.update(step, 1, recipe.phases[1])
        student = weights(trainer, "student")
        expected = {name: 0.9 * value + 0.1 * student[name] for name, value in expected.items()}
    for name, value in trainer.ema.state().items():
        torch.testing.assert_close(value, expected[name])


def test_samples_and_scores_see_the_average_and_training_does_not(tmp_path: Path, recipe: Recipe) -> None:
    trainer = make(recipe, tmp_path / "run")
    saved = trainer.fit()
    with trainer.averaged_roles() as roles:
        averaged = dict(roles.models["student"].named_parameters())
    ema, student = checkpoint.load(saved, "ema"), checkpoint.load(saved, "student")
    assert all(torch.equal(averaged[name], ema[name]) for name in ema)
    assert not same(ema, student) and same(weights(trainer, "student"), student)


# ---- updates that must not happen -------------------------------------------------------------------------


def test_a_non_finite_update_is_skipped_and_counted(tmp_path: Path, recipe: Recipe) -> None:
    trainer = make(recipe, tmp_path / "run", FakeSource(poison=True))
    before = {role: weights(trainer, role) for role in trainer.roles.models}
    averages = {name: value.clone() for name, value in trainer.ema.state().items()}
    for index, phase in enumerate(recipe.phases):
        logs = trainer.update(1, index, phase)
        assert logs["optim/skipped"] == index + 1
    assert all(same(weights(trainer, role), before[role]) for role in before)
    assert same(trainer.ema.state(), averages)
    assert not any(optimizer.state for optimizer in trainer.optimizers.values())
    trainer.source = FakeSource()
    trainer.update(2, 0, recipe.phases[0])
    assert trainer.skipped == 2 and not same(weights(trainer, "critic"), before["critic"])


def test_a_gradient_that_overflows_is_skipped_though_the_loss_is_finite(
    tmp_path: Path, recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make(recipe, tmp_path / "run")
    before = weights(trainer, "critic")
    monkeypatch.setattr(trainer.engine, "backward", lambda role, loss, last: (loss * math.inf).backward())
    trainer.update(1, 0, recipe.phases[0])
    assert trainer.skipped == 1 and same(weights(trainer, "critic"), before)


def test_too_many_non_finite_updates_in_a_row_stop_with_code_5(tmp_path: Path, recipe: Recipe) -> None:
    trainer = make(recipe, tmp_path / "run", FakeSource(poison=True))
    with pytest.raises(UserError, match="3 updates of the critic in a row") as stopped:
        trainer.fit()
    assert stopped.value.code == ExitCode.NUMERICS and trainer.skipped == 3 + 1  # the student's in step 2


def test_a_role_that_never_updates_stops_the_run_though_another_does(tmp_path: Path, recipe: Recipe) -> None:
    trainer = make(recipe, tmp_path / "run")
    with pytest.raises(UserError) as stopped:
        for step in range(1, 5):
            trainer.source = FakeSource()
            trainer.update(step, 0, recipe.phases[0])
            trainer.source = FakeSource(poison=True)
            trainer.update(step, 1, recipe.phases[1])
    assert stopped.value.code == ExitCode.NUMERICS and trainer.skipped == 3


def test_good_updates_in_between_start_the_count_again(tmp_path: Path, recipe: Recipe) -> None:
    trainer, good, bad = make(recipe, tmp_path / "run"), FakeSource(), FakeSource(poison=True)
    for step, source in enumerate([bad, bad, good, bad, bad], start=1):
        trainer.source = source
        trainer.update(step, 0, recipe.phases[0])
    assert trainer.skipped == 4


def test_weights_to_be_trained_in_bf16_are_refused(recipe: Recipe) -> None:
    model = small_dit(**{**SIZES, "dtype": torch.bfloat16})
    with pytest.raises(ValueError, match="fp32 masters"):
        Engine().optimizer(model, OptimConfig(lr=1e-6))


def test_the_learning_rate_warms_up_and_falls_to_a_hundredth() -> None:
    cosine = OptimConfig(lr=2.0, warmup_steps=4, schedule="cosine")
    rates = [learning_rate(cosine, step, 20) for step in range(1, 21)]
    assert rates[:4] == [0.5, 1.0, 1.5, 2.0] and rates[-1] == pytest.approx(0.02)
    assert rates[11] == pytest.approx(2 * (0.01 + 0.99 / 2)) and rates[4:] == sorted(rates[4:], reverse=True)
    assert {learning_rate(OptimConfig(lr=2.0), step, 20) for step in range(1, 21)} == {2.0}
