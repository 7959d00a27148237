"""The cases of the table of objectives: what is trained, in which world, how long, and the bound that it must keep.

tests/objectives.py trains them. A case that takes part of another (a student to begin with, an autoregressive teacher)
names it by its label.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from analytic import World, blobs, video

from distill import rollout
from distill.rollout import DataConfig, TrajectoryRollConfig
from recipes import (
    adversarial,
    causal_flow_matching,
    consistency,
    decoupled_dmd,
    dmd,
    flow_map,
    flow_matching,
    ode_regression,
    perceptual,
    self_forcing,
    sid,
)
from student.causal_dit import StreamConfig
from teacher.guidance import Guidance

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
    paths: str = ""  # the case whose student, an autoregressive teacher, makes the trajectories; without: the exact one
    sampled: str = "stream"  # how clips are made: "stream", in few steps, or "paths", by many Euler steps
    flow_map: bool = False

    @property
    def stream(self) -> StreamConfig:
        return StreamConfig(min(self.world.frames, 2), sink_chunks=0, window_chunks=1, steps=self.times)


# ---- the cases --------------------------------------------------------------------------------------------

CONSISTENCY = (consistency.term, consistency.Config())
CRITIC = Phase("critic", (flow_matching.term, flow_matching.Config(role="critic", shift=1.0)))
DMD = (dmd.term, dmd.Config(cfg=PLAIN, shift=1.0))
PART = decoupled_dmd.Part(shift=1.0)
DECOUPLED = (decoupled_dmd.term, decoupled_dmd.Config(cfg=PLAIN, distribution=PART))
CLIPS = (rollout.data, DataConfig())
ON_PATHS, RENOISED = (rollout.teacher, TrajectoryRollConfig()), (rollout.renoised, TrajectoryRollConfig())


def on_grid(velocity: str, target: str = "student") -> tuple[Callable[..., Any], Any]:
    return consistency.roll_consistency, consistency.RollConfig(16, 1.0, velocity, target)


def weighted(divergence: str) -> Objective:
    return dmd.term, replace(DMD[1], divergence=divergence)


def judged_by(role: str) -> Objective:
    return adversarial.term, adversarial.Config(role=role, shift=0.3)


def forced(by: str) -> Objective:
    return causal_flow_matching.term, causal_flow_matching.Config(forcing=by, shift=1.0)


def learn(objective: Objective) -> tuple[Phase, ...]:
    return (Phase("student", objective),)


CASES = [
    Case(
        "`flow_matching`, rollout `data`",
        "flow_matching",
        "E (v - (eps - x0))²: the velocity of the data",
        "2210.02747",
        blobs(),
        CLIPS,
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
        "`causal_flow_matching`, teacher forcing",
        "causal_flow_matching",
        "the velocity of a chunk given the clean chunks before it",
        "2602.02214",
        video(),
        CLIPS,
        learn(forced("teacher")),
        bound=0.02,
        steps=500,
        sampled="paths",
    ),
    Case(
        "`causal_flow_matching`, diffusion forcing",
        "causal_flow_matching",
        "the same given noisy chunks, each at a time of its own",
        "2407.01392",
        video(),
        CLIPS,
        learn(forced("diffusion")),
        bound=0.02,
        steps=500,
        sampled="paths",
    ),
    Case(
        "`ode_regression`, paths of teacher forcing",
        "ode_regression",
        "E (x0 - end of the autoregressive teacher's path)²",
        "2602.02214",
        video(),
        ON_PATHS,
        learn((ode_regression.term, ode_regression.Config())),
        bound=0.02,
        steps=500,
        paths="`causal_flow_matching`, teacher forcing",
    ),
    Case(
        "`consistency`, average as target",
        "consistency",
        "E of the distance of the student at t and its moving average at s",
        "2303.01469",
        blobs(),
        on_grid("teacher", "average"),
        learn(CONSISTENCY),
        bound=0.02,
        steps=800,
        lr=1e-2,
    ),
    Case(
        "`flow_map`, one step",
        "flow_map",
        "E (F - (v - (t - r) dF/dt))²: mean velocities between any two times",
        "2605.13724",
        blobs(),
        CLIPS,
        learn((flow_map.term, flow_map.Config(shift=1.0, velocity="teacher"))),
        bound=0.02,
        steps=800,
        times=(1.0,),
        flow_map=True,
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
        steps=1600,
        lr=2e-3,
        times=(1.0,),
    ),
    Case(
        "`dmd`, Jensen-Shannon",
        "dmd",
        "Jensen-Shannon divergence over noise levels: score differences weighted by the head's ratio",
        "2502.15681",
        blobs(),
        RENOISED,
        (CRITIC, Phase("critic", judged_by("critic")), Phase("student", weighted("jensen-shannon"), every=2)),
        bound=0.04,
        steps=500,
        lr=1e-2,
        times=(1.0,),
    ),
    Case(
        "`decoupled_dmd`, rollout `renoised`",
        "decoupled_dmd",
        "the KL of `dmd` by a draw of its own beside the guidance's",
        "2511.22677",
        blobs(),
        RENOISED,
        (CRITIC, Phase("student", DECOUPLED, every=2)),
        bound=0.025,
        steps=500,
        lr=1e-2,
        times=(1.0,),
    ),
    Case(
        "`sid`, rollout `renoised`",
        "sid",
        "Fisher divergence of student and teacher over noise levels",
        "2404.04057",
        blobs(),
        RENOISED,
        (CRITIC, Phase("student", (sid.term, sid.Config(cfg=PLAIN, shift=1.0)), every=2)),
        bound=0.025,
        steps=500,
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


def _like(known: str, **changes: Any) -> Case:
    return replace(next(case for case in CASES if case.label == known), **changes)


# Three that fall short, and the page says by how much: two learn of the past from a teacher that does not see it clean,
# one has a critic that cannot tell its two steps apart. The first is also the refiner's backbone.
STAGE1 = _like("`ode_regression`, rollout `teacher`", label="`ode_regression` of the teacher's paths", world=video())
BLIND = _like(
    "`consistency`, teacher's step", label="`consistency`, teacher's step, two chunks", world=video(), lr=1e-2
)
MIXED = _like("`dmd` off-policy, rollout `renoised`", label="two steps at once", times=(1.0, 0.5))
BY_LABEL = {case.label: case for case in [*CASES, STAGE1, BLIND, MIXED]}
