"""Identity-drift regularization: keep the face where its references are, and late chunks where early ones were.

With s_i the similarity of chunk i to the pool of references (soft maximum over the images, seen through a frozen
embedder), r_ij that to the pool of another character j of this process's batch, and weights w_i that grow with age:

    anchor    sum_i w_i relu(natural - s_i)                 nothing is gained above the natural same-person level
    drift     sum_i w_i relu(sg(s_first) - s_i - margin)    only chunks that fell behind the stream's first are pulled
    contrast  sum_i w_i mean_j relu(r_ij - s_i + gap)       nobody else may be nearly as like; another clip of the
                                                            same character is nobody else

All are hinges on purpose: a similarity pushed without end is bought with a frozen face. Above the time `high` of the
evaluation that made the samples they are silent: what is still a blur has no face. A `cap` beside the weight limits the
term to a share of the other terms' gradient and logs the cosine between the two (distill/balance.py).
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from einops import rearrange
from torch import Tensor

from distill.contracts import Roles, Roll, Term
from distill.faces import Face, embedder_of


@dataclass(frozen=True)
class Config:
    anchor: float = 1.0  # weight of each form
    drift: float = 1.0
    contrast: float = 0.0
    margin: float = 0.02
    gap: float = 0.2
    temperature: float = 0.1  # of the soft maximum over references
    high: float = 1.0  # noise level of the evaluation above which nothing is said
    late: float = 0.0  # how much more than a first chunk one of age `horizon` counts
    horizon: int = 64  # chunks
    face: Face = field(default_factory=Face)

    def __post_init__(self):
        if min(self.anchor, self.drift, self.contrast, self.margin, self.gap, self.late) < 0 or self.temperature <= 0:
            raise ValueError("anchor, drift, contrast, margin, gap, late must be at least 0, temperature above 0")
        if not 0 < self.high <= 1 or self.horizon < 1:
            raise ValueError("high must lie in (0, 1], horizon be at least 1")


def term(roll: Roll, roles: Roles, cfg: Config) -> Term:
    """Hinged losses of roll.x0."""
    embedder = embedder_of(cfg.face, roles, roll.x0.device)
    known = roll.cond.ref_mask.any(1)  # a character without any image is like nobody
    if not known.any() or (roll.time is not None and roll.time > cfg.high):
        nothing = 0 * roll.x0.sum()
        return Term(nothing, dict.fromkeys(("similarity", "drift"), nothing.detach()))
    size, mask = roles.stream.chunk_frames, roll.cond.ref_mask[known]
    with torch.no_grad():
        pool = embedder(roll.cond.refs[known])  # [B, R, E]
    faces = embedder(roll.x0[known])
    likeness = reference_similarity(faces, pool, mask, cfg.temperature)  # [B, T]
    chunks = per_chunk(likeness, size)  # [B, chunks]
    weights = age_weights(roll, size, cfg).to(chunks)
    if roll.first is None:
        early = chunks[:, :1].detach()
    else:
        with torch.no_grad():
            first = reference_similarity(embedder(roll.first[known]), pool, mask, cfg.temperature)
        early = per_chunk(first, size)
    drift = (weights * (early - chunks - cfg.margin).relu()).mean()
    total = cfg.anchor * (weights * (float(embedder.natural) - chunks).relu()).mean() + cfg.drift * drift
    if cfg.contrast and len(faces) > 1:
        who = torch.arange(len(known), device=known.device) if roll.identity is None else roll.identity
        total = total + cfg.contrast * contrast(faces, pool, mask, who[known], chunks, weights, size, cfg)
    return Term(total, {"similarity": likeness.mean(), "drift": drift})


def reference_similarity(faces: Tensor, pool: Tensor, mask: Tensor, temperature: float) -> Tensor:
    """Soft maximum over present references of the cosine: faces [B, T, E], pool [B, R, E], mask [B, R] -> [B, T]."""
    cosine = torch.einsum("bte,bre->btr", faces, pool)
    hidden = ~mask[:, None]
    weights = (cosine / temperature).masked_fill(hidden, -torch.inf).softmax(-1)
    return (weights * cosine.masked_fill(hidden, 0)).sum(-1)


def contrast(
    faces: Tensor, pool: Tensor, mask: Tensor, who: Tensor, chunks: Tensor, weights: Tensor, size: int, cfg: Config
) -> Tensor:
    """Every chunk against the pools of all other characters; faces [B, T, E], who [B], chunks [B, chunks]."""
    hinges, others = [], []
    for shift in range(1, len(faces)):
        other = reference_similarity(faces, pool.roll(shift, 0), mask.roll(shift, 0), cfg.temperature)
        hinges.append((weights * (per_chunk(other, size) - chunks + cfg.gap).relu()).mean(-1))
        others.append(who != who.roll(shift, 0))
    strangers = torch.stack(others)  # [B - 1, B]
    return (strangers * torch.stack(hinges)).sum() / strangers.sum().clamp_min(1)


def per_chunk(values: Tensor, size: int) -> Tensor:
    """Means [B, chunks] of [B, T]."""
    return rearrange(values, "b (i k) -> b i k", k=size).mean(-1)


def age_weights(roll: Roll, size: int, cfg: Config) -> Tensor:
    """[chunks]: 1 for a stream's first chunk, 1 + late from age `horizon` on; ones where ages are not known."""
    if roll.age is None:
        return torch.ones(roll.x0.shape[1] // size)
    return 1 + cfg.late * (roll.age[::size].double() / cfg.horizon).clamp(max=1.0)
