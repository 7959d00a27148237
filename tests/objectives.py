"""Every training objective against a teacher that is known exactly: the cases, and the loop that trains them.

The terms and rollouts are those of recipes/ and distill/; the loop is the trainer's without files: phases with keyed
randomness, one role with gradient at a time, AdamW, an average of the product. tests/test_objectives.py holds each case
to its bound, tests/objectives_table.py writes docs/OBJECTIVES.md from them.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from analytic import Bidirectional, Causal, Exact, Paths, World, blobs, codec, conditions, energy_distance, video
from conftest import batch_of
from torch import Tensor, nn

from distill import rollout
from distill.contracts import Roles
from distill.rollout import DataConfig, TrajectoryRollConfig
from distill.state.ema import EMA
from recipes import adversarial, consistency, dmd, flow_matching, ode_regression, perceptual, self_forcing
from student.causal_dit import StreamConfig
from student.stream import stream
from teacher.flow import schedule
from teacher.guidance import Guidance
from teacher.sampler import euler

BATCH, COUNT = 256, 2048  # clips per step; clips that are compared
PLAIN = Guidance(1.0, 1.0)

Objective = tuple[Callable[..., Any], Any]  # term and its config


@dataclass(frozen=True)
class Phase:
    update: str
    objective: Objective
    every: int = 1


@dataclass(frozen=True)
class Case:
    """One row. `start` names the case whose student this one begins with; without, it begins with random weights."""

    label: str
    module: str  # of recipes/
    minimizes: str
    paper: str
    world: World
    roll: tuple[Callable[..., Any], Any]
    phases: tuple[Phase, ...]
    bound: float  # of the energy distance
    steps: int
    lr: float = 5e-3
    product: str = "student"
    times: tuple[float, ...] = (1.0, 0.5)  # of the student's steps
    start: str = ""

    @property
    def stream(self) -> StreamConfig:
        return StreamConfig(min(self.world.frames, 2), sink_chunks=0, window_chunks=1, steps=self.times)


@dataclass(frozen=True)
class Measured:
    """Energy distance to exact samples before, after, and after training with the sign turned round."""

    before: float
    after: float
    wrong: float
    seconds: float  # of CPU time that the training took
    clips: Tensor  # of the trained generator, [COUNT, T, C, 1, 1]


# ---- the cases --------------------------------------------------------------------------------------------

CONSISTENCY = (consistency.term, consistency.Config())
CRITIC = Phase("critic", (flow_matching.term, flow_matching.Config(role="critic", shift=1.0)))
DMD = (dmd.term, dmd.Config(cfg=PLAIN, shift=1.0))
ON_PATHS, RENOISED = (rollout.teacher, TrajectoryRollConfig()), (rollout.renoised, TrajectoryRollConfig())


def on_grid(velocity: str) -> tuple[Callable[..., Any], Any]:
    return consistency.roll_consistency, consistency.RollConfig(steps=16, shift=1.0, velocity=velocity)


def judged_by(role: str) -> Objective:
    return adversarial.term, adversarial.Config(role=role, shift=0.3)


def learn(objective: Objective) -> tuple[Phase, ...]:
    return (Phase("student", objective),)


CASES = [
    Case(
        "`flow_matching`, rollout `data`",
        "flow_matching",
        "E (v - (eps - x0))²: the velocity of the data",
        "2210.02747",
        blobs(),
        (rollout.data, DataConfig()),
        (Phase("teacher", (flow_matching.term, flow_matching.Config(role="teacher", shift=1.0))),),
        bound=0.02,
        steps=500,
        product="teacher",
    ),
    Case(
        "`ode_regression`, rollout `teacher`",
        "ode_regression",
        "E (x0 - end of the teacher's path)²",
        "2412.07772",
        blobs(),
        ON_PATHS,
        learn((ode_regression.term, ode_regression.Config())),
        bound=0.01,
        steps=400,
    ),
    Case(
        "`perceptual`, rollout `teacher`",
        "perceptual",
        "E of the pyramid distance of decoded frames to those of the path's end",
        "2412.07772",
        blobs(),
        ON_PATHS,
        learn((perceptual.term, perceptual.Config(frames=1))),
        bound=0.01,
        steps=400,
    ),
    Case(
        "`consistency`, teacher's step",
        "consistency",
        "E of the pseudo-Huber distance of the student at t and, one Euler step on, at s",
        "2303.01469",
        blobs(),
        on_grid("teacher"),
        learn(CONSISTENCY),
        bound=0.02,
        steps=800,
    ),
    Case(
        "`consistency`, data's step, two chunks",
        "consistency",
        "the same along the velocity of the clip itself",
        "2310.14189",
        video(),
        on_grid("data"),
        learn(CONSISTENCY),
        bound=0.025,
        steps=800,
        lr=1e-2,
    ),
    Case(
        "`dmd` off-policy, rollout `renoised`",
        "dmd",
        "KL of the student from the teacher over noise levels, by the score difference",
        "2405.14867",
        blobs(),
        RENOISED,
        (CRITIC, Phase("student", DMD, every=2)),
        bound=0.025,
        steps=500,
        lr=1e-2,
        times=(1.0,),
    ),
    Case(
        "`adversarial`, rollout `renoised`",
        "adversarial",
        "non-saturating GAN loss over noise levels, on the critic's features",
        "2405.14867",
        blobs(),
        RENOISED,
        (Phase("critic", judged_by("critic")), Phase("student", judged_by("student"), every=2)),
        bound=0.04,
        steps=800,
        lr=1e-2,
        times=(1.0,),
    ),
    Case(
        "`dmd` on-policy, rollout `self`, two chunks",
        "self_forcing",
        "the same KL of the student's own stream",
        "2506.08009",
        video(),
        (self_forcing.roll_self, self_forcing.Config(chunks=2)),
        (CRITIC, Phase("student", DMD, every=2)),
        bound=0.01,
        steps=800,
        lr=1e-2,
        times=(1.0,),
    ),
    Case(
        "`dmd` of the refiner, rollout `refine`, two chunks",
        "self_forcing",
        "the same KL of the refined stream of a frozen backbone",
        "2506.08009",
        video(),
        (self_forcing.roll_refine, self_forcing.Config(chunks=2)),
        (CRITIC, Phase("refiner", DMD, every=2)),
        bound=0.01,
        steps=600,
        lr=1e-2,
        product="refiner",
        start="`ode_regression` of the teacher's paths",
    ),
]
# Three that fall short, and the page says by how much: two learn of the past from a teacher that does not see it clean,
# one has a critic that cannot tell its two steps apart. The first is also the refiner's backbone.
STAGE1 = replace(CASES[1], label="`ode_regression` of the teacher's paths", world=video())
BLIND = replace(CASES[3], label="`consistency`, teacher's step, two chunks", world=video(), lr=1e-2)
MIXED = replace(CASES[5], label="two steps at once", times=(1.0, 0.5))
BY_LABEL = {case.label: case for case in [*CASES, STAGE1, BLIND, MIXED]}


# ---- training ---------------------------------------------------------------------------------------------


def roles_of(case: Case) -> Roles:
    """The networks as the case begins."""
    world = case.world
    torch.manual_seed(0)
    critic = Bidirectional(world)
    critic.add_module("heads", nn.ModuleDict({"adversarial": adversarial.head(critic.config)}))
    models: dict[str, nn.Module] = {"teacher": Exact(world), "critic": critic}
    models[case.product] = Bidirectional(world) if case.product == "teacher" else Causal(world, case.stream)
    if case.start:
        models["backbone"] = trained(case.start).models["student"].requires_grad_(False)
    return Roles(models, case.stream, codec(world), trajectories=Paths(world, case.times))


def train(case: Case, roles: Roles, sign: float = 1.0, steps: int | None = None) -> None:
    """Train the product and, where there is a critic, that too; `sign` is put on the product's loss alone."""
    total, cond = steps or case.steps, conditions(case.world, BATCH)
    trained_roles = {phase.update for phase in case.phases}
    optimizers = {
        role: torch.optim.AdamW(
            roles.models[role].parameters(), case.lr, betas=(0.5, 0.99), weight_decay=0.0, fused=True
        )
        for role in trained_roles
    }
    average = EMA(roles.models[case.product], 0.98)
    for step in range(total):
        for index, phase in enumerate(case.phases):
            if step % phase.every:
                continue
            for role in trained_roles:
                roles.models[role].requires_grad_(role == phase.update)
            roles.key = (0, 0, step, 0, index)
            draw = roles.generator("batch")
            batch = batch_of(cond, case.world.sample(BATCH, draw).float())
            batch = replace(batch, index=torch.randint(len(roles.trajectories), (BATCH,), generator=draw))
            with torch.set_grad_enabled(phase.update != "critic"):
                roll = case.roll[0](batch, roles, case.roll[1])
            term, config = phase.objective
            loss = term(roll, roles, config).value * (sign if phase.update == case.product else 1.0)
            loss.backward()
            nn.utils.clip_grad_norm_(roles.models[phase.update].parameters(), 10.0)
            optimizer = optimizers[phase.update]
            for group in optimizer.param_groups:
                group["lr"] = case.lr * (0.02 + 0.98 * (1 + math.cos(math.pi * step / total)) / 2)
            optimizer.step()
            optimizer.zero_grad()
            if phase.update == case.product:
                average.update(roles.models[case.product], step + 1)
    average.copy_to(roles.models[case.product])


