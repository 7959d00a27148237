"""Fill the roles of a stage: which networks it has, and whose weights each starts from.

teacher   the run's own teacher, or the kept one            frozen, except in stage `teacher`
student   the parent's averaged student, or the teacher's   causal
critic    the parent's critic, or the teacher's             bidirectional, with the heads that its terms train
backbone  the parent's averaged student, frozen             causal, beside a refiner
refiner   the parent's averaged student                     causal

A role with adapters (`lora:`) is a view on a frozen base, the teacher itself where the role descends from it unchanged.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from distill import adapters
from distill.config import Recipe
from distill.contracts import Roles
from distill.data import dataset
from distill.errors import UserError
from distill.heads import term_heads
from distill.runs import read_status
from distill.state import lineage
from distill.state.lineage import Manifest
from distill.state.shards import Part
from student.causal_dit import CausalDiT
from teacher.adapted import AdaptedDiT
from teacher.dit import DiT, DiTConfig, interval_embedding
from teacher.embedder import IdentityEmbedder
from teacher.lora import LoRAConfig


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


@dataclass(frozen=True)
class Origin:
    """What fills a network that was made empty: a part of a checkpoint, and the heads that it may lack."""

    folder: Path
    own: dict[str, Tensor]

    def part(self) -> Part:
        return Part(self.folder)


# trained? -> the context in which networks are made empty, None to make them whole (Engine.empty)
Empty = Callable[[bool], AbstractContextManager[Any] | None]


def build_roles(
    recipe: Recipe, teacher: Manifest | None, parent: Manifest | None, data: Path, empty: Empty | None = None
) -> Roles:
    """Networks of every role that the recipe's phases and terms speak of, on the CPU, in fp32; or empty, with
    `origins` that say what fills them."""
    trained = [phase.update for phase in recipe.phases]
    plain = replace(recipe.model, flow_map=False)  # teacher and critic know velocities alone
    if "teacher" in trained:
        with torch.random.fork_rng(devices=[]):  # initial weights are the one draw from torch's global state
            torch.manual_seed(recipe.seed)
            models: dict[str, nn.Module] = {"teacher": DiT(plain)}
        return Roles(models, recipe.student, dataset.load_codec(data))
    assert teacher is not None
    origins: dict[str, Origin] = {}

    def make(role: str, source: Manifest, part: str, heads: nn.ModuleDict | None = None) -> DiT:
        config = plain if role in ("teacher", "critic") else recipe.model
        context = empty(role in trained) if empty is not None else None
        fresh = _fresh(recipe) if config.flow_map else {}
        if context is None or adapters.holds_adapters((source, part)):
            return network(config, source, part, heads, fresh)
        own = {f"heads.{name}": tensor for name, tensor in (heads.state_dict() if heads else {}).items()}
        origins[role] = Origin(source.path / part, own | fresh)
        with context:
            model = DiT(config)
            if heads:
                model.add_module("heads", term_heads(recipe))
        return model

    teachers = make("teacher", teacher, "ema")
    models = {"teacher": teachers}
    bases = {(teacher.hash, "ema"): teachers}
    for role in dict.fromkeys([*trained, *(["backbone"] if "refiner" in trained else [])]):
        source = _origin(role, parent, teacher)
        heads = term_heads(recipe) if role == "critic" else None
        config, base = _adapters(recipe, role, source)
        if config is None:
            dit = make(role, *source, heads)
        else:
            key = (base[0].hash, base[1])
            if key not in bases:  # engines place it like any other frozen network
                models[f"base of {role}"] = bases[key] = make(f"base of {role}", *base)
            dit = _view(recipe, bases[key], config, source, heads, fresh=base == source)
        models[role] = dit if role == "critic" else CausalDiT(dit, recipe.student)
    embedder = IdentityEmbedder.load(data / "embedder")
    return Roles(models, recipe.student, dataset.load_codec(data), embedder, origins=origins)


def _fresh(recipe: Recipe) -> dict[str, Tensor]:
    """How a student's second time input begins, by the recipe's seed, where the weights that it starts from lack it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        made = interval_embedding(recipe.model.dim)
    return {f"interval_embedding.{name}": tensor for name, tensor in made.state_dict().items()}


def network(
    config: DiTConfig,
    source: Manifest,
    part: str,
    heads: nn.ModuleDict | None = None,
    fresh: dict[str, Tensor] | None = None,
) -> DiT:
    """A DiT with the weights of one part of a checkpoint. Heads and a second time input that the checkpoint lacks stay
    as they start, or as `fresh` has them; heads of the checkpoint that are not asked for are left out."""
    model = DiT(config)
    if heads:
        model.add_module("heads", heads)
    tensors = {name: t.float() for name, t in adapters.plain((source, part)).items()}
    own = {name: t for name, t in model.state_dict().items() if name.startswith(("heads.", "interval_embedding."))}
    own |= fresh or {}
    tensors = own | {name: t for name, t in tensors.items() if name in own or not name.startswith("heads.")}
    try:
        model.load_state_dict(tensors)
    except RuntimeError as error:
        first = str(error).splitlines()[1].strip()
        raise UserError(f"The weights {source.path}/{part} do not fit the recipe's model: {first}") from None
    return model


def _adapters(recipe: Recipe, role: str, source: adapters.Source) -> tuple[LoRAConfig | None, adapters.Source]:
    """(what adapters a role has, the weights under them); None where it is to be a whole network.

    Stored adapters go on, on the base they have, if they have the recipe's sizes; so does a frozen role (`backbone`).
    Other weights, stored adapters of another size among them, become the base.
    """
    wanted = recipe.lora.of(role) if recipe.lora else None
    frozen = role not in [phase.update for phase in recipe.phases]
    if wanted is None and not frozen:
        return None, source
    stored = adapters.stored_config(source) if adapters.holds_adapters(source) else None
    if stored is not None and (frozen or stored == wanted):
        return stored, adapters.base_of(source)
    return wanted, source


def _view(
    recipe: Recipe, base: DiT, config: LoRAConfig, source: adapters.Source, heads: nn.ModuleDict | None, fresh: bool
) -> AdaptedDiT:
    """A role on a base that may be shared, with its stored adapters unless they start afresh."""
    tensors = {} if fresh and not heads else adapters.tensors_of(source)
    base.requires_grad_(False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        view = adapters.view_on(base, config, {} if fresh else tensors)
    adapters.attach(view, heads, tensors)
    return view


def _origin(role: str, parent: Manifest | None, teacher: Manifest) -> tuple[Manifest, str]:
    """(checkpoint, part) that a role starts from."""
    if parent is None or parent.stage in ("teacher", "trajectories"):
        return teacher, "ema"
    if role != "critic":
        return parent, "ema"
    return (parent, "critic") if (parent.path / "critic").is_dir() else (teacher, "ema")
