"""A second opinion on who it is: a small network on pixels that no loss has ever looked through.

The embedder of the losses (teacher/embedder.py) reads latents and was trained on pairs; a student trained with it may
please it and nobody else. This one differs in all: it reads pixels, learns to name a picture among prototypes of 64
train characters (Snell et al. 2017, arXiv 1703.05175), has other layers and another seed.
frames [N, F, 3, H, W] in [0, 1] -> unit vectors [N, F, E]
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

SIDE = 32  # pixels that pictures are averaged down to
SCALE = 16.0  # of the cosines


class Judge(nn.Module):
    """Three layers from 32 x 32 pixels to 4 x 4, a projection; about 50 thousand parameters."""

    def __init__(self, width: int = 24, dim: int = 24):
        super().__init__()
        self.shape = {"width": width, "dim": dim}
        wide = 2 * width
        self.layers = nn.Sequential(
            nn.Conv2d(3, width, 5, stride=2, padding=2),
            nn.SiLU(),
            nn.Conv2d(width, wide, 3, stride=2, padding=1),
            nn.SiLU(),
            nn.Conv2d(wide, wide, 3, stride=2, padding=1),
            nn.SiLU(),
            nn.Flatten(),
            nn.Linear(16 * wide, dim),
        )
        self.about: dict[str, Any] = {}  # how well it tells characters apart, and from what distance on it does

    def forward(self, frames: Tensor) -> Tensor:
        return self.of_small(small(frames.flatten(0, 1))).unflatten(0, frames.shape[:2])

    def of_small(self, pictures: Tensor) -> Tensor:
        """Pictures [B, 3, SIDE, SIDE] -> unit vectors [B, E]."""
        return F.normalize(self.layers(pictures - 0.5), dim=-1)

    def save(self, folder: Path) -> None:
        """Weights and what is known about them."""
        folder.mkdir(parents=True, exist_ok=True)
        save_file({k: v.detach().contiguous() for k, v in self.state_dict().items()}, folder / "judge.safetensors")
        told = {"shape": self.shape, "about": self.about}
        (folder / "judge.json").write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> Judge:
        """A saved judge, frozen."""
        told = json.loads((folder / "judge.json").read_text(encoding="utf-8"))
        judge = cls(**told["shape"])
        judge.load_state_dict(load_file(folder / "judge.safetensors"))
        judge.about = told["about"]
        return judge.requires_grad_(False).eval()


def small(frames: Tensor) -> Tensor:
    """Pictures [B, 3, H, W] -> averaged down to [B, 3, SIDE, SIDE]."""
    return F.adaptive_avg_pool2d(frames.float(), SIDE)


def prototype_loss(shown: Tensor, kept: Tensor) -> Tensor:
    """shown [I, E] one picture of each character, kept [I, K, E] others of it -> cross-entropy of naming the first by
    the means of the others."""
    prototypes = F.normalize(kept.mean(1), dim=-1)
    return F.cross_entropy(SCALE * shown @ prototypes.T, torch.arange(len(shown)))


def face_distance(face: Tensor, reference: Tensor) -> Tensor:
    """1 - cosine of the angle between mean vectors, [..., E] each -> [...]."""
    return 1 - F.cosine_similarity(face.double(), reference.double(), dim=-1)
