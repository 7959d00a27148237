"""Adversarial term of DMD2 (https://arxiv.org/abs/2405.14867, section 4.3): a head on the critic's features tells real
latents from the student's, both noised to a random time, with the non-saturating loss

    role critic    L = mean softplus(-D(real_t)) + mean softplus(D(fake_t))        trains head and critic
    role student   L = mean softplus(-D(fake_t))                                   trains whoever made roll.x0

It needs no teacher, so it can mend what distribution matching inherits from the teacher. Features are the keys and
values of the critic's last block, tokens of real and fake hear the same conditions, and every token is judged.

The head is a part of the critic (`heads`, see distill/roles.py): trained, saved and resumed with it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distill.contracts import Clip, Roles, Roll, Term
from teacher.dit import DiT, DiTConfig
from teacher.flow import add_noise, sample_time
from teacher.rope import grid_positions

PACE = 10.0  # at the critic's own rate the head had learned nothing after 384 updates (docs/LOG.md, 30 November)


@dataclass(frozen=True)
class Config:
    role: str = "student"  # who learns: the critic (with its head), or the student or refiner behind roll.x0
    shift: float = 3.0  # of the re-noising times
    low: float = 0.02
    high: float = 0.98

    def __post_init__(self):
        if self.role not in ("critic", "student", "refiner"):
            raise ValueError(f"role {self.role!r} must be critic, student or refiner")
        if not 0 <= self.low < self.high <= 1 or self.shift <= 0:
            raise ValueError("times need 0 <= low < high <= 1 and a shift above 0")


class Head(nn.Module):
    """Tokens [B, N, 2D] -> logits [B, N], zero at the start: it has no opinion until it has learned one. It begins from
    nothing on a critic that is all but done, so it learns `PACE` times as fast: its weights are kept PACE times smaller
    than they act."""

    def __init__(self, dim: int):
        super().__init__()
        self.hidden = nn.Linear(2 * dim, dim)
        self.out = nn.Linear(dim, 1)
        with torch.no_grad():
            for start in (self.hidden.weight, self.hidden.bias):
                start /= PACE
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, tokens: Tensor) -> Tensor:
        return PACE * self.out(F.silu(PACE * self.hidden(tokens)))[..., 0]


def head(config: DiTConfig) -> Head:
    """What this term adds to the critic."""
    return Head(config.dim)


def term(roll: Roll, roles: Roles, cfg: Config) -> Term:
    """Non-saturating loss of one side."""
    if cfg.role != "critic":
        fake = logits(roll.x0, "fake", roll, roles, cfg)
        return Term(F.softplus(-fake).mean(), {"logit": fake.mean()})
    clip = roll.clip or Clip(roll.real, roll.cond)  # of a stream with another character the batch's own
    if clip.latents is None:
        raise ValueError("adversarial needs real latents: a rollout over clips of the data set.")
    real = logits(clip.latents, "real", replace(roll, cond=clip.cond), roles, cfg)
    fake = logits(roll.x0.detach(), "fake", roll, roles, cfg)
    right = ((real > 0).float().mean() + (fake < 0).float().mean()) / 2
    return Term(F.softplus(-real).mean() + F.softplus(fake).mean(), {"accuracy": right})


def logits(x0: Tensor, kind: str, roll: Roll, roles: Roles, cfg: Config) -> Tensor:
    """[B, N] of clips x0 [B, T, C, H, W], re-noised; above 0 = real."""
    critic = roles.dit("critic")
    tag = f"adversarial/{cfg.role}"
    # Real and fake are compared at the same times, under noise of their own.
    t = sample_time((len(x0),), cfg.shift, roles.rows(f"{tag}/time"), cfg.low, cfg.high).to(x0.device)
    xt = add_noise(x0, roles.noise(x0, f"{tag}/{kind}"), t)
    return judge(critic, xt, t, roll)


def judge(critic: DiT, xt: Tensor, t: Tensor, roll: Roll) -> Tensor:
    """The head's logits on the critic's last keys and values."""
    positions = grid_positions(xt.shape[1], *critic.token_grid(xt)).to(xt.device)
    _, layers = critic.run(xt, t, roll.cond, positions, critic.encode_refs(roll.cond))
    return critic.get_submodule("heads.adversarial")(torch.cat(layers[-1], -1))
