"""Prepare the puppet world: characters, speech and motion -> latent records on disk, ready to train on.

out/ holds a `datasets` DatasetDict (train, validation, test; split by character and by utterance), codec/ and
fingerprint.json. A second call with the same inputs returns at once; different inputs rebuild; writes are atomic.
One record: latents [T, C, H, W], speak and listen [8 (PAST + T), M], text, refs, state [F], motion [F, P], labels [3].
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from distill.data import motion as motions
from distill.data import puppet, records, sentences, shapes, speech, timeline, voices
from distill.data.batch import keyed_generator
from distill.data.records import Records, concatenate, to_dataset
from distill.data.version import source_hash
from distill.errors import UserError
from teacher import audio, conditions
from teacher import codec as codecs
from teacher.codec import PCACodec
from teacher.conditions import encode_text

SPLITS = ("train", "validation", "test")
REFERENCES = 3
CLIPS_AT_ONCE = 16
CODEC_CLIPS = 160  # train clips that the PCA is fitted on


@dataclass(frozen=True)
class PrepareConfig:
    seed: int = 0
    train_identities: int = 250
    train_clips: int = 4  # per identity, like the next two
    validation_identities: int = 12
    validation_clips: int = 2
    test_identities: int = 32
    test_clips: int = 1
    clip_frames: int = 48
    size: int = 64
    channels: int = 32
    codec: str = ""  # folder of an existing codec; empty fits one on train frames
    mix: tuple[float, ...] = (0.4, 0.25, 0.15, 0.2)  # speak, listen, silence, switching
    held_out_mix: tuple[float, ...] = (0.3, 0.3, 0.25, 0.15)  # validation and test


def prepare(config: PrepareConfig, out: Path, cache: Path | None = None) -> str:
    """Build the data set of `config` in folder `out` unless it is there already; returns its fingerprint.

    `cache` keeps the speech corpus (default: out/../speech). UserError(code 3) when a setting cannot be met.
    """
    out, clock = Path(out), Clock()
    _check(config)
    cache = out.parent / "speech" if cache is None else cache
    inputs = {
        "config": asdict(config),
        "code": code_version(),
        "speech": speech.corpus_fingerprint(cache),
        "codec": PCACodec.load(config.codec).fingerprint() if config.codec else "fitted",
    }
    clock.lap("speech corpus")
    fingerprint = hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()[:16]
    if read_fingerprint(out).get("fingerprint") == fingerprint:
        print(f"data: {out} is up to date ({fingerprint})")
        return fingerprint

    utterances = speech.corpus(cache)
    drafts = {split: draft(config, split, utterances) for split in SPLITS}
    clock.lap("sound and motion")
    codec = PCACodec.load(config.codec) if config.codec else _fit(drafts["train"], config)
    clock.lap("codec")
    tables = {split: _encode_all(drafts[split], codec, config, split) for split in SPLITS}
    clock.lap("render and encode")
    write(tables, codec, out, {"fingerprint": fingerprint, "inputs": inputs, "codec": codec.fingerprint()})
    clock.lap("write")
    print(f"data: {out} ({fingerprint}), " + ", ".join(f"{len(t['index'])} {s}" for s, t in tables.items()) + " clips")
    return fingerprint


def draft(config: PrepareConfig, split: str, utterances: list[speech.Utterance]) -> Records:
    """Everything about the clips of a split but the pictures: waves, state, motion, captions, who, which references."""
    identities, per_identity = getattr(config, f"{split}_identities"), getattr(config, f"{split}_clips")
    first = sum(getattr(config, f"{s}_identities") for s in SPLITS[: SPLITS.index(split)])
    characters = puppet.sample_identities(identities, config.seed, split)  # [I, D]
    said = by_state(utterances, split)
    kinds = _kinds(identities * per_identity, config.mix if split == "train" else config.held_out_mix)
    order = torch.randperm(len(kinds), generator=keyed_generator(config.seed, split, "kinds")).tolist()
    rows = []
    for index in tqdm(range(len(kinds)), desc=f"data: {split} motion", mininterval=2):
        generator = keyed_generator(config.seed, split, index)
        segments = timeline.plan(timeline.KINDS[kinds[order[index]]], config.clip_frames, generator)
        row = perform(segments, said, generator)
        identity = index // per_identity
        stills, present = draw_references(generator)
        rows.append(
            {
                **row,
                "identity": torch.tensor(first + identity),
                "index": torch.tensor(index),
                "character": characters[identity],
                "stills": stills,
                "ref_mask": present,
            }
        )
    return stack(rows)


def perform(
    segments: list[timeline.Segment], said: dict[int, list[speech.Utterance]], generator: torch.Generator
) -> dict[str, Any]:
    """One character acting out a timeline: waves [S], state, driven tracks [F], motion [F, P], labels [3], caption."""
    speak, listen, state = timeline.lay(segments, said, generator)
    chance = np.random.default_rng(int(torch.randint(2**62, (), generator=generator)))
    attributes = motions.sample_attributes(chance)
    motion, driven = motions.drive(speak.numpy(), listen.numpy(), state.numpy(), attributes, chance)
    return {
        "speak_wave": speak,
        "listen_wave": listen,
        "state": state,
        "motion": torch.from_numpy(motion),
        "driven_mouth": torch.from_numpy(driven["mouth"]),
        "driven_nod": torch.from_numpy(driven["nod"]),
        "labels": torch.tensor([attributes.expression, attributes.gaze, attributes.pose]),
        "caption": motions.caption(attributes, chance),
    }


def draw_references(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Motion of the stills [R, P], drawn independently of the clip, and which of them exist [R] (the first always)."""
    low = torch.tensor([0.0, -0.5, -0.6, -0.6, -0.6, -0.7, -0.5, 0.0, -0.8, -0.8])  # order MOTION; eyes stay open
    high = torch.tensor([0.8, 0.5, 0.6, 0.6, 0.6, 0.7, 0.5, 0.0, 0.8, 0.8])
    stills = low + (high - low) * torch.rand(REFERENCES, len(puppet.MOTION), generator=generator)
    count = int(torch.randint(1, REFERENCES + 1, (), generator=generator))
    return stills, torch.arange(REFERENCES) < count


