"""Every distribution-matching term on every rollout, every shipped recipe for four steps, every paper named."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import latents, small_codec, small_dit, small_student
from test_trainer import SIZES, FakeSource
from torch import nn

from distill import config
from distill.config import Recipe
from distill.contracts import Roles
from distill.engine import Engine
from distill.roles import term_heads
from distill.runs import StageRun
from distill.state import checkpoint
from distill.trainer import Trainer
from teacher.embedder import IdentityEmbedder

ROOT = Path(__file__).resolve().parents[1]
MODEL = {"dim": 16, "depth": 2, "heads": 1, "ffn_dim": 16, "channels": 4, "text_dim": 6, "mels": 4}
SMALL = [
    *(f"model.{name}={value}" for name, value in MODEL.items()),
    "model.references=[global, expression]",
    *(f"student.{name}=1" for name in ("chunk_frames", "sink_chunks", "window_chunks")),
    "train.batch_size=2",
    "train.precision=fp32",
]


def train(recipe: Recipe, folder: Path) -> set[str]:
    """Train small networks by the recipe; the roles that moved."""
    stream, trained = recipe.student, {phase.update for phase in recipe.phases}
    models: dict[str, nn.Module] = {"teacher": small_dit(1, **SIZES)}
    if "critic" in trained:
        models["critic"] = small_dit(2, **SIZES)
        models["critic"].add_module("heads", term_heads(recipe))
    for role in {"student", "refiner"} & trained | ({"backbone"} if "refiner" in trained else set()):
        models[role] = small_student(stream, 3, **SIZES, flow_map=recipe.model.flow_map)
    # Recovering takes a true chunk, two of the student's own, and the next true one.
    frames = 4 if "recover" in [term.name for phase in recipe.phases for term in phase.terms] else 2
    states = [latents(frames, seed=seed).float() for seed in range(len(stream.steps) + 1)]
    paths = SimpleNamespace(states=lambda index: torch.stack(states, 1))
    embedder = IdentityEmbedder(4, 4, 4).requires_grad_(False)
    roles = Roles(models, stream, small_codec().float(), embedder, trajectories=paths)
    before = {name: [p.clone() for p in model.parameters()] for name, model in models.items()}
    trainer = Trainer(recipe, StageRun(folder, done=False), roles, FakeSource(frames=frames), Engine(), parent=None)
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


SHIPPED = [path for path in sorted((ROOT / "recipes" / "tiny").rglob("*.yaml")) if "base" not in path.stem]
TRAINED = [path for path in SHIPPED if "teacher" != path.stem and not path.stem.startswith("trajectories")]


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
