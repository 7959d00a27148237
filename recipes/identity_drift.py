"""Identity-drift regularization: keep the face where its references are, and late chunks where early ones were.

With s_i the similarity of chunk i to the pool of references (soft maximum over the images, seen through a frozen
embedder):

    anchor  mean_i relu(natural - s_i)             nothing is gained above the natural same-person level
    drift   mean_i relu(sg(s_first) - s_i - margin)  only chunks that fell behind the first one are pulled

Both are hinges on purpose: a similarity pushed without end is bought with a frozen face.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor

from distill.contracts import Roles, Roll, Term


@dataclass(frozen=True)
class Config:
    anchor: float = 1.0  # weight of each form
    drift: float = 1.0
    margin: float = 0.02
    temperature: float = 0.1  # of the soft maximum over references

    def __post_init__(self):
        if min(self.anchor, self.drift, self.margin) < 0 or self.temperature <= 0:
            raise ValueError("anchor, drift and margin must be at least 0, temperature above 0")


def term(roll: Roll, roles: Roles, cfg: Config) -> Term:
    """Hinged anchor and drift losses of roll.x0."""
    embedder = roles.embedder
    if embedder is None:
        raise ValueError("identity_drift needs an embedder; `make data` trains one.")
    known = roll.cond.ref_mask.any(1)  # a character without any image is like nobody
    if not known.any():
        nothing = 0 * roll.x0.sum()
        return Term(nothing, {"similarity": nothing.detach(), "drift": nothing.detach()})
    with torch.no_grad():
        pool = embedder(roll.cond.refs[known])  # [B, R, E]
    faces = embedder(roll.x0[known])
    similarity = reference_similarity(faces, pool, roll.cond.ref_mask[known], cfg.temperature)  # [B, T]
    chunks = rearrange(similarity, "b (i k) -> b i k", k=roles.stream.chunk_frames).mean(-1)  # [B, chunks]
    anchor = (float(embedder.natural) - chunks).relu().mean()
    drift = (chunks[:, :1].detach() - chunks - cfg.margin).relu().mean()
    return Term(cfg.anchor * anchor + cfg.drift * drift, {"similarity": similarity.mean(), "drift": drift})


def reference_similarity(faces: Tensor, pool: Tensor, mask: Tensor, temperature: float) -> Tensor:
    """Soft maximum over present references of the cosine: faces [B, T, E], pool [B, R, E], mask [B, R] -> [B, T]."""
    cosine = torch.einsum("bte,bre->btr", faces, pool)
    hidden = ~mask[:, None]
    weights = (cosine / temperature).masked_fill(hidden, -torch.inf).softmax(-1)
    return (weights * cosine.masked_fill(hidden, 0)).sum(-1)
