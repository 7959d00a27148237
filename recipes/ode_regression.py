"""ODE regression (CausVid, https://arxiv.org/abs/2412.07772): from any point of the teacher's path, predict its end.

Runs on the rollout `teacher`: roll.x0 is the student's one-step prediction at a stored state, roll.target the end of
that trajectory. Loss = mean (x0 - target)^2 in latent space. Whose paths they are, the bidirectional teacher's or an
autoregressive one's (Causal-Forcing, https://arxiv.org/abs/2602.02214), is the rollout's `source`.
"""

from __future__ import annotations

from dataclasses import dataclass

from distill.contracts import Roles, Roll, Term


@dataclass(frozen=True)
class Config:
    """No settings beside weight and ramp."""


def term(roll: Roll, roles: Roles, cfg: Config) -> Term:
    """Mean squared error of the predicted clean latents."""
    if roll.target is None:
        raise ValueError("ode_regression needs a rollout with a target: rollout.kind teacher, renoised or data.")
    return Term((roll.x0 - roll.target).square().mean())
