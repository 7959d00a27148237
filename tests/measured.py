"""Peaks of real updates, byte by byte: what torch's allocator reports while the trainer makes them.

measured_peak(recipe) -> bytes alive at the worst moment of one step of all phases, weights, moments and averages
included. On CUDA the allocator's own maximum is read, on a CPU the allocator's events are added up.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from conftest import small_codec
from torch import Tensor, nn

from distill.batches import Clip, batch_like, clip_of
from distill.config import Recipe
from distill.contracts import Roles
from distill.data.batch import Batch
from distill.engine import Engine
from distill.heads import term_heads
from distill.runs import StageRun
from distill.trainer import Trainer
from student.causal_dit import CausalDiT
from teacher.adapted import AdaptedDiT
from teacher.codec import PCACodec
from teacher.dit import DiT
from teacher.embedder import IdentityEmbedder


class Noise:
    """A source of clips of the right sizes, and of trajectories for them."""

    fingerprint = made_by = "noise"

    def __init__(self, recipe: Recipe, clip: Clip):
        self.recipe, self.clip = recipe, clip

    def sample(self, batch_size: int, generator: torch.Generator) -> Batch:
        return batch_like(self.recipe.model, self.clip, batch_size)

    def states(self, index: Tensor) -> Tensor:
        latents = batch_like(self.recipe.model, self.clip, len(index)).latents
        assert latents is not None
        steps = len(self.recipe.student.steps) + 1
        return torch.randn(len(index), steps, *latents.shape[1:], device=index.device)


def noise_roles(recipe: Recipe, source: Noise) -> Roles:
    """The roles of a recipe with weights as they are drawn."""
    teacher = DiT(recipe.model)
    nn.init.normal_(teacher.head.head.weight, std=0.02)  # at zero, as it is made, adapters would learn nothing
    models: dict[str, nn.Module] = {"teacher": teacher}
    trained = list(dict.fromkeys(phase.update for phase in recipe.phases))
    for role in [*trained, *(["backbone"] if "refiner" in trained else [])]:
        lora = recipe.lora.of(role) if recipe.lora else None
        if role != "teacher":
            dit = DiT(recipe.model) if lora is None else AdaptedDiT(teacher, lora)
            models[role] = dit if role == "critic" else CausalDiT(dit, recipe.student)
    if heads := term_heads(recipe):
        models["critic"].add_module("heads", heads)
    channels = recipe.model.channels
    codec = (
        small_codec() if channels == 4 else PCACodec(torch.zeros(768), torch.eye(768, channels), torch.ones(channels))
    )
    embedder = IdentityEmbedder(channels, source.clip.rows, source.clip.columns).requires_grad_(False)
    return Roles(models, recipe.student, codec, embedder, source)


def trainer_of(recipe: Recipe, folder: Path) -> Trainer:
    """A trainer over noise, ready for updates."""
    source = Noise(recipe, clip_of(recipe.data))
    return Trainer(
        recipe, StageRun(folder, done=False), noise_roles(recipe, source), source, Engine(recipe.train.precision), None
    )


def one_step(trainer: Trainer, step: int) -> dict[str, Any]:
    """Every phase once, whatever its cadence."""
    logs: dict[str, Any] = {}
    for index, phase in enumerate(trainer.recipe.phases):
        logs |= trainer.update(step, index, phase)
    return logs


def allocated(run: Callable[[], Any]) -> int:
    """The most bytes that `run` had allocated at a time beyond what was there before it (CPU)."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    live = top = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            live += event.nbytes()
            top = max(top, live)
    return top


def measured_peak(recipe: Recipe, folder: Path, steps: int = 3) -> int:
    """Bytes at the worst moment of `steps` steps, after one that makes the optimizer's moments."""
    trainer = trainer_of(recipe, folder)
    one_step(trainer, 1)
    run = lambda: [one_step(trainer, 2 + i) for i in range(steps)]  # noqa: E731
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        run()
        return torch.cuda.max_memory_allocated()
    return standing(trainer) + allocated(run)


def standing(trainer: Trainer) -> int:
    """Bytes of weights, moments and averages."""
    seen: dict[int, int] = {}
    tensors = [p for model in trainer.roles.models.values() for p in model.parameters()]
    for optimizer in trainer.optimizers.values():
        tensors += [t for state in optimizer.state.values() for t in state.values() if isinstance(t, Tensor)]
    for tensor in [*tensors, *trainer.ema.average.values()]:
        seen[tensor.data_ptr()] = tensor.nbytes
    return sum(seen.values())
