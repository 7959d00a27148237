"""What identity terms look through: anything that turns latents into unit vectors, and knows what is natural.

The data set's own embedder (teacher/embedder.py) is trained by `make data`, blind to mouth, blink and pose. Any torch
network over images does as well: `Face` names a function that makes it ("package.module:function"), a file of
weights, and the similarity that two clips of one real person have under it (`natural_level` measures that on data).

latents [B, T, C, H, W]  ->  unit vectors [B, T, E]
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Protocol

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from distill.contracts import Roles
from teacher.codec import STRIDE, PCACodec


class Embedder(Protocol):
    """Frozen; gradient flows through it to the latents."""

    @property
    def natural(self) -> float: ...

    def __call__(self, latents: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class Face:
    """An embedder of images by name; none = the data set's own."""

    factory: str = ""  # "package.module:function", called without arguments, gives a module: [N, 3, S, S] -> [N, E]
    weights: str = ""  # a safetensors file; none = what the function made
    natural: float = 1.0  # likeness of two clips of one person
    size: int = 112  # S, to which frames are resized

    def __post_init__(self):
        if self.factory and self.factory.count(":") != 1:
            raise ValueError(f"face.factory {self.factory!r} must be of the form package.module:function")
        if self.weights and not self.factory:
            raise ValueError("face.weights needs face.factory: the function that makes the network")
        if not -1 <= self.natural <= 1 or self.size < 8:
            raise ValueError("face.natural is a cosine, face.size at least 8")


class OfFrames:
    """An embedder of images, looking at the last frame that each latent frame decodes to, in [-1, 1]."""

    def __init__(self, network: nn.Module, codec: PCACodec, natural: float, size: int):
        self.network, self.codec, self.natural, self.size = network, codec, natural, size

    def __call__(self, latents: Tensor) -> Tensor:
        frames = self.codec.decode_unclamped(latents)[:, STRIDE[0] - 1 :: STRIDE[0]]  # [B, T, 3, H, W]
        images = F.interpolate(2 * frames.flatten(0, 1) - 1, (self.size, self.size), mode="bilinear")
        return F.normalize(self.network(images), dim=-1).unflatten(0, latents.shape[:2])


def embedder_of(face: Face, roles: Roles, device: torch.device) -> Embedder:
    """The embedder that a term asks for. ValueError, in one sentence, where there is none."""
    if face.factory:
        return OfFrames(_network(face.factory, face.weights, str(device)), roles.codec, face.natural, face.size)
    if roles.embedder is None:
        raise ValueError("identity terms need an embedder: `make data` trains one, or name one with `face`.")
    return roles.embedder


@lru_cache(maxsize=4)
def _network(factory: str, weights: str, device: str) -> nn.Module:
    module, _, name = factory.partition(":")
    try:
        network = getattr(importlib.import_module(module), name)()
    except (ImportError, AttributeError) as error:
        raise ValueError(f"face.factory {factory} cannot be found ({error}): install it or mend the name.") from None
    if weights:
        if not Path(weights).is_file():
            raise ValueError(f"face.weights {weights} does not exist: give the path of a safetensors file.")
        try:
            network.load_state_dict(load_file(weights))
        except RuntimeError as error:
            raise ValueError(f"face.weights {weights} do not fit {factory} ({str(error).splitlines()[-1]}).") from None
    return network.to(device).requires_grad_(False).eval()


@torch.no_grad()
def natural_level(embedder: Embedder, clips: Tensor, identity: Tensor) -> float:
    """Mean likeness of frames of different clips of one person: clips [N, T, C, H, W], identity [N]."""
    faces = embedder(clips)
    rows = (identity[:, None] == identity[None]).triu(1).nonzero()
    if not len(rows):
        raise ValueError("The natural level needs two clips of at least one person.")
    return float((faces[rows[:, 0]] * faces[rows[:, 1]].flip(1)).sum(-1).mean())