@cache
def trained(label: str) -> Roles:
    """The networks of a case after its training."""
    roles = roles_of(BY_LABEL[label])
    train(BY_LABEL[label], roles)
    return roles


@torch.no_grad()
def generate(case: Case, roles: Roles, count: int = COUNT) -> Tensor:
    """Clips as the product makes them: the teacher by its sampler, a student or refiner by its stream."""
    world, generator, cond = case.world, torch.Generator().manual_seed(5), conditions(case.world, count)
    if case.product == "teacher":
        noise = torch.randn(count, world.frames, world.channels, 1, 1, generator=generator)
        teacher = roles.dit("teacher")
        return euler(lambda x, t: teacher(x, t, cond), noise, schedule(24, 1.0))[-1]
    refiner = roles.causal("refiner") if case.product == "refiner" else None
    return torch.cat(list(stream(roles.causal("backbone" if refiner else "student"), refiner, cond, generator)), 1)


def distance(case: Case, clips: Tensor) -> float:
    """Energy distance to exact clips."""
    return energy_distance(clips, case.world.sample(len(clips), torch.Generator().manual_seed(6)))


@cache
def measured(label: str) -> Measured:
    """Train a case, and its opposite for a quarter of the steps: that one only gets further away."""
    case = BY_LABEL[label]
    before = distance(case, generate(case, roles_of(case)))
    began = time.process_time()
    clips = generate(case, trained(label))
    seconds = time.process_time() - began
    opposite = roles_of(case)
    train(case, opposite, -1.0, case.steps // 4)
    return Measured(before, distance(case, clips), distance(case, generate(case, opposite)), seconds, clips)


def lags(clips: Tensor) -> tuple[float, float]:
    """Covariance of neighboring frames inside the chunks of two, and across their border, of clips of four frames."""
    covariance = torch.cov(clips.flatten(1).double().T)
    return float(covariance[0, 1] + covariance[2, 3]) / 2, float(covariance[1, 2])
