"""Does the clip show the character of its reference images?

A clip's identity is the mean over frames of the measured identity parameters, which are scaled so that characters
differ by about 1 per dimension. Distance = root mean square over dimensions to the mean of the character's own
reference images, measured the same way; top-1 asks whether those are nearer than any other character's. identity
[N, F, D], references [N, D] -> [N].
"""

from __future__ import annotations

import torch
from torch import Tensor

from evaluation.geometry import measure


def reference_identity(identity: Tensor, mask: Tensor) -> Tensor:
    """identity of the reference images [N, R, D], mask [N, R] bool -> their mean [N, D]."""
    weight = mask.to(identity.dtype)[..., None]
    return (identity * weight).sum(1) / weight.sum(1).clamp(min=1)


def stills_identity(stills: Tensor, mask: Tensor) -> Tensor:
    """Reference images [N, R, 3, H, W] in [0, 1], mask [N, R] bool -> their mean identity [N, D].

    Every still is a clip of its own: frames of one clip lend each other what a blink hides, and a slot without an
    image would lend gray.
    """
    apart = measure(stills.flatten(0, 1)[:, None]).identity[:, 0].unflatten(0, mask.shape)
    return reference_identity(apart, mask)


def identity_distance(identity: Tensor, references: Tensor) -> Tensor:
    """identity [N, F, D], references [N, D] -> root mean square distance [N] of the clip's mean identity."""
    return (identity.double().mean(1) - references.double()).square().mean(-1).sqrt()


def identity_top1(identity: Tensor, references: Tensor, character: Tensor) -> Tensor:
    """Also `character` [N] int -> [N], 1.0 where a clip is nearest to its own character of all that occur.

    Several clips of one character share one entry of the gallery, the mean of their references.
    """
    names, which = character.unique(return_inverse=True)
    own = torch.nn.functional.one_hot(which, len(names)).double()  # [N, characters]
    gallery = own.T @ references.double() / own.sum(0)[:, None]  # [characters, D]
    nearest = torch.cdist(identity.double().mean(1), gallery).argmin(1)
    return (nearest == which).double()
