"""Distribution matching weighted by a reward that is never differentiated (DynaForcing, https://arxiv.org/abs/2608.17707).

    g = exp(beta (R(x0) - baseline)) * g_dmd        per clip; R of the samples as they are

Clips that are good pull harder, so that the student moves towards its better samples, and no reward can be climbed by
a trick of the pixels. A clip of reward `baseline` weighs 1: near what clips have, it keeps the gradient at the size of
DMD's whatever beta is. Rewards: `identity` is the likeness to the references (what recipes/identity_drift.py is with
backpropagation), `motion` the mean step from frame to frame relative to the spread of the clip, or any
"package.module:function" of (roll, roles) -> [B].
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from distill.contracts import Roles, Roll, Term
from distill.faces import Face, embedder_of
from recipes import dmd
from recipes.identity_drift import reference_similarity


@dataclass(frozen=True)
class Config(dmd.Config):
    beta: float = 1.0
    baseline: float = 0.0  # the reward of a clip that weighs 1
    reward: str = "identity"
    face: Face = field(default_factory=Face)  # of the reward identity

    def __post_init__(self):
        super().__post_init__()
        if self.reward not in REWARDS and self.reward.count(":") != 1:
            raise ValueError(f"reward {self.reward!r} must be {', '.join(REWARDS)} or package.module:function")


def term(roll: Roll, roles: Roles, cfg: Config) -> Term:
    """The surrogate of recipes/dmd.py for the weighted gradient."""
    with torch.no_grad():
        reward = reward_of(roll, roles, cfg)
        weight = (cfg.beta * (reward - cfg.baseline)).exp()
        gradient = weight[:, None, None, None, None] * dmd.dmd_gradient(roll.x0.detach(), roll, roles, cfg)
    found = dmd.surrogate(roll.x0, gradient)
    return Term(found.value, {**found.logs, "reward": reward.mean(), "weight": weight.mean()})


def reward_of(roll: Roll, roles: Roles, cfg: Config) -> Tensor:
    """[B], of samples without a graph."""
    known = REWARDS.get(cfg.reward)
    if known is not None:
        return known(roll, roles, cfg).to(roll.x0.dtype)
    module, _, name = cfg.reward.partition(":")
    try:
        own = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"reward {cfg.reward} cannot be found ({error}): install it or mend the name.") from None
    return own(roll, roles).to(roll.x0.dtype)


def identity(roll: Roll, roles: Roles, cfg: Config) -> Tensor:
    """Mean likeness to the references, 0 for a character without any."""
    embedder, mask = embedder_of(cfg.face, roles, roll.x0.device), roll.cond.ref_mask
    seen = mask | ~mask.any(1, keepdim=True)  # a pool that is empty would have no maximum
    likeness = reference_similarity(embedder(roll.x0), embedder(roll.cond.refs), seen, 0.1).mean(1)
    return torch.where(mask.any(1), likeness, 0.0)


def motion(roll: Roll, roles: Roles, cfg: Config) -> Tensor:
    """Mean |x_t - x_(t-1)| over the clip's standard deviation."""
    x0 = roll.x0.flatten(2)
    return x0.diff(dim=1).abs().mean((1, 2)) / x0.std((1, 2)).clamp_min(1e-6)


REWARDS: dict[str, Callable[[Roll, Roles, Config], Tensor]] = {"identity": identity, "motion": motion}
