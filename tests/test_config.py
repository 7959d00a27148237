"""Recipes: inheritance, overrides, and errors that name the place and the remedy."""

import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from distill import cli, config, modules
from distill.errors import ExitCode, UserError
from distill.schema import differing_keys, split_overrides

BASE = """\
name: base
scale: tiny
stage: stage2
parent: stage1
train: {steps: 100, batch_size: 4}
optimizer: {lr: 1e-4, critic: {lr: 3e-4}}
rollout: {kind: long, chunks: 8}
phases:
  - {update: critic, every: 1, terms: {pull: {weight: 1.0}}}
  - {update: student, every: 5, terms: {pull: {strength: 2.0, ramp_steps: 20}}}
quick:
  train: {steps: 10}
"""


@dataclass(frozen=True)
class PullConfig:
    strength: float = 1.0
    floor: float = 0.1

    def __post_init__(self) -> None:
        if self.floor <= 0:
            raise ValueError(f"floor {self.floor} must be above 0")


@dataclass(frozen=True)
class RollConfig:
    chunks: int = 4


@dataclass(frozen=True)
class Empty:
    width: int = 8


def _module(**attributes: Any) -> ModuleType:
    module = ModuleType("fake")
    for name, value in attributes.items():
        setattr(module, name, value)
    return module


