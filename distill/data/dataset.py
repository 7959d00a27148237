"""Prepared data as batches, and conditions for long streams.

load(folder, split) -> LatentDataset; .sample(batch_size, generator) -> Batch with latents [B, T, C, H, W].
stream_case(...) -> Batch without latents whose audio covers PAST + T latent frames of any length.
There is no worker state: what a step sees is a function of the generator that the caller keys by (seed, rank, step).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import torch
from torch import Tensor

from distill.data import puppet, records, speech, timeline
from distill.data.batch import Batch, keyed_generator
from distill.data.prepare import by_state, code_version, perform, read_fingerprint, stack
from distill.data.version import made_by
from distill.errors import UserError
from teacher.audio import log_mel
from teacher.codec import PCACodec
from teacher.conditions import Conditions, encode_text

_CONDITIONS = ("speak", "listen", "text", "text_mask", "refs", "ref_mask")
_TRUTH = ("state", "motion", "driven_mouth", "driven_nod", "labels", "identity", "index")


class LatentDataset:
    """One split in memory: `captions` [N] strings, `characters` [N, D] identity parameters, `size` in pixels."""

    def __init__(self, folder: Path, split: str) -> None:
        facts = _facts(folder)
        self.folder, self.split, self.fingerprint = Path(folder), split, facts["fingerprint"]
        self.made_by = made_by(facts)
        self.size: int = facts["inputs"]["config"]["size"]
        self._shapes = facts["shapes"][split]
        self._arrow = datasets.load_from_disk(str(self.folder / split))
        names = ["latents", *_CONDITIONS, *_TRUTH, "character", "caption"]
        table = records.from_dataset(self._arrow, self._shapes, names)
        self.captions: list[str] = table["caption"]
        self.characters: Tensor = table["character"]
        self._batch = _batch(table, table["latents"])

    def __len__(self) -> int:
        return len(self._batch)

    def sample(self, batch_size: int, generator: torch.Generator) -> Batch:
        """`batch_size` rows drawn with replacement."""
        return self._batch.select(torch.randint(len(self), (batch_size,), generator=generator))

    def all(self) -> Batch:
        """Every row, in order."""
        return self._batch

    def frames(self, index: Tensor) -> Tensor:
        """The original pictures of these rows, drawn again: uint8 [B, F, 3, S, S]."""
        return puppet.render(self.characters[index], self._batch.motion[index], self.size)

    def waves(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """speak, listen [B, S] at 16 kHz of these rows, 1.5 s of past included; validation and test keep them."""
        names = ["speak_wave", "listen_wave"]
        if names[0] not in self._shapes:
            raise ValueError(f"The split {self.split!r} keeps no waves; validation and test do.")
        table = records.from_dataset(self._arrow.select(index.tolist()), self._shapes, names)
        speak, listen = (table[name].float() / 32767 for name in names)
        return speak, listen

    def codec(self) -> PCACodec:
        """The codec that made the latents."""
        return load_codec(self.folder)


def load(folder: Path, split: str = "train") -> LatentDataset:
    """One split of a prepared folder; UserError(code 3) when the folder is missing or from other code."""
    return LatentDataset(Path(folder), split)


def load_codec(folder: Path) -> PCACodec:
    """The codec of a prepared folder."""
    _facts(folder)
    return PCACodec.load(Path(folder) / "codec")


def stream_case(
    folder: Path, characters: int = 4, seconds: float = 60.0, kind: str = "mix", seed: int = 0, split: str = "test"
) -> tuple[Batch, Tensor, Tensor]:
    """Conditions for long streams of characters and speech that training never saw.

    -> (Batch without latents, F = 4 T frames of truth; speak and listen waves [B, S] with 1.5 s of past in front).
    `kind` is "speak", "listen", "silence" or "mix" (turns). The utterances come from the corpus beside the folder.
    Identities and references are those of the first `characters` different characters of the split.
    """
    dataset = load(folder, split)
    people = torch.tensor(_first_rows(dataset.all().identity))[:characters]
    if len(people) < characters:
        raise UserError(f"data: {folder} has {len(people)} characters in {split}, {characters} were asked for.", 3)
    said = by_state(speech.corpus(Path(folder).parent / "speech"), split)
    frames = round(seconds * 2) * 12  # whole chunks of half a second
    rows: list[dict[str, Any]] = []
    for i in range(characters):
        generator = keyed_generator(seed, "stream", kind, split, i)
        rows.append(perform(timeline.plan_stream(kind, frames, generator), said, generator))
    table = stack(rows)
    text, text_mask = encode_text(table["caption"])
    known = dataset.all().select(people)
    speak, listen = table["speak_wave"], table["listen_wave"]
    table |= {
        "speak": log_mel(speak),
        "listen": log_mel(listen),
        "text": text,
        "text_mask": text_mask,
        "refs": known.cond.refs,
        "ref_mask": known.cond.ref_mask,
        "identity": known.identity,
        "index": known.index,
    }
    return _batch(table, None), speak, listen


def _batch(table: records.Records, latents: Tensor | None) -> Batch:
    cond = Conditions(**{name: table[name] for name in _CONDITIONS})
    return Batch(latents=latents, cond=cond, **{name: table[name] for name in _TRUTH})


def _first_rows(identity: Tensor) -> list[int]:
    """The first row of each character, in order of appearance."""
    seen: dict[int, int] = {}
    for row, who in enumerate(identity.tolist()):
        seen.setdefault(who, row)
    return list(seen.values())


def _facts(folder: Path) -> dict[str, Any]:
    facts = read_fingerprint(folder)
    if not facts:
        raise UserError(f"data: {folder} holds no prepared data; run `make data`.", 3)
    if facts["inputs"]["code"] != code_version():
        raise UserError(f"data: {folder} was prepared by another version of the data code; run `make data`.", 3)
    return facts
