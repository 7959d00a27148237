"""Flow matching of the causal network on clean clips: the autoregressive teacher, of many steps, or a first stage 1.

Every chunk is noised to a time of its own and learns eps - x0 given a past, and `forcing` says which one:

teacher     the clean chunks before it, half of the clips at the stream's history noise; [clean | noisy] side by side
            under one mask (Causal-Forcing, https://arxiv.org/abs/2602.02214)
diffusion   the noisy chunks before it, as they are, each at its own time (Diffusion Forcing,
            https://arxiv.org/abs/2407.01392)

Loss = mean (v - (eps - x0))^2, on the rollout `data`. Its mean is the flow of a chunk given its past, which a
bidirectional teacher does not know; with dropout, as in recipes/flow_matching.py, it can be guided.
"""

from __future__ import annotations

from dataclasses import dataclass

from einops import repeat

from distill.contracts import Roles, Roll, Term
from distill.rollout import given_history
from recipes.flow_matching import TimesAndDropout
from teacher.flow import add_noise, sample_time, velocity


@dataclass(frozen=True)
class Config(TimesAndDropout):
    forcing: str = "teacher"

    def __post_init__(self):
        super().__post_init__()
        if self.forcing not in ("teacher", "diffusion"):
            raise ValueError(f"forcing {self.forcing!r} must be teacher or diffusion")


def term(roll: Roll, roles: Roles, cfg: Config) -> Term:
    """Flow-matching loss of the student, every chunk under its past."""
    x0, size = roll.x0.detach(), roles.stream.chunk_frames
    rows = roles.rows("causal_flow_matching/time")
    t = sample_time((len(x0), x0.shape[1] // size), cfg.shift, rows, cfg.low, cfg.high)
    t = repeat(t, "b i -> b (i k)", k=size).to(x0.device)  # [B, T]
    eps = roles.noise(x0, "causal_flow_matching/noise")
    cond = cfg.dropped(roll.cond, roles.rows("causal_flow_matching/drop"))
    past = given_history(x0, roles, t) if cfg.forcing == "teacher" else ()
    v = roles.causal("student")(add_noise(x0, eps, t), t, cond, *past)
    return Term((v - velocity(x0, eps)).square().mean())
