"""Who is it? A small frozen network from latents to unit vectors, trained on pairs of clips of one character.

It is what identity terms look through. Trained with frames of different clips as positives, it has no use for mouth,
blink or pose. `natural` is the similarity that two clips of one real character have: more than that is copying.

latents [B, T, C, H, W] -> unit vectors [B, T, E]
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn


class IdentityEmbedder(nn.Module):
    """Three convolutions and a projection; 0.2M parameters."""

    def __init__(self, channels: int, rows: int = 8, columns: int = 8, width: int = 64, dim: int = 32):
        super().__init__()
        self.shape = {"channels": channels, "rows": rows, "columns": columns, "width": width, "dim": dim}
        self.natural = 1.0
        self.layers = nn.Sequential(
            nn.Conv2d(channels, width, 3, padding=1),
            nn.GELU(),
            nn.Conv2d(width, width, 3, stride=2, padding=1),
            nn.GELU(),
            nn.Conv2d(width, width, 3, padding=1),
            nn.GELU(),
            nn.Flatten(),
            nn.Linear(width * -(-rows // 2) * -(-columns // 2), dim),
        )

    def forward(self, latents: Tensor) -> Tensor:
        return F.normalize(self.layers(latents.flatten(0, 1)), dim=-1).unflatten(0, latents.shape[:2])

    def save(self, folder: Path | str) -> None:
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        save_file({k: v.detach().contiguous() for k, v in self.state_dict().items()}, folder / "embedder.safetensors")
        (folder / "embedder.json").write_text(json.dumps({**self.shape, "natural": self.natural}))

    @classmethod
    def load(cls, folder: Path | str) -> IdentityEmbedder:
        """A saved embedder, frozen."""
        shape = json.loads((Path(folder) / "embedder.json").read_text())
        natural = shape.pop("natural")
        model = cls(**shape)
        model.natural = natural
        model.load_state_dict(load_file(Path(folder) / "embedder.safetensors"))
        return model.requires_grad_(False).eval()


def contrastive_loss(a: Tensor, b: Tensor, temperature: float = 0.1) -> Tensor:
    """InfoNCE both ways: a, b [N, E] unit vectors, row i of both is the same character."""
    logits = a @ b.T / temperature
    labels = torch.arange(len(a), device=a.device)
    return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2
