"""A few characters and recordings that lie in an Online LPM folder, so that it can be tried at once.

folder/demo.json  {"characters": {name: {"references": [file]}}, "voices": {name: {"file", "role", "text"}},
                   "texts": {name: text},
                   "captions": {"form": "a {expression} person, {gaze}", "expression": [words], "gaze": [words]}}
references are images, the global one first; role is "speak" or "listen", seen from the character; texts are captions
in the words that the model was trained with, the plainest first; captions, which may be missing, say how such a text
is made of one choice for each blank of its form.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

INDEX = "demo.json"


@dataclass(frozen=True)
class Voice:
    """A recording; `role` says whether the character speaks or hears it."""

    file: Path
    role: str
    text: str


@dataclass(frozen=True)
class Demo:
    """What a folder offers, all by name: reference images of each character, recordings, texts."""

    characters: dict[str, list[Path]] = field(default_factory=dict)
    voices: dict[str, Voice] = field(default_factory=dict)
    texts: dict[str, str] = field(default_factory=dict)
    captions: dict[str, Any] = field(default_factory=dict)

    def references(self, character: str) -> Tensor:
        """Images of a character, [R, 3, H, W] in [0, 1]. ValueError names those that exist."""
        if character not in self.characters:
            known = ", ".join(self.characters) or "none"
            raise ValueError(f"There is no character '{character}' in the model's folder; there are: {known}.")
        return load_images(self.characters[character])


def read_demo(folder: Path | str) -> Demo:
    """What lies in a folder, empty when it has no demo.json. ValueError when that is damaged."""
    path = Path(folder) / INDEX
    if not path.is_file():
        return Demo()
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
        characters = {
            name: [path.parent / file for file in entry["references"]] for name, entry in told["characters"].items()
        }
        voices = {
            name: Voice(path.parent / entry["file"], entry["role"], entry["text"])
            for name, entry in told["voices"].items()
        }
        texts = {str(name): str(text) for name, text in told["texts"].items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is damaged ({error}): export the model again.") from None
    return Demo(characters, voices, texts, told.get("captions", {}))


def load_images(paths: list[Path]) -> Tensor:
    """Pictures of one size -> [N, 3, H, W] in [0, 1]. ValueError when one cannot be read or differs in size."""
    pictures = []
    for path in paths:
        try:
            with Image.open(path) as picture:
                pictures.append(torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1).float() / 255)
        except (OSError, UnidentifiedImageError) as error:
            raise ValueError(f"{path} cannot be read as an image ({error}).") from None
    if len({picture.shape for picture in pictures}) != 1:
        raise ValueError(f"The reference images {', '.join(str(path) for path in paths)} must be of one size.")
    return torch.stack(pictures)
