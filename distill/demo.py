"""Put a few held-out characters and synthesized recordings into an export, for `student/demo.py` to read.

Recordings of people are left out: their licence asks for more than a folder of weights can keep.
data folder -> folder/characters/<name>/reference_<i>.png, folder/voices/<name>.wav (16-bit mono 16 kHz), demo.json
"""

from __future__ import annotations

import json
import wave
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from distill.data import dataset, motion, puppet, speech
from distill.data.batch import keyed_generator
from distill.data.prepare import draw_references
from student.demo import INDEX
from teacher.audio import SAMPLE_RATE

NAMES = ("ada", "bo", "cleo", "dara", "eli", "fern", "gus", "hana")
TEXTS = {name: f"a {name} person, looking ahead, head straight" for name in ("calm", "happy", "sad", "surprised")}
SPOKEN, HEARD = 3, 2  # recordings of each role
SENTENCES, PAUSE = 4, 0.35  # sentences of a recording, seconds between them


def write_demo(data: Path, folder: Path) -> None:
    """Characters of the test split, and sentences that training never heard."""
    index = {
        "characters": _characters(data, folder),
        "voices": _voices(data.parent / "speech", folder),
        "texts": TEXTS,
        "captions": captions(),
    }
    (folder / INDEX).write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")


def captions() -> dict[str, str | list[str]]:
    """How a caption is made: a form, and for each of its blanks one phrasing of every label."""
    before = {"expression": "", "gaze": "looking ", "pose": "head "}
    blanks = {name: [before[name] + label for label in labels] for name, labels in motion.LABELS.items()}
    return {"form": "a {expression} person, {gaze}, {pose}", **blanks}


def _characters(data: Path, folder: Path) -> dict[str, dict[str, list[str]]]:
    """Three stills of each, as drawn."""
    test = dataset.load(data, "test")
    identity = test.all().identity
    rows = [int((identity == who).nonzero()[0]) for who in identity.unique()[: len(NAMES)]]
    index = {}
    for name, row in zip(NAMES, rows, strict=False):
        how, _ = draw_references(keyed_generator(0, "demo", name))  # [R, P]
        place = folder / "characters" / name
        place.mkdir(parents=True, exist_ok=True)
        pictures = puppet.render(test.characters[row][None], how[None], test.size)[0]  # [R, 3, S, S]
        for number, picture in enumerate(pictures):
            Image.fromarray(picture.permute(1, 2, 0).numpy()).save(place / f"reference_{number}.png", optimize=True)
        files = [f"characters/{name}/reference_{number}.png" for number in range(len(pictures))]
        index[name] = {"references": files}
    return index


def _voices(cache: Path, folder: Path) -> dict[str, dict[str, str]]:
    """Recordings of a few sentences each: what the character says, and what it is told."""
    synthesized = [u for u in speech.corpus(cache) if u.split != "train" and not u.voice.startswith("recorded")]
    (folder / "voices").mkdir(parents=True, exist_ok=True)
    index = {}
    for role, count in (("speak", SPOKEN), ("listen", HEARD)):
        voices: dict[str, list[speech.Utterance]] = {}
        for utterance in (u for u in synthesized if u.role == role):
            voices.setdefault(utterance.voice, []).append(utterance)
        groups = [said[i : i + SENTENCES] for said in voices.values() for i in range(0, len(said), SENTENCES)]
        for number, group in enumerate(groups[:: max(1, len(groups) // count)][:count], 1):
            name = f"{role}-{number}"
            _write_wav(folder / "voices" / f"{name}.wav", _joined([u.wave for u in group]))
            index[name] = {"file": f"voices/{name}.wav", "role": role, "text": " ".join(u.text for u in group)}
    return index


def _joined(waves: list[Tensor]) -> Tensor:
    pause = torch.zeros(round(PAUSE * SAMPLE_RATE))
    return torch.cat([part for wave in waves for part in (wave, pause)])


def _write_wav(path: Path, samples: Tensor) -> None:
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(SAMPLE_RATE)
        file.writeframes((samples.clamp(-1, 1) * 32767).round().short().numpy().astype("<i2").tobytes())