@pytest.fixture(autouse=True)
def fakes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Networks, data and losses that need no torch."""
    other = (lambda *a: None, Empty)
    monkeypatch.setitem(sys.modules, "teacher.dit", _module(DiTConfig=Empty))
    monkeypatch.setitem(sys.modules, "student.causal_dit", _module(StreamConfig=Empty))
    monkeypatch.setitem(sys.modules, "distill.data.prepare", _module(PrepareConfig=Empty))
    rollout = _module(Config=RollConfig, ROLLOUTS={"long": lambda *a: None, "data": other})
    monkeypatch.setitem(sys.modules, "distill.rollout", rollout)
    monkeypatch.setitem(sys.modules, "recipes.pull", _module(Config=PullConfig, term=lambda *a: None))
    monkeypatch.setattr(modules, "shipped", lambda: ["pull"])


def write(folder: Path, text: str, name: str = "recipe.yaml") -> Path:
    path = folder / name
    path.write_text(text)
    return path


def error_of(path: Path, *overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        config.load(path, overrides)
    assert caught.value.code == ExitCode.USAGE
    return caught.value.message


def test_a_recipe_becomes_frozen_dataclasses_with_every_default_filled_in(tmp_path: Path) -> None:
    recipe = config.load(write(tmp_path, BASE))
    student = recipe.phases[1]
    assert (student.update, student.every) == ("student", 5)
    assert student.terms[0] == config.TermSpec("pull", 1.0, 20, config=PullConfig(2.0, 0.1))
    assert recipe.rollout == config.RolloutSpec("long", RollConfig(8))
    assert recipe.optimizer["student"].lr == 1e-4 and recipe.optimizer["critic"].lr == 3e-4
    assert recipe.train.clip == 10.0 and recipe.model == Empty(8)


def test_resolved_yaml_loads_back_to_the_same_recipe(tmp_path: Path) -> None:
    recipe = config.load(write(tmp_path, BASE))
    again = config.load(write(tmp_path, config.to_yaml(recipe), "resolved.yaml"))
    assert again == recipe and config.fingerprint(again) == config.fingerprint(recipe)


def test_fingerprint_changes_with_one_value(tmp_path: Path) -> None:
    path = write(tmp_path, BASE)
    changed = config.load(path, ["phases.1.terms.pull.strength=2.5"])
    assert config.fingerprint(changed) != config.fingerprint(config.load(path))
    keys = differing_keys(config.load(path).resolved, changed.resolved)
    assert keys == ["phases.1.terms.pull.strength"]


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("batch_size: 4", "batchsize: 4", ":5: train.batchsize: unknown key, did you mean 'batch_size'?"),
        ("parent: stage1", "parnet: stage1", ":4: parnet: unknown key, did you mean 'parent'?"),
        ("strength: 2.0", "strenght: 2.0", ":10: phases.1.terms.pull.strenght: unknown key, did you mean 'strength'?"),
        ("chunks: 8", "chunk: 8", ":7: rollout.chunk: unknown key, did you mean 'chunks'?"),
        ("{lr: 1e-4,", "{lr: 1e-4, beta: 1,", ":6: optimizer.beta: unknown key, did you mean 'betas'?"),
        (
            "terms: {pull: {weight",
            "terms: {pul: {weight",
            "no loss of this name in recipes/ or beside the recipe, did you mean 'pull'?",
        ),
    ],
)
def test_unknown_key_names_file_line_and_the_nearest_valid_key(
    tmp_path: Path, old: str, new: str, expected: str
) -> None:
    path = write(tmp_path, BASE.replace(old, new, 1))
    message = error_of(path)
    assert expected in message and str(path) in message


def test_all_problems_are_reported_at_once(tmp_path: Path) -> None:
    text = BASE.replace("steps: 100", "steps: many").replace("every: 5", "every: 0").replace("scale: tiny", "scale: t")
    message = error_of(write(tmp_path, text + "sede: 3\n"))
    assert "has 4 problems" in message
    for part in (
        "train.steps: Value 'many'",
        "phases.1.every: 0 is out of range, it must be at least 1",
        "scale: 't' is not one of tiny, 1.3b, 17b",
        "sede: unknown key, did you mean 'seed'?",
    ):
        assert part in message


def test_a_config_that_refuses_itself_is_reported_with_its_place(tmp_path: Path) -> None:
    message = error_of(write(tmp_path, BASE.replace("strength: 2.0", "floor: 0")))
    assert message.endswith(":10: phases.1.terms.pull: floor 0.0 must be above 0")


def test_a_child_recipe_overrides_its_base_and_keeps_the_rest(tmp_path: Path) -> None:
    write(tmp_path, BASE, "base.yaml")
    child = write(tmp_path, "extends: base.yaml\nname: child\ntrain: {batch_size: 2}\n", "child.yaml")
    recipe = config.load(child)
    assert (recipe.name, recipe.train.batch_size, recipe.train.steps) == ("child", 2, 100)


def test_an_error_in_an_inherited_line_names_the_base_file(tmp_path: Path) -> None:
    base = write(tmp_path, BASE + "oops: 1\n", "base.yaml")
    assert f"{base}:13: oops" in error_of(write(tmp_path, "extends: base.yaml\n", "child.yaml"))


def test_a_changed_rollout_kind_drops_the_keys_of_the_old_kind(tmp_path: Path) -> None:
    write(tmp_path, BASE, "base.yaml")
    child = write(tmp_path, "extends: base.yaml\nrollout: {kind: data}\n", "child.yaml")
    assert config.load(child).rollout == config.RolloutSpec("data", Empty())


def test_a_kind_from_the_command_line_drops_the_keys_that_the_file_gives_the_old_one(tmp_path: Path) -> None:
    path = write(tmp_path, BASE)
    assert config.load(path, ["rollout.kind=data"]).rollout == config.RolloutSpec("data", Empty())
    for order in (["rollout.kind=data", "rollout.width=3"], ["rollout.width=3", "rollout.kind=data"]):
        assert config.load(path, order).rollout == config.RolloutSpec("data", Empty(3))
    assert config.load(path, ["rollout.kind=long"]).rollout == config.RolloutSpec("long", RollConfig(8))


def test_extends_in_a_circle_is_refused(tmp_path: Path) -> None:
    write(tmp_path, "extends: b.yaml\n", "a.yaml")
    assert "circle" in error_of(write(tmp_path, "extends: a.yaml\n", "b.yaml"))


def test_quick_block_applies_only_when_asked_and_overrides_win_over_it(tmp_path: Path) -> None:
    path = write(tmp_path, BASE)
    assert config.load(path).train.steps == 100
    assert config.load(path, variant="quick").train.steps == 10
    assert config.load(path, ["train.steps=7"], "quick").train.steps == 7


def test_shared_learning_rate_from_the_command_line_reaches_the_role_without_its_own(tmp_path: Path) -> None:
    recipe = config.load(write(tmp_path, BASE), ["optimizer.lr=2e-5"])
    assert recipe.optimizer["student"].lr == 2e-5 and recipe.optimizer["critic"].lr == 3e-4


def test_shared_learning_rate_that_no_role_would_use_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path, BASE.replace("{lr: 1e-4,", "{student: {lr: 1e-4},"))
    assert "SET: optimizer.lr: every role has its own lr" in error_of(path, "optimizer.lr=2e-5")


def test_unknown_override_is_refused_with_the_nearest_key(tmp_path: Path) -> None:
    assert error_of(write(tmp_path, BASE), "train.step=3") == "SET: train.step: unknown key, did you mean 'steps'?"


def test_override_without_a_value_is_refused(tmp_path: Path) -> None:
    assert "not of the form" in error_of(write(tmp_path, BASE), "train.steps")


@pytest.mark.parametrize(
    ("text", "overrides"),
    [
        ("", []),
        ("a.b=1  c=x", ["a.b=1", "c=x"]),
        ("name='a b' c=1", ["name=a b", "c=1"]),
        ("d={e: 1, f: [2, 3]} c=1", ["d={e: 1, f: [2, 3]}", "c=1"]),
        ("d=[{e: 1}, {e: 2}] c=1", ["d=[{e: 1}, {e: 2}]", "c=1"]),
        ("d='{e: 1, f: 2}' c=1", ["d={e: 1, f: 2}", "c=1"]),
        ("name=a[ c=1", ["name=a[", "c=1"]),  # a bracket in a name opens nothing
    ],
)
def test_overrides_part_at_spaces_outside_quotes_and_brackets(text: str, overrides: list[str]) -> None:
    assert split_overrides(text) == tuple(overrides)


def test_a_mapping_from_the_command_line_is_read_as_in_a_file(tmp_path: Path) -> None:
    given = split_overrides("rollout={kind: long, chunks: 6} train.steps=7")
    recipe = config.load(write(tmp_path, BASE), given)
    assert (recipe.rollout.config.chunks, recipe.train.steps) == (6, 7)


def test_a_quotation_that_does_not_end_is_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["validate", "--set", "name='a b"]) == ExitCode.USAGE
    assert capsys.readouterr().err == "A quotation in the overrides name='a b does not end.\n"


def test_a_key_written_twice_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path, BASE + "name: again\n")
    assert error_of(path) == f"{path}:13: name is written twice, first at {path}:1; keep one."


def test_a_parent_that_comes_later_is_refused(tmp_path: Path) -> None:
    assert "stage3 does not come before stage2" in error_of(write(tmp_path, BASE), "parent=stage3")


def test_missing_recipe_names_the_nearest_file(tmp_path: Path) -> None:
    write(tmp_path, BASE, "stage2_dmd.yaml")
    message = error_of(tmp_path / "stage2_dmm.yaml")
    assert "There is no recipe" in message and "stage2_dmd.yaml" in message


def test_broken_yaml_is_one_sentence_with_the_line(tmp_path: Path) -> None:
    assert ":2: not valid YAML" in error_of(write(tmp_path, "name: a\n  b: [1,\n"))


def test_missing_learning_rate_names_the_role(tmp_path: Path) -> None:
    message = error_of(write(tmp_path, BASE.replace("{lr: 1e-4, critic", "{critic")))
    assert "the role 'student' has no learning rate" in message
