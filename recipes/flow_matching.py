"""Flow matching (https://arxiv.org/abs/2210.02747): the network predicts eps - x0 at a random time of a noised clip.

Trains the teacher on data, with per-modality dropout for guidance, and the critic on the student's own samples: there
`x0` is detached, so that nothing reaches the student. Loss = mean (v - (eps - x0))^2.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from distill.contracts import Roles, Roll, Term
from teacher.conditions import Conditions
from teacher.draws import draw_rows
from teacher.flow import add_noise, sample_time, velocity


@dataclass(frozen=True)
class TimesAndDropout:
    """At which times a flow is learned, and how often without which condition (for guidance)."""

    shift: float = 2.0
    low: float = 0.0
    high: float = 1.0
    drop_text: float = 0.0
    drop_audio: float = 0.0
    drop_both: float = 0.0
    drop_refs: float = 0.0

    def __post_init__(self):
        if not 0 <= self.low < self.high <= 1 or self.shift <= 0:
            raise ValueError("times need 0 <= low < high <= 1 and a shift above 0")

    def dropped(self, cond: Conditions, rows: torch.Generator) -> Conditions:
        """Conditions without what uniform numbers of `rows` say, clip by clip."""
        u = draw_rows(lambda n: torch.rand(3, n, generator=rows), len(cond.text), rows, dim=1).to(cond.text.device)
        both = u[1] < self.drop_both
        return cond.drop(
            text=both | (u[0] < self.drop_text),
            audio=both | (u[2] < self.drop_audio),
            refs=(u[0] > 1 - self.drop_refs),
        )


@dataclass(frozen=True)
class Config(TimesAndDropout):
    role: str = "critic"

    def __post_init__(self):
        super().__post_init__()
        if self.role not in ("teacher", "critic"):
            raise ValueError(f"role {self.role!r} must be teacher or critic")


def term(roll: Roll, roles: Roles, cfg: Config) -> Term:
    """Flow-matching loss of `cfg.role` on roll.x0."""
    x0 = roll.x0.detach()
    name = f"flow_matching/{cfg.role}"
    t = sample_time((len(x0),), cfg.shift, roles.rows(f"{name}/time"), cfg.low, cfg.high).to(x0.device)
    eps = roles.noise(x0, f"{name}/noise")
    cond = cfg.dropped(roll.cond, roles.rows(f"{name}/drop"))
    v = roles.dit(cfg.role)(add_noise(x0, eps, t), t, cond)
    return Term((v - velocity(x0, eps)).square().mean())
