"""Adapters between recipe, checkpoints and networks: who gets some, whose base they sit on, and plain weights again.

A checkpoint of a role trained with `lora:` holds its adapters alone. Their base is the nearest ancestor with plain
weights for the role: the teacher, where a line of stages has used adapters from the start, so that student, critic and
teacher share one set of weights. `plain` merges on reading: next stage, export and evaluation see a whole network.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from distill.errors import ExitCode, UserError
from distill.state import checkpoint, lineage
from distill.state.lineage import Manifest
from distill.state.shards import Part
from teacher.adapted import PREFIX, AdaptedDiT, merge
from teacher.dit import DiT, config_from
from teacher.lora import LoRAConfig


@dataclass(frozen=True)
class LoRARoles:
    """Which trained roles are adapters on a frozen base, and how large they are."""

    student: LoRAConfig | None = None
    critic: LoRAConfig | None = None
    refiner: LoRAConfig | None = None

    def of(self, role: str) -> LoRAConfig | None:
        """The adapters of a role, None where it trains whole."""
        return getattr(self, role, None)


Source = tuple[Manifest, str]  # a checkpoint and one of its parts


def tensors_of(source: Source) -> dict[str, Tensor]:
    """One part of a checkpoint as it is stored, by the names of a DiT."""
    return {name.removeprefix("dit."): t for name, t in checkpoint.load(source[0].path, source[1]).items()}


def holds_adapters(source: Source) -> bool:
    """Whether a part of a checkpoint is adapters alone; reads no tensor."""
    folder = source[0].path / source[1]
    return folder.is_dir() and any(PREFIX in name for name in Part(folder).names)


def are_adapters(tensors: dict[str, Tensor]) -> bool:
    return any(name.startswith(PREFIX) for name in tensors)


def stored_config(source: Source) -> LoRAConfig:
    """The adapters' sizes as the recipe of their checkpoint has them."""
    manifest, part = source
    role = _product(manifest) if part == "ema" else part
    told = (manifest.recipe.get("lora") or {}).get(role)
    if not told:
        raise UserError(f"The recipe of {manifest.path} names no adapters for {role}, yet it holds some.", 6)
    return LoRAConfig(**{**told, "targets": tuple(told["targets"])})


def base_of(source: Source) -> Source:
    """The nearest ancestor with plain weights for what `source` holds; UserError where the line is cut."""
    manifest, part = source
    while True:
        told = manifest.data.get("parent")
        if not told:
            raise UserError(f"The adapters in {source[0].path} have lost their base: no ancestor has whole weights.", 6)
        if not (Path(told["path"]) / checkpoint.MANIFEST).is_file():
            raise UserError(
                f"The adapters in {source[0].path} need the weights of {told['path']}, which is gone: put it back.",
                ExitCode.CHECKPOINT,
            )
        manifest = lineage.read(told["path"])
        lineage.require(manifest, hash=told["manifest_sha256"])
        if manifest.stage == "trajectories":
            continue
        if manifest.stage == "teacher":
            part = "ema"
        elif not (manifest.path / part).is_dir():
            continue  # critics begin in the middle of the line, with the teacher's weights
        if not holds_adapters((manifest, part)):
            return manifest, part


def plain(source: Source) -> dict[str, Tensor]:
    """The tensors of a part, adapters merged into their base's fp32 weights."""
    tensors = tensors_of(source)
    if not are_adapters(tensors):
        return tensors
    manifest = source[0]
    base = {name: t.float() for name, t in tensors_of(base_of(source)).items() if not name.startswith("heads.")}
    view = view_on(_hollow(manifest), stored_config(source), tensors)
    others = {name: t for name, t in tensors.items() if not name.startswith(PREFIX)}
    return merge(base, view.adapters) | others


def view_on(base: DiT, config: LoRAConfig, tensors: dict[str, Tensor]) -> AdaptedDiT:
    """A view of `base` with stored adapters; `tensors` without any leave it as it starts."""
    view = AdaptedDiT(base, config)
    stored = {name.removeprefix(PREFIX): t.float() for name, t in tensors.items() if name.startswith(PREFIX)}
    if stored:
        view.adapters.load_state_dict(stored, assign=True)
        for parameter in view.adapters.parameters():
            parameter.requires_grad_(True)
    return view


def _hollow(manifest: Manifest) -> DiT:
    """The network of a checkpoint without its weights."""
    import torch

    with torch.device("meta"):
        return DiT(config_from(manifest.recipe["model"]))


def _product(manifest: Manifest) -> str:
    updated = [phase["update"] for phase in manifest.recipe.get("phases", [])]
    return next((role for role in updated if role != "critic"), "student")


def attach(view: nn.Module, heads: nn.ModuleDict | None, tensors: dict[str, Tensor]) -> None:
    """Put the heads of terms on a view, with their stored weights where there are some."""
    if heads:
        view.add_module("heads", heads)
        known = {name.removeprefix("heads."): t for name, t in tensors.items() if name.startswith("heads.")}
        heads.load_state_dict({name: known.get(name, t) for name, t in heads.state_dict().items()})
