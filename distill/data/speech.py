"""The speech corpus: every utterance the puppet world uses, synthesized or recorded once and kept in a cache folder.

Speak voice: piper (train, validation), recorded prompts of a person where they can be had, else piper (test). Listen
voices: espeak-ng, plus a part of the recorded prompts in test. Scripts are disjoint by role and split.
cache folder -> list of Utterance, waves [S] float32 at 16 kHz, trimmed, RMS 0.1 over voiced parts.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from distill.data import sentences, voices
from distill.data.batch import keyed_generator
from distill.data.version import source_hash
from teacher.audio import SAMPLE_RATE, log_mel

__all__ = ["Utterance", "corpus", "corpus_fingerprint", "log_mel"]

SEED = 0
RMS = 0.1
TRAIN_PITCH = (1.0, 0.94, 1.06)  # each train utterance is also kept slower and lower, faster and higher
RECORDED = 60  # prompts of the recorded voice; one in three is for listening


@dataclass(frozen=True)
class Utterance:
    wave: Tensor  # [S] float32, 16 kHz
    voice: str
    role: str  # "speak" | "listen": whose mouth it is, seen from the character
    split: str  # "train" | "validation" | "test"
    text: str


def corpus(cache: Path) -> list[Utterance]:
    """All utterances; synthesized on the first call (about a minute), read from `cache` afterwards."""
    folder = _built(cache)
    index = json.loads((folder / "index.json").read_text())
    samples = load_file(folder / "samples.safetensors")["samples"]  # [all samples] int16
    return [
        Utterance(samples[row.pop("start") : row.pop("stop")].float() / 32767, **row) for row in index["utterances"]
    ]


def corpus_fingerprint(cache: Path) -> str:
    """Content hash of the samples and the index, building the corpus when it is missing."""
    return json.loads((_built(cache) / "index.json").read_text())["fingerprint"]


def level(wave: Tensor) -> Tensor:
    """Trim silence from both ends (50 ms are kept), scale to RMS 0.1 over the frames that carry sound: [S] -> [S']."""
    size = 320  # 20 ms
    energy = wave[: wave.numel() // size * size].reshape(-1, size).square().mean(1)  # [N]
    loud = energy > energy.max() * 2e-3
    where = loud.nonzero().flatten()
    start, stop = max(0, (int(where[0]) * size) - 800), (int(where[-1]) + 1) * size + 800
    gain = RMS / energy[loud].mean().sqrt()
    return (wave[start:stop] * gain).clamp(-1, 1)


def cache_folder(cache: Path) -> Path:
    """Where the corpus that this code makes belongs; other versions lie beside it."""
    return Path(cache) / f"speech-{source_hash((sentences, voices, sys.modules[__name__]))[:12]}"


def _built(cache: Path) -> Path:
    folder = cache_folder(cache)
    if not (folder / "index.json").exists():
        Path(cache).mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=cache, prefix=".speech-"))
        save(_synthesize(), temporary)
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(temporary, folder)
    return folder


def save(utterances: list[Utterance], folder: Path) -> None:
    """Write samples.safetensors (16-bit) and index.json into an existing folder."""
    samples = torch.cat([(u.wave * 32767).round().to(torch.int16) for u in utterances])
    rows, start = [], 0
    for utterance in utterances:
        stop = start + utterance.wave.numel()
        row = {key: value for key, value in asdict(utterance).items() if key != "wave"}
        rows.append({**row, "start": start, "stop": stop})
        start = stop
    digest = hashlib.sha256(samples.numpy().tobytes() + json.dumps(rows).encode()).hexdigest()[:16]
    save_file({"samples": samples}, folder / "samples.safetensors")
    index = {"fingerprint": digest, "seconds": start / SAMPLE_RATE, "utterances": rows}
    (folder / "index.json").write_text(json.dumps(index, indent=1))


def _synthesize() -> list[Utterance]:
    generator = keyed_generator(SEED, "corpus")

    def uniform(low: float, high: float) -> float:
        return low + (high - low) * torch.rand((), generator=generator).item()

    result: list[Utterance] = []

    def add(wave: Tensor, voice: str, role: str, split: str, text: str) -> None:
        for pitch in TRAIN_PITCH if split == "train" else (1.0,):
            changed = wave if pitch == 1.0 else voices.resample(wave, pitch)
            result.append(Utterance(level(changed), f"{voice}*{pitch}", role, split, text))

    recorded = list(voices.recordings())
    # Evenly spaced over the alphabet, so that neighbors ("digits/1", "digits/2") do not crowd out the rest.
    recorded = [recorded[i * len(recorded) // RECORDED] for i in range(RECORDED)] if len(recorded) >= RECORDED else []
    for i, (name, wave) in enumerate(recorded):
        add(wave, "recorded", "listen" if i % 3 == 2 else "speak", "test", name)

    piper = voices.Piper(SEED)
    scripts = [(s, t) for s in sentences.SPEAK for t in sentences.SPEAK[s] if not (s == "test" and recorded)]
    for split, text in tqdm(scripts, desc="speech: piper", mininterval=2):
        add(piper.say(text, uniform(0.85, 1.2)), "piper", "speak", split, text)

    espeak = voices.Espeak()
    for split, texts in sentences.LISTEN.items():
        for i, text in enumerate(texts):
            for j in range(2):
                name = voices.ESPEAK_VOICES[(i + 2 * j) % len(voices.ESPEAK_VOICES)]
                add(espeak.say(text, name, int(uniform(140, 190)), int(uniform(35, 65))), name, "listen", split, text)
    return result
