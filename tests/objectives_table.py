"""`python tests/objectives_table.py`: train a small generator with each objective, and with its sign turned round, and
write what came out to docs/OBJECTIVES.md. The cases are those of tests/test_objectives.py.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from analytic import best_gaussian, blobs, conditions, energy_distance
from objectives import COUNT, distance, generate, lags, measured, trained
from objectives_cases import BLIND, BY_LABEL, CASES, MIXED, STAGE1, Case

from teacher.flow import add_noise, x0_from_v

PAGE = Path(__file__).resolve().parents[1] / "docs" / "OBJECTIVES.md"
INTRODUCTION = """\
# Objectives against an exact teacher

Made by `make objectives` (tests/objectives_table.py); tests/test_objectives.py trains the same cases and holds them to
the same bounds. Two worlds, in which the teacher's velocity is known in closed form at every time (tests/analytic.py):
*blobs*, one frame of two numbers, three Gaussians; *video*, four frames of an AR(1) process, covariance 0.9 between
neighbors, in chunks of two. A small network learns through the terms and rollouts of this repository, and its stream is
compared with exact samples. Energy distance: 2 E|x - y| - E|x - x'| - E|y - y'|, {count} clips each; two exact samples
are {noise:.4f} apart, and the Gaussian that fits the blobs best is {gaussian:.3f} away from them.

Each row must pass its bound after training; the network before training and the one trained with the sign of the
objective turned round must fail it.

| objective | minimizes | paper | world | before | after | wrong sign | bound | CPU s |
|---|---|---|---|---:|---:|---:|---:|---:|
"""
UNMEASURED = (
    "| `identity_drift` | hinges on the likeness to the references | - | - | - | - | - | - | - |\n"
    "| `latent_statistics` | hinges on the channels' means and spreads | - | - | - | - | - | - | - |\n"
    "| `recover` | flow matching of the true chunk after own ones | - | - | - | - | - | - | - |\n"
    "| `reward_dmd` | reverse KL, weighted by a reward | - | - | - | - | - | - | - |\n"
    "| `data_forcing` | the real score at the data, at high noise | - | - | - | - | - | - | - |\n\n"
    "These are regularizers and levers: tests/test_recipes.py and tests/test_levers.py have their gradients.\n"
    "Guidance does nothing in worlds without conditions: tests/test_variants.py has the guidance part of\n"
    "`decoupled_dmd`. Of the divergences of `dmd` only reverse KL, the default, needs no discriminator.\n"
)


HISTORY = """
## The past

Covariance of neighboring frames in the streams of the two-chunk students, inside a chunk and across the border between
chunks. A bidirectional teacher does not know the clean past that a causal student is given: regressed on its paths, or
led by its steps, the student trusts its history too little: the border is weaker than the inside. Along the data's own
velocity, on the paths of an autoregressive teacher, or scored on its own stream, both are alike. (Consistency still
lacks spread, the more the fewer Euler steps; diffusion forcing is given a clean past that it has hardly ever seen.)

| student | inside | across | energy distance |
|---|---:|---:|---:|
| exact | 0.900 | 0.900 | 0 |
"""
FLOW_MAP, CONSISTENCY = "`flow_map`, one step", "`consistency`, teacher's step"
ANY_STEPS = """
## Any number of steps

Energy distance of one trained network in equal steps. A flow map goes from time to time along the teacher's path; a
consistency student goes to the clean end and is noised afresh.

| steps | `flow_map` | `consistency` |
|---:|---:|---:|
"""
STEPS = """
## Several steps at once

A critic that does not know which step a sample comes from compares the mixture of all steps with the teacher.
Off-policy with two steps, from random weights, the mixture comes out at an energy distance of {mixture:.3f}, the step
from noise alone at {first:.3f}, the step from t = 0.5 at {second:.3f}. The rows above that train with a critic take one
step; a stage that begins from a regression has each step near its place already.
"""


def page() -> str:
    """docs/OBJECTIVES.md."""
    exact = [blobs().sample(COUNT, torch.Generator().manual_seed(seed)) for seed in (1, 2)]
    text = INTRODUCTION.format(
        count=COUNT, noise=abs(energy_distance(*exact)), gaussian=energy_distance(best_gaussian(exact[0]), exact[1])
    )
    for case in CASES:
        m, paper = measured(case.label), f"[{case.paper}](https://arxiv.org/abs/{case.paper})"
        world = "video" if case.world.frames > 1 else "blobs"
        figures = f"{m.before:.3f} | {m.after:.4f} | {_short(m.wrong)} | {case.bound:g} | {m.seconds:.1f}"
        text += f"| {case.label} | {case.minimizes} | {paper} | {world} | {figures} |\n"
    text += UNMEASURED + HISTORY
    for case in [*(case for case in CASES if case.world.frames > 1), BLIND, STAGE1]:
        clips = generate(case, trained(case.label))
        inside, across = lags(clips)
        text += f"| {case.label} | {inside:.3f} | {across:.3f} | {distance(case, clips):.4f} |\n"
    text += ANY_STEPS
    for count in (1, 2, 4, 8):
        text += f"| {count} | {' | '.join(f'{any_steps(label, count):.4f}' for label in (FLOW_MAP, CONSISTENCY))} |\n"
    return text + STEPS.format(**each_step(MIXED))


def any_steps(label: str, count: int) -> float:
    """Energy distance of the stream of a trained student in `count` equal steps."""
    case, roles = BY_LABEL[label], trained(label)
    student = roles.causal("student")
    kept, student.stream = student.stream, replace(case.stream, steps=tuple(1 - i / count for i in range(count)))
    found = distance(case, generate(case, roles))
    student.stream = kept
    return found


def each_step(case: Case) -> dict[str, float]:
    """Energy distance of the samples of each of two steps at noised data, and of both together."""
    student, draw = trained(case.label).causal("student"), torch.Generator().manual_seed(3)
    x0, cond, steps = case.world.sample(COUNT, draw).float(), conditions(case.world, COUNT), []
    for time_of_step in case.times:
        t = torch.full((COUNT,), time_of_step, dtype=torch.float64)
        xt = add_noise(x0, torch.randn(x0.shape, generator=draw), t)
        with torch.no_grad():
            steps.append(x0_from_v(xt, student.velocity(xt, t, cond, student.start(cond)), t))
    mixture = torch.cat([steps[0][::2], steps[1][1::2]])
    return {name: distance(case, x) for name, x in zip(("first", "second", "mixture"), [*steps, mixture], strict=True)}


def _short(value: float) -> str:
    return f"{value:.1f}" if value < 100 else "over 100"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(f"Wrote {PAGE}.")
