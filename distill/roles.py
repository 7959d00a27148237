"""Fill the roles of a stage: which networks it has, and whose weights each starts from.

teacher   the run's own teacher, or the kept one            frozen, except in stage `teacher`
student   the parent's averaged student, or the teacher's   causal
critic    the parent's critic, or the teacher's             bidirectional, with the heads that its terms train
backbone  the parent's averaged student, frozen             causal, beside a refiner
refiner   the parent's averaged student                     causal
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from distill.config import Recipe, head_function
from distill.contracts import Roles
from distill.data import dataset
from distill.errors import UserError
from distill.runs import read_status
from distill.state import checkpoint, lineage
from distill.state.lineage import Manifest
from student.causal_dit import CausalDiT
from teacher.dit import DiT, DiTConfig
from teacher.embedder import IdentityEmbedder


def find_teacher(recipe: Recipe, run_folder: Path) -> Manifest:
    """The teacher trained in this run to its end, else the one the recipe names (`kept` = the repository's)."""
    own = run_folder / "teacher"
    if read_status(own).get("status") == "done":
        path = own
    else:
        path = kept_teacher(recipe.scale) if recipe.teacher == "kept" else Path(recipe.teacher)
    manifest = lineage.read(path)
    lineage.require(manifest, stage="teacher", scale=recipe.scale)
    return manifest


def kept_teacher(scale: str) -> Path:
    """Where the repository keeps a trained teacher of a scale."""
    return Path("recipes") / scale / "teacher"


def build_roles(recipe: Recipe, teacher: Manifest | None, parent: Manifest | None, data: Path) -> Roles:
    """Networks of every role that the recipe's phases and terms speak of, on the CPU, in fp32."""
    trained = [phase.update for phase in recipe.phases]
    plain = replace(recipe.model, flow_map=False)  # teacher and critic know velocities alone
    if "teacher" in trained:
        with torch.random.fork_rng(devices=[]):  # initial weights are the one draw from torch's global state
            torch.manual_seed(recipe.seed)
            models: dict[str, nn.Module] = {"teacher": DiT(plain)}
        return Roles(models, recipe.student, dataset.load_codec(data))
    assert teacher is not None
    models = {"teacher": network(plain, teacher, "ema")}
    for role in dict.fromkeys([*trained, *(["backbone"] if "refiner" in trained else [])]):
        source, part = _origin(role, parent, teacher)
        if role == "critic":
            models[role] = network(plain, source, part, term_heads(recipe))
        else:
            models[role] = CausalDiT(network(recipe.model, source, part), recipe.student)
    embedder = IdentityEmbedder.load(data / "embedder")
    return Roles(models, recipe.student, dataset.load_codec(data), embedder)


def network(config: DiTConfig, source: Manifest, part: str, heads: nn.ModuleDict | None = None) -> DiT:
    """A DiT with the weights of one part of a checkpoint. Heads and a second time input that the checkpoint lacks stay
    as they start, heads of the checkpoint that are not asked for are left out."""
    model = DiT(config)
    if heads:
        model.add_module("heads", heads)
    tensors = {name.removeprefix("dit."): t.float() for name, t in checkpoint.load(source.path, part).items()}
    own = {name: t for name, t in model.state_dict().items() if name.startswith(("heads.", "interval_embedding."))}
    tensors = own | {name: t for name, t in tensors.items() if name in own or not name.startswith("heads.")}
    try:
        model.load_state_dict(tensors)
    except RuntimeError as error:
        first = str(error).splitlines()[1].strip()
        raise UserError(f"The weights {source.path}/{part} do not fit the recipe's model: {first}") from None
    return model


def term_heads(recipe: Recipe) -> nn.ModuleDict:
    """What terms learn for themselves on the critic's features: `head(config)` of their modules, by term."""
    makers = {term.name: head_function(term.name, term.source) for phase in recipe.phases for term in phase.terms}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        return nn.ModuleDict({name: make(recipe.model) for name, make in makers.items() if make is not None})


def _origin(role: str, parent: Manifest | None, teacher: Manifest) -> tuple[Manifest, str]:
    """(checkpoint, part) that a role starts from."""
    if parent is None or parent.stage in ("teacher", "trajectories"):
        return teacher, "ema"
    if role != "critic":
        return parent, "ema"
    return (parent, "critic") if (parent.path / "critic").is_dir() else (teacher, "ema")