def encode(drafts: Records, codec: PCACodec, frames: Tensor, stills: Tensor, keep_waves: bool) -> Records:
    """The step shared with real video: draft + frames [N, F, 3, S, S] and stills [N, R, 3, S, S] uint8 -> records."""
    text, text_mask = encode_text(drafts["caption"])
    images = codec.encode_image(stills.flatten(0, 1).float() / 255).unflatten(0, stills.shape[:2])  # [N, R, C, H, W]
    present = drafts["ref_mask"]
    result = {
        "latents": codec.encode(frames.float() / 255),
        "speak": audio.log_mel(drafts["speak_wave"]),
        "listen": audio.log_mel(drafts["listen_wave"]),
        "text": text,
        "text_mask": text_mask,
        "refs": images * present[:, :, None, None, None],
        "ref_mask": present,
    }
    kept = ("state", "motion", "driven_mouth", "driven_nod", "labels", "identity", "index", "character", "caption")
    result |= {name: drafts[name] for name in kept}
    if keep_waves:
        waves = ("speak_wave", "listen_wave")
        result |= {name: (drafts[name] * 32767).round().to(torch.int16) for name in waves}
    return result


def write(tables: dict[str, Records], codec: PCACodec, out: Path, facts: dict[str, Any]) -> None:
    """Save tables, codec and fingerprint.json beside `out`, then rename: `out` is either complete or as it was."""
    import datasets  # a second and a half: only those who write pay it

    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}-"))
    pairs = {split: to_dataset(table) for split, table in tables.items()}
    datasets.disable_progress_bars()
    datasets.DatasetDict({split: dataset for split, (dataset, _) in pairs.items()}).save_to_disk(temporary)
    codec.save(temporary / "codec")
    shapes = {split: shape for split, (_, shape) in pairs.items()}
    (temporary / "fingerprint.json").write_text(json.dumps({**facts, "shapes": shapes}, indent=1))
    if out.exists():
        shutil.rmtree(out)
    os.replace(temporary, out)


