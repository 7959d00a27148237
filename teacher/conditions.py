"""What the character is told: speak audio, listen audio, text, reference images; and how each can be dropped.

Audio carries `PAST` latent frames of real past before the first latent frame, so that frame t of a clip hears the
same window whether the clip stands alone or in the middle of a stream. Text features are frozen; at the tiny scale
they are hashed word vectors (word + its bigram, so that "glancing left" differs from "tilted left").
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

PAST = 9  # latent frames of audio before the clip
AUDIO_PER_LATENT = 8  # log-mel features per latent frame
SILENCE = -4.0  # value of a log-mel feature without sound; also what a dropped audio branch hears
TEXT_LENGTH, TEXT_DIM = 16, 64


@dataclass(frozen=True)
class Conditions:
    """One batch of conditions.

    speak, listen [B, 8*(PAST+T), M]; text [B, L, E]; text_mask [B, L] bool; refs [B, R, C, H, W];
    ref_mask [B, R] bool (False = no image there).
    """

    speak: Tensor
    listen: Tensor
    text: Tensor
    text_mask: Tensor
    refs: Tensor
    ref_mask: Tensor

    @property
    def num_frames(self) -> int:
        """Latent frames covered by the audio, the past not counted."""
        return self.speak.shape[1] // AUDIO_PER_LATENT - PAST

    def frames(self, start: int, stop: int) -> Conditions:
        """The conditions of latent frames [start, stop): audio is cut (with its past), the rest is kept."""
        window = slice(AUDIO_PER_LATENT * start, AUDIO_PER_LATENT * (stop + PAST))
        return replace(self, speak=self.speak[:, window], listen=self.listen[:, window])

    def select(self, index: Tensor | slice) -> Conditions:
        """Rows of the batch."""
        return Conditions(**{f.name: getattr(self, f.name)[index] for f in fields(self)})

    def to(self, device: torch.device | str) -> Conditions:
        return Conditions(**{f.name: getattr(self, f.name).to(device) for f in fields(self)})

    def drop(
        self, text: Tensor | bool = False, audio: Tensor | bool = False, refs: Tensor | bool = False
    ) -> Conditions:
        """Drop modalities, for all items (True) or per item ([B] bool): silence, empty text, no references."""
        silence = torch.full_like(self.speak, SILENCE)
        audio_off = _per_item(audio, self.speak)
        return replace(
            self,
            speak=torch.where(audio_off, silence, self.speak),
            listen=torch.where(audio_off, silence, self.listen),
            text_mask=self.text_mask & ~_per_item(text, self.text_mask),
            ref_mask=self.ref_mask & ~_per_item(refs, self.ref_mask),
        )


def encode_text(captions: list[str], length: int = TEXT_LENGTH, dim: int = TEXT_DIM) -> tuple[Tensor, Tensor]:
    """Hashed word features of captions -> (text [B, L, E], mask [B, L]). Longer captions are an error, not cut."""
    text = torch.zeros(len(captions), length, dim)
    mask = torch.zeros(len(captions), length, dtype=torch.bool)
    for row, caption in enumerate(captions):
        words = re.findall(r"[a-z']+", caption.lower())
        if len(words) > length:
            raise ValueError(f"The caption {caption!r} has {len(words)} words, the text encoder takes {length}.")
        previous = ""
        for column, word in enumerate(words):
            text[row, column] = (_hashed(word, dim) + _hashed(f"{previous} {word}", dim)) / 2**0.5
            mask[row, column] = True
            previous = word
    return text, mask


def _hashed(key: str, dim: int) -> Tensor:
    seed = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "little") >> 1
    return torch.randn(dim, generator=torch.Generator().manual_seed(seed))


def _per_item(flag: Tensor | bool, like: Tensor) -> Tensor:
    flag = torch.as_tensor(flag, device=like.device)
    return flag.reshape(-1, *[1] * (like.ndim - 1)) if flag.ndim else flag
