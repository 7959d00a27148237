"""Losses beside a recipe: which file is meant, what is refused and where it says so, what a run keeps of them."""

from __future__ import annotations

from pathlib import Path

import pytest
from test_own_loss import SMALL

from distill import config
from distill.errors import ExitCode, UserError
from distill.runs import open_stage

LOSS = """
from dataclasses import dataclass
from distill.contracts import Term
@dataclass(frozen=True)
class Config:
    power: float = 2.0
def term(roll, roles, cfg):
    return Term(roll.x0.abs().pow(cfg.power).mean())
"""


def mine(folder: Path, code: str = LOSS, name: str = "mine.py") -> Path:
    (folder / name).write_text(code)
    text = SMALL.replace("terms: {dmd: {}}", f"terms: {{{Path(name).stem}: {{}}}}")
    (folder / "r.yaml").write_text(text)
    return folder / "r.yaml"


def problem(path: Path) -> str:
    with pytest.raises(UserError) as caught:
        config.load(path)
    assert caught.value.code == ExitCode.USAGE
    return caught.value.message


def test_a_loss_is_found_beside_the_recipe_and_beside_those_it_extends(tmp_path: Path) -> None:
    mine(tmp_path)
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "s.yaml").write_text("extends: ../r.yaml\nname: deep\n")
    recipe = config.load(tmp_path / "deep" / "s.yaml")
    assert recipe.phases[1].terms[0].config.power == 2.0
    assert {name: path.resolve() for name, path in config.own_files(recipe).items()} == {"mine": tmp_path / "mine.py"}
    assert "source" not in recipe.resolved["phases"][1]["terms"]["mine"]  # a path decides nothing
    (tmp_path / "deep" / "mine.py").write_text(LOSS.replace("2.0", "5.0"))
    assert config.load(tmp_path / "deep" / "s.yaml").phases[1].terms[0].config.power == 5.0  # the nearest one


def test_two_folders_may_have_a_loss_of_one_name_each_its_own(tmp_path: Path) -> None:
    recipes = []
    for power in ("2.0", "3.0"):
        (tmp_path / power).mkdir()
        recipes.append(
            config.load(mine(tmp_path / power, LOSS.replace("power: float = 2.0", f"power: float = {power}")))
        )
    assert [recipe.phases[1].terms[0].config.power for recipe in recipes] == [2.0, 3.0]


@pytest.mark.parametrize(
    ("code", "name", "expected"),
    [
        (LOSS, "dmd.py", "dmd.py has the name of a module in recipes/"),
        ("x = 1\n", "mine.py", "mine.py is no loss: it needs a dataclass Config and a function term"),
        ("import nowhere\n", "mine.py", "mine.py:1 cannot be imported: ModuleNotFoundError"),
        ("def term(:\n", "mine.py", "mine.py:1 cannot be imported: SyntaxError"),
    ],
)
def test_what_is_wrong_with_a_loss_of_ones_own_is_told_with_its_place(
    tmp_path: Path, code: str, name: str, expected: str
) -> None:
    assert expected in problem(mine(tmp_path, code, name))


def test_its_settings_are_as_strict_as_those_of_a_shipped_one(tmp_path: Path) -> None:
    path = mine(tmp_path)
    path.write_text(path.read_text().replace("{mine: {}}", "{mine: {powr: 3}}"))
    assert "r.yaml:14: phases.1.terms.mine.powr: unknown key, did you mean 'power'?" in problem(path)
    path.write_text(path.read_text().replace("mine:", "mime:"))
    assert "there is no loss of this name in recipes/ or beside the recipe, did you mean 'mine'?" in problem(path)


def test_only_files_that_are_asked_for_are_run(tmp_path: Path) -> None:
    path = mine(tmp_path)
    (tmp_path / "cleanup.py").write_text("raise SystemExit('this must not run')\n")
    assert config.load(path).phases[1].terms[0].name == "mine"


def test_a_run_keeps_the_code_of_the_loss_and_refuses_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = mine(tmp_path)
    with open_stage("a", config.load(path), path):
        pass
    kept = Path("runs/a/stage3")
    assert config.load(kept / "config.resolved.yaml").phases[1].terms[0].name == "mine"  # found beside it
    mine(tmp_path, "# only a comment\n" + LOSS)
    with open_stage("a", config.load(path), path):
        pass
    mine(tmp_path, LOSS.replace("abs()", "sin()"))
    with pytest.raises(UserError, match="exists with another .*mine.py"), open_stage("a", config.load(path), path):
        pass
