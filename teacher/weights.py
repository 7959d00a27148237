"""Model folders: `model.safetensors` + `config.json` (+ the codec beside them). Weights are fp32 masters in memory;
a kept model may be stored in fp16 to save space and comes back as fp32.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from teacher.dit import DiT, DiTConfig, config_from


def save_model(model: DiT, folder: Path | str, dtype: torch.dtype = torch.float32) -> None:
    """Write weights and configuration into `folder`."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.detach().to(dtype).contiguous() for name, tensor in model.state_dict().items()}
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(asdict(model.config), indent=2) + "\n")


def load_config(folder: Path | str) -> DiTConfig:
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise ValueError(f"{folder} holds no model: {path.name} is missing.")
    return config_from(json.loads(path.read_text()))


def load_model(folder: Path | str) -> DiT:
    """Read a model folder as fp32, on the CPU."""
    model = DiT(load_config(folder))
    model.load_state_dict({k: v.float() for k, v in load_file(Path(folder) / "model.safetensors").items()})
    return model
