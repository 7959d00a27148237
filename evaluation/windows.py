"""What is kept of a long stream: tracks per frame, identity per half second, colors and seams per window.

Streams are looked at window by window and thrown away, so memory does not grow with their length; every measure of
drift is a function of what is kept here. A return of block A has P parts (silence, speak, listen) of A frames in all,
C = A / 12 half seconds. frames of one part [N, F, 3, H, W] uint8 -> `Look` -> Windows [N, R, ...]
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from evaluation.geometry import measure
from evaluation.identity import reference_identity, stills_identity
from evaluation.judge import Judge
from evaluation.quality import LATENT_FRAMES, gradient_energy, mean_color

HALF = 12  # frames over which identity is averaged
TRACKS = ("mouth", "head_x", "head_y", "roll", "gaze_x", "blink", "smile", "brow")
PER_WINDOW = ("color", "sharpness", "border", "inner")  # one value per window, the others one per frame or half second
AT_ONCE = 4  # characters measured together: bounds the memory


@dataclass(frozen=True)
class Windows:
    """N characters, R returns. tracks [N, R, A, 8] in the order of TRACKS; nearest [N, R, A] distance to the nearest
    reference or sink frame; identity [N, R, C, D]; face [N, R, C, E]; color [N, R, P, 3]; sharpness, border, inner
    [N, R, P]: gradient energy, change at chunk borders and at the other borders of latent frames."""

    tracks: Tensor
    nearest: Tensor
    identity: Tensor
    face: Tensor
    color: Tensor
    sharpness: Tensor
    border: Tensor
    inner: Tensor

    def save(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(path.name + ".part")
        save_file({f.name: getattr(self, f.name).float().contiguous() for f in fields(self)}, str(temporary))
        os.replace(temporary, path)

    @classmethod
    def load(cls, path: Path) -> Windows:
        return cls(**load_file(str(path)))

    def select(self, index: Tensor | slice) -> Windows:
        """Some characters."""
        return Windows(**{f.name: getattr(self, f.name)[index] for f in fields(self)})

    def repeated(self, returns: int) -> Windows:
        """The first return, again and again."""
        return Windows(
            **{f.name: torch.cat([getattr(self, f.name)[:, :1]] * returns, 1) for f in fields(self)},
        )


def joined(parts: Sequence[Windows]) -> Windows:
    """Groups of characters -> one."""
    return Windows(**{f.name: torch.cat([getattr(part, f.name) for part in parts]) for f in fields(Windows)})


@dataclass(frozen=True)
class Anchor:
    """Who the characters are: identity [N, D] and face [N, E] of their references, as measured."""

    identity: Tensor
    face: Tensor


@torch.no_grad()
def anchor_of(stills: Tensor, mask: Tensor, judge: Judge) -> Anchor:
    """Reference images [N, R, 3, H, W] in [0, 1], mask [N, R] bool."""
    face = reference_identity(judge(stills), mask)
    return Anchor(stills_identity(stills, mask), face)


class Look:
    """Measures the windows of a group of characters as they come."""

    def __init__(self, judge: Judge, stills: Tensor, mask: Tensor, chunk_frames: int):
        """stills, mask: the references; chunk_frames: video frames between two seams of the stream."""
        self.judge, self.chunk_frames = judge, chunk_frames
        self.pool, self.present = stills.flatten(2), mask
        self.parts: list[dict[str, Tensor]] = []

    def sink(self, frames: Tensor) -> None:
        """The first chunk [N, F, 3, H, W] uint8 of the streams: later frames may copy it."""
        pool = as_float(frames).flatten(2)
        self.pool = torch.cat([self.pool, pool], 1)
        self.present = torch.cat([self.present, torch.ones(pool.shape[:2], dtype=torch.bool)], 1)

    def window(self, start: int, frames: Tensor) -> None:
        """One part [N, F, 3, H, W] uint8, whose first frame is number `start` of the stream."""
        groups = zip(frames.split(AT_ONCE), self.pool.split(AT_ONCE), self.present.split(AT_ONCE), strict=True)
        found = [self._measure(start, as_float(part), pool, there) for part, pool, there in groups]
        self.parts.append({name: torch.cat([each[name] for each in found]) for name in found[0]})

    def windows(self, parts: int) -> Windows:
        """Everything seen so far, `parts` windows per return."""
        returns = [self.parts[i : i + parts] for i in range(0, len(self.parts) // parts * parts, parts)]
        made: dict[str, Tensor] = {}
        for name in (f.name for f in fields(Windows)):
            join = torch.stack if name in PER_WINDOW else torch.cat
            made[name] = torch.stack([join([part[name] for part in one], 1) for one in returns], 1)
        return Windows(**made)

    @torch.no_grad()
    def _measure(self, start: int, frames: Tensor, pool: Tensor, present: Tensor) -> dict[str, Tensor]:
        tracks = measure(frames)
        gap = torch.cdist(frames.flatten(2), pool) / frames[0, 0].numel() ** 0.5  # [N, F, pool]
        border, inner = border_changes(frames, start, self.chunk_frames)
        return {
            "tracks": torch.stack([getattr(tracks, name) for name in TRACKS], -1),
            "nearest": gap.masked_fill(~present[:, None], torch.inf).amin(2),
            "identity": tracks.identity.unflatten(1, (-1, HALF)).mean(2),
            "face": self.judge(frames).unflatten(1, (-1, HALF)).mean(2),
            "color": mean_color(frames).mean(1),
            "sharpness": gradient_energy(frames),
            "border": border,
            "inner": inner,
        }


def border_changes(frames: Tensor, start: int, chunk_frames: int) -> tuple[Tensor, Tensor]:
    """Mean absolute change [N] at chunk borders inside the window, and at the other borders of latent frames."""
    times = torch.arange(1, frames.shape[1])
    change = (frames[:, 1:] - frames[:, :-1]).abs().double().mean((2, 3, 4))  # [N, F - 1]
    at_chunk = (start + times) % chunk_frames == 0
    at_latent = (start + times) % LATENT_FRAMES == 0
    return change[:, at_chunk].mean(1), change[:, at_latent & ~at_chunk].mean(1)


def as_float(frames: Tensor) -> Tensor:
    """uint8 -> float in [0, 1]."""
    return frames.float() / 255
