"""The contract of rollouts, and the off-policy ones: samples that do not come from the student's own past.

`data`      the clean clips themselves; no network runs.
`teacher`   states of stored teacher ODE trajectories at the student's step times -> its x0, with the trajectory's end
            as target (causal ODE regression; CausVid, arXiv 2412.07772). With `source: ar-teacher` the paths are
            those of a causal teacher under its own past (Causal-Forcing, arXiv 2602.02214).
`renoised`  the trajectory's end, noised afresh -> the student's x0 (off-policy distribution matching).

The history given to a chunk is the trajectory's own end: for half of the clips at the stream's history noise, as the
backbone will see it, for the others clean, as the refiner will. On-policy rollouts live in `recipes/self_forcing.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from einops import repeat
from torch import Tensor
from torch.func import functional_call

from distill.contracts import Clip, Roles, Roll
from distill.data.batch import Batch
from teacher.draws import draw_rows
from teacher.flow import add_noise, x0_from_v


@dataclass(frozen=True)
class TrajectoryConfig:
    """Teacher ODE trajectories: how many, and how they are integrated."""

    count: int = 256
    steps: int = 16
    shift: float = 3.0
    text: float = 1.0  # guidance weights
    audio: float = 1.5
    batch_size: int = 32

    def __post_init__(self):
        if self.count < 1 or self.steps < 2 or self.batch_size < 1:
            raise ValueError("count and batch_size must be at least 1, steps at least 2")


@dataclass(frozen=True)
class DataConfig:
    """No settings."""


@dataclass(frozen=True)
class TrajectoryRollConfig:
    """Rolls over stored trajectories; every chunk draws one of the student's step times."""

    source: str = "teacher"  # whose trajectories: the stage of the network that made them

    def __post_init__(self):
        if self.source not in ("teacher", "ar-teacher"):
            raise ValueError(f"source {self.source!r} must be teacher or ar-teacher")


def data(batch: Batch, roles: Roles, cfg: DataConfig) -> Roll:
    """The clean clip."""
    assert batch.latents is not None
    return Roll(batch.latents, batch.cond, target=batch.latents)


def teacher(batch: Batch, roles: Roles, cfg: TrajectoryRollConfig) -> Roll:
    """The student's x0 at states of the teacher's own path, every chunk at a step time of its own."""
    states = roles.trajectories.states(batch.index)  # [B, S + 1, T, C, H, W], the last one clean
    choice, t = _step_per_chunk(states, roles)
    rows = torch.arange(len(states))[:, None]
    frames = torch.arange(states.shape[2])[None]
    xt = states[rows, choice, frames]  # [B, T, C, H, W]
    return teacher_forced(batch, roles, xt, t, states[:, -1])


def renoised(batch: Batch, roles: Roles, cfg: TrajectoryRollConfig) -> Roll:
    """The student's x0 at fresh noise on the teacher's samples."""
    states = roles.trajectories.states(batch.index)
    _, t = _step_per_chunk(states, roles)
    x0 = states[:, -1]
    return teacher_forced(batch, roles, add_noise(x0, roles.noise(x0, "rollout/noise"), t), t, x0)


ROLLOUTS = {
    "data": (data, DataConfig),
    "teacher": (teacher, TrajectoryRollConfig),
    "renoised": (renoised, TrajectoryRollConfig),
}


def _step_per_chunk(states: Tensor, roles: Roles) -> tuple[Tensor, Tensor]:
    """One step number per chunk, spread over its frames: (number [B, T], time [B, T] float64)."""
    size, steps = roles.stream.chunk_frames, torch.tensor(roles.stream.steps, dtype=torch.float64)
    chunks = states.shape[2] // size
    rows = roles.rows("rollout/steps")
    # A history of the step's own noise level asks for one step in the whole clip.
    drawn = 1 if roles.stream.history.kind == "matched" else chunks
    choice = draw_rows(lambda n: torch.randint(len(steps), (n, drawn), generator=rows), len(states), rows)
    choice = repeat(choice, "b i -> b (i k)", k=size * chunks // drawn)
    return choice, steps[choice].to(states.device)


def teacher_forced(
    batch: Batch | Clip, roles: Roles, xt: Tensor, t: Tensor, x0: Tensor, weights: dict[str, Tensor] | None = None
) -> Roll:
    """The student's x0 at states xt, times t [B] or [B, T], every chunk under the past that clean x0 gives it; with
    `weights` as if those were the student's."""
    student, given = roles.causal("student"), (xt, t, batch.cond, *given_history(x0, roles, t))
    v = student(*given) if weights is None else functional_call(student, weights, given)
    return Roll(x0_from_v(xt, v, t), batch.cond, target=x0, real=batch.latents)


def given_history(x0: Tensor, roles: Roles, t: Tensor) -> tuple[Tensor, Tensor]:
    """(history like x0, its level [B] or [B, T]): clean x0 for half of the clips, else as a stream remembers it;
    t [B] or [B, T]: the time at which it will be looked at, the first frame's where the frames differ."""
    rows = roles.rows("rollout/history level")
    noisy = draw_rows(lambda n: torch.rand(n, generator=rows), len(x0), rows) < 0.5
    step = t if t.ndim == 1 else t[:, 0]
    hist, t_hist = roles.stream.history.spoiled(x0, roles.rows("rollout/history"), step)
    noisy = noisy.to(x0.device)
    hist = torch.where(noisy[:, None, None, None, None], hist, x0)
    return hist, torch.where(noisy if t_hist.ndim == 1 else noisy[:, None], t_hist, 0.0)
