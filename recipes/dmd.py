"""Distribution matching distillation (DMD2, https://arxiv.org/abs/2405.14867; in latent space as in Self-Forcing,
https://arxiv.org/abs/2506.08009), weighted for other divergences as in f-distill (https://arxiv.org/abs/2502.15681).

    g = h (x0_fake - x0_real) / max(mean |x - x0_real|, floor)        per chunk
    L = 1/2 mean (x - sg(x - g))^2          so that  dL/dx = g / number of elements

x0_real is the teacher's guided prediction and x0_fake the critic's conditional one, both at the same re-noised student
sample. Neither network sees a gradient. The teacher is bidirectional: it scores distributions, not causal paths.

`divergence` says what between the student's distribution q and the real one p is made small: with r = p / q at the
noised sample and f the divergence's function, h = f''(r) r^2. Reverse KL, the default, has h = 1 and is the only one
that needs no ratio. The others read it off the head that the term `adversarial` trains on the critic, whose logit is
log r (of the data, in the teacher's place): that term must stand in the critic's phase. h is kept between 1/limit and
limit, then divided by its mean.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor

from distill.contracts import Roles, Roll, Term
from recipes.adversarial import judge
from teacher.flow import add_noise, sample_time, x0_from_v
from teacher.guidance import Guidance, guided_velocity

# log h of log r (f-distill, table 1): how much a sample counts where the real density is r times the student's.
WEIGHTS: dict[str, Callable[[Tensor], Tensor]] = {
    "reverse-kl": torch.zeros_like,
    "softened-reverse-kl": lambda log_r: -F.softplus(log_r),  # h = 1 / (1 + r)
    "jensen-shannon": lambda log_r: -F.softplus(-log_r),  # h = r / (1 + r)
    "squared-hellinger": lambda log_r: log_r / 2,  # h ~ sqrt(r)
    "forward-kl": lambda log_r: log_r,  # h = r
}


@dataclass(frozen=True)
class Config:
    cfg: Guidance = field(default_factory=lambda: Guidance(text=4.0, audio=4.0))
    shift: float = 5.0  # of the re-noising times
    low: float = 0.02
    high: float = 0.98
    floor: float = 1e-3  # of the normalizer
    divergence: str = "reverse-kl"
    limit: float = 10.0  # of the divergence's weight, both ways

    def __post_init__(self):
        if not 0 < self.low < self.high < 1 or self.shift <= 0 or self.floor <= 0:
            raise ValueError("times need 0 < low < high < 1, shift and floor must be above 0")
        if self.divergence not in WEIGHTS:
            raise ValueError(f"divergence {self.divergence!r} must be one of {', '.join(WEIGHTS)}")
        if self.limit < 1:
            raise ValueError("limit must be at least 1")


def term(roll: Roll, roles: Roles, cfg: Config) -> Term:
    """Surrogate whose gradient in roll.x0 is the normalized score difference."""
    logs: dict[str, Tensor] = {}
    with torch.no_grad():
        gradient = dmd_gradient(roll.x0.detach(), roll, roles, cfg, logs)
    value = surrogate(roll.x0, gradient)
    return Term(value.value, value.logs | logs)


def dmd_gradient(x0: Tensor, roll: Roll, roles: Roles, cfg: Config, logs: dict[str, Tensor] | None = None) -> Tensor:
    """g [B, T, C, H, W] at one random time per clip; `logs` takes `gap`, the mean size of x0_fake - x0_real."""
    xt, t = renoised(x0, "dmd", roles, cfg)
    critic = roles.dit("critic")
    real = x0_from_v(xt, guided_velocity(roles.dit("teacher"), xt, t, roll.cond, cfg.cfg), t)
    fake = x0_from_v(xt, critic(xt, t, roll.cond), t)
    if logs is not None:
        logs["gap"] = (fake - real).abs().mean()
    g = (fake - real) / chunk_scale(x0 - real, roles, cfg.floor)
    return g if cfg.divergence == "reverse-kl" else ratio_weight(xt, t, roll, roles, cfg) * g


def ratio_weight(xt: Tensor, t: Tensor, roll: Roll, roles: Roles, cfg: Config) -> Tensor:
    """h [B, 1, 1, 1, 1] with mean 1, from the head's mean logit of each clip."""
    critic = roles.dit("critic")
    if "adversarial" not in dict(getattr(critic, "heads", {})):
        raise ValueError(f"dmd.divergence {cfg.divergence} needs the term adversarial in the critic's phase.")
    log_r = judge(critic, xt, t, roll).mean(1).to(xt.dtype)
    h = WEIGHTS[cfg.divergence](log_r).exp().clamp(1 / cfg.limit, cfg.limit)
    return (h / h.mean())[:, None, None, None, None]


# ---- what the variants of this term share -----------------------------------------------------------------


def renoised(x0: Tensor, tag: str, roles: Roles, cfg) -> tuple[Tensor, Tensor]:
    """(x_t, t [B]): clips at a random time each; `cfg` has shift, low and high."""
    t = sample_time((len(x0),), cfg.shift, roles.rows(f"{tag}/time"), cfg.low, cfg.high).to(x0.device)
    return add_noise(x0, roles.noise(x0, f"{tag}/noise"), t), t


def chunk_scale(difference: Tensor, roles: Roles, floor: float) -> Tensor:
    """Mean size of `difference` [B, T, C, H, W] in each chunk, at least `floor`: [B, T, 1, 1, 1]."""
    frames, size = difference.shape[1], roles.stream.chunk_frames
    chunk = size if frames % size == 0 else frames
    scale = rearrange(difference.abs(), "b (i k) c h w -> b i (k c h w)", k=chunk).mean(-1).clamp_min(floor)
    return repeat(scale, "b i -> b (i k) 1 1 1", k=chunk)


def surrogate(x0: Tensor, gradient: Tensor) -> Term:
    """The loss whose gradient in x0 is `gradient` over the number of elements; `grad_norm` is that one's mean size."""
    target = x0.detach() - gradient
    return Term((x0 - target).square().mean() / 2, {"grad_norm": gradient.abs().mean()})
