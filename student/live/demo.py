"""What comes with an export so that it can be tried at once: characters, recordings, and what the text may say.

folder/ demo.json (the index), characters/<name>/reference_<i>.png, voices/<name>.wav
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

INDEX = "demo.json"


@dataclass(frozen=True)
class Demo:
    """characters: name -> files of its reference images; voices: name -> WAV file; captions: the grammar of the text."""

    folder: Path
    characters: dict[str, list[str]]
    voices: dict[str, str]
    captions: dict[str, Any]

    @classmethod
    def read(cls, folder: Path) -> Demo:
        """The index of an export. ValueError when it has none."""
        path = folder / INDEX
        if not path.is_file():
            raise ValueError(f"{folder} comes without characters ({INDEX} is missing): export it again.")
        return cls(folder=folder, **json.loads(path.read_text()))

    def references(self, name: str) -> Tensor:
        """Reference images of a character, float [R, 3, H, W] in [0, 1]."""
        images = [np.asarray(Image.open(self.folder / file).convert("RGB")) for file in self.characters[name]]
        return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 255

    def describe(self) -> dict[str, Any]:
        """For the page: paths relative to the server's root."""
        return {
            "characters": [{"name": name, "image": files[0]} for name, files in self.characters.items()],
            "voices": [{"name": name, "file": file} for name, file in self.voices.items()],
            "captions": self.captions,
        }