def read_fingerprint(out: Path) -> dict[str, Any]:
    """fingerprint.json of a data folder, {} when there is none."""
    path = Path(out) / "fingerprint.json"
    return json.loads(path.read_text()) if path.exists() else {}


def code_version() -> str:
    """Hash of the code that decides what a record contains."""
    made_by = (puppet, shapes, motions, sentences, voices, speech, timeline, records, audio, codecs, conditions)
    return source_hash((*made_by, sys.modules[__name__]))


def by_state(utterances: list[speech.Utterance], split: str) -> dict[int, list[speech.Utterance]]:
    """Utterances of a split under the state that they belong to."""
    return {
        state: [u for u in utterances if u.split == split and u.role == role]
        for state, role in ((timeline.SPEAK, "speak"), (timeline.LISTEN, "listen"))
    }


def stack(rows: list[dict[str, Any]]) -> Records:
    """Rows of one clip each -> a table."""
    return {
        name: torch.stack([row[name] for row in rows]) if isinstance(rows[0][name], Tensor) else [r[name] for r in rows]
        for name in rows[0]
    }


class Clock:
    """Prints how long each part took."""

    def __init__(self) -> None:
        self._last = time.perf_counter()

    def lap(self, part: str) -> None:
        now = time.perf_counter()
        print(f"data: {part} {now - self._last:.1f} s", flush=True)
        self._last = now


def _encode_all(drafts: Records, codec: PCACodec, config: PrepareConfig, split: str) -> Records:
    parts = []
    for start in tqdm(range(0, len(drafts["index"]), CLIPS_AT_ONCE), desc=f"data: {split} pictures", mininterval=2):
        part = {name: value[start : start + CLIPS_AT_ONCE] for name, value in drafts.items()}
        frames = puppet.render(part["character"], part["motion"], config.size)
        stills = puppet.render(part["character"], part["stills"], config.size)
        parts.append(encode(part, codec, frames, stills, keep_waves=split != "train"))
    return concatenate(parts)


def _fit(drafts: Records, config: PrepareConfig) -> PCACodec:
    chosen = torch.linspace(0, len(drafts["index"]) - 1, min(CODEC_CLIPS, len(drafts["index"]))).long()
    frames = puppet.render(drafts["character"][chosen], drafts["motion"][chosen], config.size)
    return PCACodec.fit(frames.float() / 255, channels=config.channels)


def _kinds(count: int, mix: tuple[float, ...]) -> list[int]:
    """`count` kinds in proportions as close to `mix` as whole clips allow."""
    edges = (torch.tensor(mix, dtype=torch.float64).cumsum(0) * count).round().long().tolist()
    return [sum(i >= edge for edge in edges[:-1]) for i in range(count)]


def _check(config: PrepareConfig) -> None:
    for name in ("mix", "held_out_mix"):
        shares = getattr(config, name)
        if len(shares) != len(timeline.KINDS) or min(shares) < 0 or abs(sum(shares) - 1) > 1e-6:
            raise UserError(f"data: {name} needs four shares (speak, listen, silence, switching) that sum to 1.", 3)
    if config.clip_frames % 12 or config.size % 8:
        sizes = f"{config.clip_frames} and {config.size}"
        raise UserError(f"data: clip_frames must divide by 12 and size by 8, got {sizes}.", 3)
    if config.codec and not (Path(config.codec) / "codec.safetensors").exists():
        raise UserError(f"data: no codec.safetensors in {config.codec!r}; leave `codec` empty to fit one.", 3)
