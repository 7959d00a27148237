"""Teacher ODE trajectories: for each chosen train clip, the states of the guided sampler at the student's step times.
The teacher is the bidirectional one, or an autoregressive one that makes chunk after chunk under its own past.

Written part by part, so that an interrupted run goes on with the missing parts; sealed with a manifest at the end.
states [N, S + 1, T, C, H, W] fp16, the last one clean; index [N] rows of the train split.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from distill.config import Recipe, fingerprint
from distill.data.batch import Batch, keyed_generator
from distill.data.dataset import LatentDataset
from distill.errors import ExitCode, UserError
from distill.rollout import TrajectoryConfig
from distill.state import checkpoint
from distill.state.lineage import Manifest, describe
from distill.tracking import progress
from student.causal_dit import CausalDiT
from teacher.conditions import Conditions
from teacher.dit import DiT
from teacher.flow import schedule
from teacher.guidance import Guidance, branches, guided_velocity
from teacher.sampler import euler


class Trajectories:
    """Stored trajectories as a source of batches: rows of the train split that have one."""

    def __init__(self, folder: Path, data: LatentDataset, steps: Sequence[float]):
        tensors = load_file(Path(folder) / checkpoint.TENSORS)
        self.index, self.data = tensors["index"], data
        self.fingerprint, self.made_by = data.fingerprint, data.made_by
        self._states = tensors["states"]
        stored = tensors["times"].tolist()
        if [round(t, 6) for t in stored[:-1]] != [round(t, 6) for t in steps]:
            raise UserError(
                f"{folder} holds states at times {stored[:-1]} but student.steps are {list(steps)}: run "
                "`make trajectories` in a new RUN.",
                ExitCode.DATA,
            )
        self._row = torch.full((len(data),), -1, dtype=torch.long)
        self._row[self.index] = torch.arange(len(self.index))

    def sample(self, batch_size: int, generator: torch.Generator) -> Batch:
        """Rows that have a trajectory, drawn with replacement."""
        chosen = torch.randint(len(self.index), (batch_size,), generator=generator)
        return self.data.all().select(self.index[chosen])

    def states(self, index: Tensor) -> Tensor:
        """States of these rows of the train split, float32 [B, S + 1, T, C, H, W]."""
        return self._states[self._row[index.cpu()]].to(index.device).float()


def make_trajectories(
    recipe: Recipe, teacher: DiT | CausalDiT, origin: Manifest, data: LatentDataset, folder: Path
) -> Path:
    """Sample `recipe.trajectories.count` clips of the train split; returns the sealed folder."""
    config: TrajectoryConfig = recipe.trajectories
    count = min(config.count, len(data))
    chosen = torch.randperm(len(data), generator=keyed_generator(recipe.seed, "trajectories"))[:count]
    parts = folder.with_name(f".{folder.name}-parts-{fingerprint(recipe)[:8]}-{origin.hash[:8]}")
    parts.mkdir(parents=True, exist_ok=True)
    times, kept = step_times(config, recipe.student.steps)
    starts = list(range(0, count, config.batch_size))
    for start in progress(starts, "teacher trajectories"):
        path = parts / f"part_{start:06d}.safetensors"
        if path.is_file():
            continue
        rows = chosen[start : start + config.batch_size]
        batch = data.all().select(rows)
        assert batch.latents is not None
        generator = keyed_generator(recipe.seed, "trajectories", start)
        noise = torch.randn(batch.latents.shape, generator=generator)
        given = (noise, batch.cond, times, Guidance(config.text, config.audio))
        if isinstance(teacher, CausalDiT):
            states = causal_states(teacher, *given)
        else:
            states = sample_states(teacher, *given)
        temporary = path.with_suffix(".partial")
        save_file({"states": torch.stack([states[i] for i in kept], 1).half(), "index": rows}, temporary)
        temporary.replace(path)
    loaded = [load_file(parts / f"part_{start:06d}.safetensors") for start in starts]
    tensors = {name: torch.cat([part[name] for part in loaded]) for name in ("states", "index")}
    tensors["times"] = times[kept]
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    with checkpoint.committed(folder, describe(recipe, 0, origin, data.fingerprint), size) as temporary_folder:
        save_file(tensors, temporary_folder / checkpoint.TENSORS)
    shutil.rmtree(parts)
    return folder


def step_times(config: TrajectoryConfig, steps: Sequence[float]) -> tuple[Tensor, list[int]]:
    """The sampler's times with the student's step times among them, and where those and the end stand."""
    wanted = torch.tensor([*steps, 0.0], dtype=torch.float64)
    grid = schedule(config.steps, config.shift)
    # A grid time next to a wanted one would only make a tiny step: the wanted one takes its place.
    far = (grid[:, None] - wanted).abs().min(1).values > 0.25 / config.steps
    times = torch.cat([grid[far], wanted]).sort(descending=True).values
    return times, [int((times - t).abs().argmin()) for t in wanted]


@torch.no_grad()
def sample_states(teacher: DiT, noise: Tensor, cond: Conditions, times: Tensor, guidance: Guidance) -> list[Tensor]:
    """States of the guided Euler sampler at all `times`."""
    refs = teacher.encode_refs(cond)
    return euler(lambda x, t: guided_velocity(teacher, x, t, cond, guidance, refs), noise, times)


@torch.no_grad()
def causal_states(
    teacher: CausalDiT, noise: Tensor, cond: Conditions, times: Tensor, guidance: Guidance
) -> list[Tensor]:
    """The same of an autoregressive teacher: each chunk's path starts from its own noise and is told the clean ends of
    the chunks before it, so that it is a function of the two. Every branch of the guidance remembers for itself."""
    size, clean = teacher.stream.chunk_frames, torch.zeros(len(noise), dtype=torch.float64, device=noise.device)
    parts = branches(cond, guidance)
    caches = [teacher.start(told) for _, told in parts]
    chunks: list[Tensor] = []
    for start in range(0, noise.shape[1], size):
        heard = [(weight, told.frames(start, start + size)) for weight, told in parts]

        def velocity(x: Tensor, t: Tensor, heard=heard, caches=caches) -> Tensor:
            every = zip(heard, caches, strict=True)
            return sum(weight * teacher.velocity(x, t, told, cache, t) for (weight, told), cache in every)

        states = euler(velocity, noise[:, start : start + size], times)
        chunks.append(torch.stack(states))
        caches = [
            teacher.remember(states[-1], clean, told, cache) for (_, told), cache in zip(heard, caches, strict=True)
        ]
    return list(torch.cat(chunks, 2))
