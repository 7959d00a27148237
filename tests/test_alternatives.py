"""Every distribution-matching term on every rollout, every shipped recipe for four steps, every paper named."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from shrunk import SMALL, TRAINED, trainer_of

from distill import config
from distill.config import Recipe
from distill.state import checkpoint

ROOT = Path(__file__).resolve().parents[1]


def train(recipe: Recipe, folder: Path) -> set[str]:
    """Train small networks by the recipe; the roles that moved."""
    trainer = trainer_of(recipe, folder)
    models = trainer.roles.models
    before = {name: [p.clone() for p in model.parameters()] for name, model in models.items()}
    assert checkpoint.verify(trainer.fit()) is None and trainer.skipped == 0
    same = {name: all(map(torch.equal, old, models[name].parameters())) for name, old in before.items()}
    return {name for name, unmoved in same.items() if not unmoved}


RECIPE = """
name: r
scale: tiny
stage: {stage}
student: {{steps: [1.0, 0.5]}}
rollout: {{kind: {kind}}}
phases:
  - {{update: critic, terms: {{flow_matching: {{role: critic}}{head}}}}}
  - {{update: {role}, terms: {{{term}}}}}
optimizer: {{lr: 1.0e-3}}
train: {{steps: 2, log_every: 1}}
"""
TERMS = {
    "dmd": "dmd: {cfg: {text: 2.0, audio: 2.0}}",
    "dmd+gan": "dmd: {}, adversarial: {role: %s}",
    "dmd, forward KL": "dmd: {divergence: forward-kl}",
    "decoupled dmd": "decoupled_dmd: {guidance: {low: 0.5}}",
    "sid": "sid: {alpha: 1.2}",
    "gan": "adversarial: {role: %s}",
    "dmd+identity": "dmd: {}, identity_drift: {weight: 0.1}",
    "dmd+perceptual": "dmd: {}, perceptual: {weight: 0.5}",
}
OFF_POLICY, ON_POLICY = ("teacher", "renoised", "consistency"), ("self", "long", "refine")
# On its own rollout the student has no target to be held against.
PAIRS = [(t, kind) for t in TERMS for kind in OFF_POLICY + ON_POLICY if t != "dmd+perceptual" or kind in OFF_POLICY]


@pytest.mark.parametrize(("name", "kind"), PAIRS, ids=lambda part: part)
def test_every_distribution_matching_term_trains_on_every_rollout_of_the_students_samples(
    tmp_path: Path, name: str, kind: str
) -> None:
    role = "refiner" if kind == "refine" else "student"
    term = TERMS[name].replace("%s", role)
    head = ", adversarial: {role: critic}" if "adversarial" in term or "divergence" in term else ""
    stage = "stage4" if kind == "refine" else "stage2"
    (tmp_path / "r.yaml").write_text(RECIPE.format(stage=stage, kind=kind, head=head, role=role, term=term))
    # A head that knows nothing yet gives nothing to a student in the first step; in the second it does.
    assert train(config.load(tmp_path / "r.yaml", SMALL), tmp_path) == {"critic", role}


@pytest.mark.parametrize("path", TRAINED, ids=lambda path: path.stem)
def test_every_shipped_recipe_of_a_student_trains_the_roles_of_its_phases(path: Path, tmp_path: Path) -> None:
    recipe = config.load(path, [*SMALL, "train.steps=4"], "smoke")
    assert train(recipe, tmp_path) == {phase.update for phase in recipe.phases}


# ---- papers -----------------------------------------------------------------------------------------------

OWN = {"identity_drift"}  # ours, without a paper


def test_every_objective_opens_with_a_link_to_its_paper() -> None:
    for path in sorted((ROOT / "recipes").glob("*.py")):
        text = path.read_text(encoding="utf-8")
        if "\ndef term(" in text or "\nROLLOUTS" in text:
            opening = text.split('"""')[1]
            linked = re.search(r"https://arxiv\.org/abs/\d{4}\.\d{5}", opening)
            assert bool(linked) != (path.stem in OWN), f"{path} needs the link to its paper in its opening docstring"
