"""Keep one term from outshouting the others: its gradient in the samples at most a share of theirs.

    scale = min(1, share * |dL_rest/dx0| / |dL_term/dx0|)        over the rows of this process, without gradient

A frozen face is the cheapest way to stay alike: a regularizer may steer the objective, never drive (RESEARCH: near 0.1
of distribution matching). The cosine between the two says whether they pull against each other.

value, rest (scalars), x0 [B, T, C, H, W]  ->  value scaled, {cosine, scale, share (before the cap)}
"""

from __future__ import annotations

import torch
from torch import Tensor


def capped(value: Tensor, rest: Tensor, x0: Tensor, share: float) -> tuple[Tensor, dict[str, Tensor]]:
    """The weighted term under its cap. ValueError where there is nothing to be a share of."""
    own, other = (_gradient(total, x0) for total in (value, rest))
    if other is None:
        raise ValueError("A term with a `cap` needs another one beside it whose gradient reaches the samples.")
    if own is None:
        return value, dict.fromkeys(("cosine", "scale", "share"), torch.zeros((), device=x0.device))
    sizes = own.norm(), other.norm()
    scale = (share * sizes[1] / sizes[0].clamp_min(1e-30)).clamp(max=1.0)
    cosine = (own * other).sum() / (sizes[0] * sizes[1]).clamp_min(1e-30)
    seen = {"cosine": cosine, "scale": scale, "share": sizes[0] / sizes[1].clamp_min(1e-30)}
    return scale * value, seen


def _gradient(total: Tensor, x0: Tensor) -> Tensor | None:
    """d total / d x0; None where it does not depend on it. The graph stays for the backward pass to come."""
    if not total.requires_grad:
        return None
    (found,) = torch.autograd.grad(total, x0, retain_graph=True, allow_unused=True)
    return None if found is None else found.double()
