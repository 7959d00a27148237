"""Every training objective against a teacher that is known exactly: the loop that trains the cases and measures them.

The terms and rollouts are those of recipes/ and distill/; the loop is the trainer's without files: phases with keyed
randomness, one role with gradient at a time, AdamW, an average of the product. tests/test_objectives.py holds each case
to its bound, tests/objectives_table.py writes docs/OBJECTIVES.md from them.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, replace
from functools import cache

import torch
from analytic import Bidirectional, Causal, Exact, Paths, codec, conditions, energy_distance
from conftest import batch_of
from objectives_cases import BY_LABEL, Case
from torch import Tensor, nn

from distill.contracts import Roles
from distill.state.ema import EMA
from distill.trajectories import causal_states
from recipes import adversarial
from student.stream import stream
from teacher.flow import schedule
from teacher.guidance import Guidance
from teacher.sampler import euler

BATCH, COUNT = 256, 2048  # clips per step; clips that are compared


@dataclass(frozen=True)
class Measured:
    """Energy distance to exact samples before, after, and after training with the sign turned round."""

    before: float
    after: float
    wrong: float
    seconds: float  # of CPU time that the training took
    clips: Tensor  # of the trained generator, [COUNT, T, C, 1, 1]


# ---- training ---------------------------------------------------------------------------------------------


def roles_of(case: Case) -> Roles:
    """The networks as the case begins."""
    world = case.world
    torch.manual_seed(0)
    critic = Bidirectional(world)
    critic.add_module("heads", nn.ModuleDict({"adversarial": adversarial.head(critic.config)}))
    models: dict[str, nn.Module] = {"teacher": Exact(world), "critic": critic}
    bidirectional = case.product == "teacher"
    models[case.product] = Bidirectional(world) if bidirectional else Causal(world, case.stream, case.flow_map)
    if case.start:
        models["backbone"] = trained(case.start).models["student"].requires_grad_(False)
    paths = Paths(world, case.times, trained(case.paths).causal("student") if case.paths else None)
    return Roles(models, case.stream, codec(world), trajectories=paths)


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
    roles.average = average.average
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
    """Clips as the product makes them: a teacher by its sampler, a student or refiner by its stream."""
    world, generator, cond = case.world, torch.Generator().manual_seed(5), conditions(case.world, count)
    if case.sampled == "paths" or case.product == "teacher":
        noise = torch.randn(count, world.frames, world.channels, 1, 1, generator=generator)
    if case.sampled == "paths":
        return causal_states(roles.causal("student"), noise, cond, schedule(24, 1.0), Guidance(1.0, 1.0))[-1]
    if case.product == "teacher":
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
