"""Flow matching (arXiv 2210.02747): the network predicts eps - x0 at a random time of a noised clean clip.

Trains the teacher on data, with per-modality dropout for guidance, and the critic on the student's own samples: there
`x0` is detached, so that nothing reaches the student. Loss = mean (v - (eps - x0))^2.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from distill.contracts import Roles, Roll, Term
from teacher.draws import draw_rows
from teacher.flow import add_noise, sample_time, velocity


@dataclass(frozen=True)
class Config:
    role: str = "critic"
    shift: float = 2.0  # of the times trained on
    low: float = 0.0
    high: float = 1.0
    drop_text: float = 0.0
    drop_audio: float = 0.0
    drop_both: float = 0.0
    drop_refs: float = 0.0

    def __post_init__(self):
        if self.role not in ("teacher", "critic"):
            raise ValueError(f"role {self.role!r} must be teacher or critic")
        if not 0 <= self.low < self.high <= 1 or self.shift <= 0:
            raise ValueError("times need 0 <= low < high <= 1 and a shift above 0")


def term(roll: Roll, roles: Roles, cfg: Config) -> Term:
    """Flow-matching loss of `cfg.role` on roll.x0."""
    x0 = roll.x0.detach()
    name = f"flow_matching/{cfg.role}"
    t = sample_time((len(x0),), cfg.shift, roles.rows(f"{name}/time"), cfg.low, cfg.high).to(x0.device)
    eps = roles.noise(x0, f"{name}/noise")
    rows = roles.rows(f"{name}/drop")
    u = draw_rows(lambda n: torch.rand(3, n, generator=rows), len(x0), rows, dim=1).to(x0.device)
    both = u[1] < cfg.drop_both
    cond = roll.cond.drop(
        text=both | (u[0] < cfg.drop_text),
        audio=both | (u[2] < cfg.drop_audio),
        refs=(u[0] > 1 - cfg.drop_refs),
    )
    v = roles.dit(cfg.role)(add_noise(x0, eps, t), t, cond)
    return Term((v - velocity(x0, eps)).square().mean())
