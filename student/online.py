"""Online LPM: backbone, refiner and codec in one folder, ready to stream.

folder/ config.json, backbone.safetensors, refiner.safetensors, codec.safetensors  (+ README.md and manifest.json,
written by the export). No pickle anywhere. A stream of a single step has no refiner.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from student.causal_dit import CausalDiT, StreamConfig
from student.stream import stream
from teacher.codec import PCACodec
from teacher.conditions import Conditions
from teacher.dit import DiT, config_from


class OnlineLPM(nn.Module):
    """The streaming character: `len(steps) - 1` backbone evaluations and one of the refiner per chunk."""

    def __init__(self, backbone: CausalDiT, refiner: CausalDiT | None, codec: PCACodec):
        super().__init__()
        self.backbone, self.refiner, self.codec = backbone, refiner, codec
        self.requires_grad_(False).eval()

    def latents(self, cond: Conditions, generator: torch.Generator) -> Iterator[Tensor]:
        """Latent chunks [B, K, C, H, W] for as long as the conditions' audio lasts."""
        return stream(self.backbone, self.refiner, cond, generator)

    def frames(self, cond: Conditions, generator: torch.Generator) -> Iterator[Tensor]:
        """Video chunks [B, 4K, 3, 8H, 8W] in [0, 1]."""
        for chunk in self.latents(cond, generator):
            yield self.codec.decode(chunk)

    def networks(self) -> dict[str, CausalDiT]:
        """Backbone and, where there is one, refiner, by name."""
        return {"backbone": self.backbone} | ({} if self.refiner is None else {"refiner": self.refiner})

    def save_pretrained(self, folder: Path | str) -> None:
        """Write weights and configuration into `folder`."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        for name, net in self.networks().items():
            save_file({k: v.contiguous() for k, v in net.dit.state_dict().items()}, folder / f"{name}.safetensors")
        self.codec.save(folder)
        config = {"model": asdict(self.backbone.dit.config), "stream": asdict(self.backbone.stream)}
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")

    @classmethod
    def from_pretrained(cls, folder: Path | str) -> OnlineLPM:
        """Read a folder that `save_pretrained` wrote."""
        folder = Path(folder)
        if not (folder / "config.json").is_file():
            raise ValueError(f"{folder} holds no Online LPM: config.json is missing; make one with `make export`.")
        config = json.loads((folder / "config.json").read_text())
        told = StreamConfig(**{**config["stream"], "steps": tuple(config["stream"]["steps"])})
        nets = []
        for name in ("backbone", "refiner")[: 1 + told.refined]:
            dit = DiT(config_from(config["model"]))
            dit.load_state_dict(load_file(folder / f"{name}.safetensors"))
            nets.append(CausalDiT(dit, told))
        return cls(nets[0], nets[1] if told.refined else None, PCACodec.load(folder))
