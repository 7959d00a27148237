"""Wan2.1's weights as a stream of our tensors, one in memory at a time, and a safetensors file that takes a stream.

stream_wan(path, config) -> shapes by name, (name, fp32 tensor) one after the other: those of the file, and newly made
audio parts where it has none, as in a fresh DiT. write_stream(...) -> a plain safetensors file.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from teacher import weights
from teacher.blocks import AudioEncoder
from teacher.conditions import AUDIO_PER_LATENT
from teacher.dit import DiT, DiTConfig
from teacher.naming import foreign, is_audio

Shape = tuple[int, ...]


def stream_wan(path: Path | str, config: DiTConfig) -> tuple[dict[str, Shape], Iterator[tuple[str, Tensor]]]:
    """(shapes of all tensors, the tensors in that order). ValueError before the first when the weights do not fit."""
    stored = weights._read_headers(Path(path))
    with torch.device("meta"):
        model = DiT(config)
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    with_audio = any(map(is_audio, stored.shapes))
    wanted = {name: p for name, p in model.named_parameters() if with_audio or not is_audio(name)}
    weights._check(stored, wanted, config)
    return shapes, _tensors(stored, shapes, wanted.keys(), config)


def _tensors(
    stored: weights._Stored, shapes: dict[str, Shape], known: Iterable[str], config: DiTConfig
) -> Iterator[tuple[str, Tensor]]:
    read, fresh = set(known), _Fresh(config)
    for name in shapes:
        if name in read:
            key = foreign(name, stored.naming)
            with weights._opened(stored.where[key]) as file:
                yield name, weights._owned(file.get_tensor(key), name, config, torch.float32)
        else:
            yield name, fresh.tensor(name)


class _Fresh:
    """Audio parts as they start; one module of them at a time."""

    def __init__(self, config: DiTConfig):
        self.config, self.owner = config, ""
        self.module: nn.Module = nn.Identity()

    def tensor(self, name: str) -> Tensor:
        owner, _, leaf = name.rpartition(".")
        if name.startswith(("speak_embedding.", "listen_embedding.")):
            owner, _, leaf = name.partition(".")
        if owner != self.owner:
            self.owner, self.module = owner, self._make(owner)
        return self.module.get_parameter(leaf).detach()

    def _make(self, owner: str) -> nn.Module:
        c = self.config
        if owner in ("speak_embedding", "listen_embedding"):
            window = c.speak_window if owner == "speak_embedding" else c.listen_window
            return AudioEncoder(c.dim, c.mels, AUDIO_PER_LATENT, c.audio_group, window)
        layer = nn.Linear(c.dim, c.dim)
        if owner.endswith("audio_o"):  # the branch starts silent
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
        return layer


def write_stream(file: Path, shapes: dict[str, Shape], tensors: Iterable[tuple[str, Tensor]]) -> int:
    """Write fp32 tensors of these shapes, in this order, as they come; returns the bytes written."""
    header, end = {}, 0
    for name, shape in shapes.items():
        size = 4 * torch.Size(shape).numel()
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [end, end + size]}
        end += size
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)
    with open(file, "wb") as out:
        out.write(len(head).to_bytes(8, "little") + head)
        for (name, tensor), expected in zip(tensors, shapes, strict=True):
            assert name == expected and tuple(tensor.shape) == shapes[name] and tensor.dtype == torch.float32
            out.write(tensor.contiguous().numpy().data)
    return 8 + len(head) + end
