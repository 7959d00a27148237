"""Causal consistency distillation, discrete. The target is the student itself under stop-gradient (`target: student`,
improved consistency training, https://arxiv.org/abs/2310.14189) or its moving average (`target: average`, consistency
models, https://arxiv.org/abs/2303.01469), the one that the trainer keeps: its decay is train.ema.

The rollout `consistency` noises a clean clip to t, takes one Euler step down a grid of times, and asks the student at
both ends, every chunk under the same past of the clip, clean or at the stream's history noise:

    x_t = (1 - t) x0 + t eps        x_s = x_t + (s - t) v
    x0 = f(x_t, t)        target = f-(x_s, s)          f(x, t) = x - t v_student(x, t), so that f(x, 0) = x

and the term is their pseudo-Huber distance per chunk, mean sqrt(d^2 + c^2) - c with d the root mean square difference.

`velocity: data` takes v = eps - x0, the velocity of this very clip, plus the teacher's guidance (guided minus plain).
Its mean given what the student sees is the causal flow. `velocity: teacher` takes the teacher's guided v. That has no
variance, but a bidirectional teacher hears about the past through noisy frames alone while the student sees it clean,
so the student learns to trust its history too little (measured in docs/OBJECTIVES.md); with a single chunk, or a
teacher whose past is clean too, it is exact.

Beside an on-policy objective (`kept: {}`, small weight) it makes such pairs from the batch's clip: a forward divergence
that holds on to the motion which reverse KL on the student's own history lets go.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from einops import rearrange
from torch import Tensor

from distill.contracts import Clip, Roles, Roll, Term
from distill.data.batch import Batch
from distill.rollout import teacher_forced
from teacher.conditions import Conditions
from teacher.draws import draw_rows
from teacher.flow import add_noise, per_frame, schedule, velocity
from teacher.guidance import Guidance, guided_velocity


@dataclass(frozen=True)
class RollConfig:
    steps: int = 16  # of the grid; the student's own step times are put in between
    shift: float = 3.0
    velocity: str = "data"
    target: str = "student"
    cfg: Guidance = field(default_factory=Guidance)

    def __post_init__(self):
        if self.steps < 2 or self.shift <= 0:
            raise ValueError("steps must be at least 2, shift above 0")
        if self.velocity not in ("data", "teacher"):
            raise ValueError(f"velocity {self.velocity!r} must be data or teacher")
        if self.target not in ("student", "average"):
            raise ValueError(f"target {self.target!r} must be student or average")


@dataclass(frozen=True)
class Config:
    huber: float = 0.01  # c: below this a difference counts quadratically
    kept: RollConfig | None = None  # on a rollout without a target: a pair of its own, made so

    def __post_init__(self):
        if self.huber <= 0:
            raise ValueError("huber must be above 0")


def term(roll: Roll, roles: Roles, cfg: Config) -> Term:
    """Pseudo-Huber distance between the student's two predictions."""
    if roll.target is None and cfg.kept is not None:
        roll = roll_consistency(roll.data(), roles, cfg.kept)
    if roll.target is None:
        raise ValueError("consistency needs a rollout with a target (rollout.kind consistency), or `kept`.")
    gap = rearrange(roll.x0 - roll.target, "b (i k) c h w -> b i (k c h w)", k=roles.stream.chunk_frames)
    squared = gap.square().mean(-1)  # [B, chunks]
    return Term(((squared + cfg.huber**2).sqrt() - cfg.huber).mean(), {"gap": squared.mean().sqrt()})


def roll_consistency(batch: Batch | Clip, roles: Roles, cfg: RollConfig) -> Roll:
    """The student's x0 at one time of the grid, and as target its x0 one Euler step further down."""
    x0 = batch.latents
    assert x0 is not None
    weights = roles.average if cfg.target == "average" else None
    if cfg.target == "average" and weights is None:
        raise ValueError("rollout.target average needs the moving average that the trainer keeps, there is none.")
    times = grid(cfg, roles.stream.steps)
    rows = roles.rows("consistency/time")
    n = draw_rows(lambda count: torch.randint(1, len(times), (count,), generator=rows), len(x0), rows)
    t, s = times[n].to(x0.device), times[n - 1].to(x0.device)
    eps = roles.noise(x0, "consistency/noise")
    xt = add_noise(x0, eps, t)
    with torch.no_grad():
        xs = xt + per_frame(s - t, xt) * path_velocity(x0, eps, xt, t, batch.cond, roles, cfg)
    roll = teacher_forced(batch, roles, xt, t, x0)
    with torch.no_grad():
        target = teacher_forced(batch, roles, xs, s, x0, weights).x0
    return replace(roll, target=target)


ROLLOUTS = {"consistency": (roll_consistency, RollConfig)}


def grid(cfg: RollConfig, steps: tuple[float, ...]) -> Tensor:
    """Rising float64 times from 0 to 1, the student's step times among them."""
    return torch.cat([schedule(cfg.steps, cfg.shift), torch.tensor(steps, dtype=torch.float64)]).unique()


def path_velocity(x0: Tensor, eps: Tensor, xt: Tensor, t: Tensor, cond: Conditions, roles: Roles, cfg) -> Tensor:
    """The v along which a path goes on from xt: `cfg` has velocity (data or teacher) and the guidance cfg."""
    own, plain = velocity(x0, eps), cfg.cfg == Guidance()
    if cfg.velocity == "data" and plain:
        return own
    teacher = roles.dit("teacher")
    guided = guided_velocity(teacher, xt, t, cond, cfg.cfg)
    return guided if cfg.velocity == "teacher" else own + guided - teacher(xt, t, cond)
