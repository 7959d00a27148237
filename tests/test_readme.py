"""What the README promises: its commands exist, and its worked example of a loss works as printed."""

import re
from pathlib import Path

import torch

from distill import config
from distill.contracts import Roles, Roll
from teacher.conditions import Conditions

README = Path("README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.S)


def test_every_make_command_of_the_readme_is_a_target():
    targets = set(re.findall(r"^([a-z0-9-]+):", Path("Makefile").read_text(), re.M))
    wanted = {m for block in blocks("bash") for m in re.findall(r"^make ([a-z0-9-]+)", block, re.M)}
    assert len(wanted) > 10
    assert wanted <= targets


def test_the_loss_of_the_readme_is_found_beside_its_recipe_and_computes_what_it_says(tmp_path):
    code = next(block for block in blocks("python") if "def term" in block)
    text = next(block for block in blocks("yaml") if "latent_mean" in block)
    (tmp_path / "latent_mean.py").write_text(code)
    path = tmp_path / "stage3_latent_mean.yaml"
    path.write_text(text.replace("extends: ../", f"extends: {Path().resolve()}/"))
    recipe = config.load(path)
    spec = next(term for phase in recipe.phases for term in phase.terms if term.name == "latent_mean")
    assert spec.weight == 0.05 and spec.ramp_steps == 20
    x0 = torch.randn(2, 3, 4, 8, 8, requires_grad=True)
    refs = torch.zeros(2, 1, 4, 8, 8)
    empty = torch.zeros(2, 1, 1)
    cond = Conditions(empty, empty, empty, empty[..., 0] > 0, refs, torch.ones(2, 1, dtype=torch.bool))
    loss = config.term_function(spec.name, spec.source)
    term = loss(Roll(x0, cond), Roles({}, recipe.student, None), spec.config)
    assert torch.allclose(term.value, x0.mean((1, 3, 4)).square().mean())
