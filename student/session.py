"""A live stream of one character: audio goes in piece by piece, chunks of video come out, without end.

The numbers are those of `stream` over the whole audio; here audio arrives in any pieces, the text may change at chunk
borders, and what was made ahead can be thrown away. All that a chunk leaves behind is immutable (caches, kept audio):
a session is a handful of references that move on when a chunk is delivered. Noise is keyed by (seed, chunk number,
part), so no chunk depends on how audio was cut, on other sessions, or on chunks that were thrown away.

push(speak [S], listen [S])  ->  Chunk(frames uint8 [F, H, W, 3], ...)
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from student import session_file
from student.hearing import LATENT_RATE, Heard, Waiting, paired, state_of, whole_frames
from student.promise import Cache
from student.stream import draft_chunk, refine_chunk
from teacher.audio import SAMPLE_RATE
from teacher.conditions import Conditions, encode_text
from teacher.randomness import keyed_generator

if TYPE_CHECKING:
    from student.online import OnlineLPM


@dataclass(frozen=True)
class Chunk:
    """One chunk as it is shown; start and seconds are video time since the stream began."""

    index: int
    start: float
    seconds: float
    state: str  # "speak" | "listen" | "silence", from the audio
    frames: Tensor  # uint8 [F, H, W, 3]
    compute_seconds: float


@dataclass(frozen=True)
class Draft:
    """A chunk between backbone and refiner, with what will hold once it is delivered."""

    told: Conditions
    x0: Tensor  # [1, K, C, H, W]
    cache: Cache  # the backbone's
    heard: Heard
    seconds: float


class Session:
    """Made by `OnlineLPM.stream`. One thread at a time; different sessions may run in different threads.

    With look_ahead = 1 the backbone works on the next chunk, if its audio is there, in a thread of its own while this
    one is refined and decoded; with 0 everything happens in the caller's thread. The frames are the same.
    """

    def __init__(self, model: OnlineLPM, refs: Tensor, text: str = "", seed: int = 0, look_ahead: int = 1):
        """refs: latents of the reference images [R, C, H, W]."""
        if look_ahead not in (0, 1):
            raise ValueError(f"look_ahead must be 0 or 1, not {look_ahead}.")
        self.model, self.refs, self.seed, self.look_ahead = model, refs, seed, look_ahead
        self.index = 0  # number of the next chunk to deliver
        self.texts = [(0, text)]  # (number of the first chunk, text); the first entry holds for the next chunk
        self.heard = Heard.nothing(model.backbone.dit.config.mels)  # like the caches: as of the last delivered chunk
        self.waiting = Waiting()
        told = self.told(self.heard.features, text)
        self._backbone = model.backbone.streaming()
        self._refiner = None if model.refiner is None else model.refiner.streaming()
        self.draft_cache: Cache = self._backbone.start(told)
        self.final_cache: Cache | None = None if self._refiner is None else self._refiner.start(told)
        self._drafts: dict[int, Future[Draft]] = {}  # made ahead, by number: one, or two while a chunk is refined
        self._worker: ThreadPoolExecutor | None = None

    # ---- what goes in -----------------------------------------------------------------------------------------

    def push(self, speak: Any = None, listen: Any = None) -> None:
        """Add audio [S], float at 16 kHz, of any length; the missing one is silence. ValueError if it is not that.

        Memory grows only with audio that is pushed and not yet played.
        """
        self.waiting.push(paired(speak, listen))

    def set_text(self, text: str) -> int:
        """Change the text from the next chunk on that is not yet made, and return that chunk's number.

        ValueError when the text is longer than the encoder takes.
        """
        self._encoded(text)
        first = max(self._drafts, default=self.index - 1) + 1
        self.texts = [entry for entry in self.texts if entry[0] < first] + [(first, text)]
        return first

    def interrupt(self) -> float:
        """Drop the audio that was not yet played, and the chunk made ahead; return the seconds of audio dropped.

        The character goes on from the last chunk delivered. The newest text holds from the next one.
        """
        dropped, self.waiting = self.waiting.length, Waiting()
        for draft in self._drafts.values():
            draft.cancel()  # one that is being made already ends unused
        self._drafts = {}
        self.texts = [(self.index, self.texts[-1][1])]
        return dropped / SAMPLE_RATE

    def finish(self) -> None:
        """Fill the last chunk up with silence, so that all audio pushed so far is played."""
        chunks = self.ready
        if self.waiting.length > self.heard.missing(chunks * self._size):
            rest = self.heard.missing((chunks + 1) * self._size) - self.waiting.length
            self.waiting.push(torch.zeros(2, rest))

    # ---- what comes out ---------------------------------------------------------------------------------------

    @property
    def chunk_seconds(self) -> float:
        """Length of a chunk."""
        return self._size / LATENT_RATE

    @property
    def ready(self) -> int:
        """Whole chunks of audio that wait to be played."""
        return whole_frames(self.heard, self.waiting.length) // self._size

    def __iter__(self) -> Iterator[Chunk]:
        """Chunks for as long as whole chunks of audio are there. Push more and iterate again."""
        while (chunk := self.next_chunk()) is not None:
            yield chunk

    def next_chunk(self) -> Chunk | None:
        """The next chunk, or None while its audio is not there."""
        ready = self.ready
        if not ready:
            return None
        samples = self.waiting.look(0, self.heard.missing(self._size))
        known = self._drafts.get(self.index)
        if known is None:
            draft = self._draft(self.index, self._text(self.index), self.heard, samples, self.draft_cache)
        else:
            draft = known.result()
        if self.look_ahead and ready > 1 and self.index + 1 not in self._drafts:
            start = samples.shape[1]
            following = self.waiting.look(start, start + draft.heard.missing(self._size))
            text = self._text(self.index + 1)
            self._drafts[self.index + 1] = self._submit(self.index + 1, text, draft.heard, following, draft.cache)
        began = time.perf_counter()
        x0, final_cache = draft.x0, self.final_cache
        if self._refiner is not None and final_cache is not None:
            generator = keyed_generator(self.seed, self.index, "refine")
            x0, final_cache = refine_chunk(self._refiner, draft.told, final_cache, x0, generator)
        frames = self.model.pictures(x0)[0]
        seconds = draft.seconds + time.perf_counter() - began
        chunk = Chunk(
            self.index, self.index * self.chunk_seconds, self.chunk_seconds, state_of(samples), frames, seconds
        )
        self._deliver(draft, final_cache, samples.shape[1])
        return chunk

    def save(self, folder: Path | str) -> Path:
        """Write the session into `folder`, to go on with `OnlineLPM.resume`; what was made ahead is made again."""
        return session_file.save(self, Path(folder))

    # ---- pieces -----------------------------------------------------------------------------------------------

    @property
    def _size(self) -> int:
        return self.model.backbone.stream.chunk_frames

    def _submit(self, *order: Any) -> Future[Draft]:
        if self._worker is None:
            self._worker = ThreadPoolExecutor(1, "backbone")
        return self._worker.submit(self._draft, *order)

    @torch.no_grad()
    def _draft(self, index: int, text: str, heard: Heard, samples: Tensor, cache: Cache) -> Draft:
        """The backbone's part of chunk `index`; nothing of the session is read that could change meanwhile."""
        began = time.perf_counter()
        features, heard = heard.listen(samples, self._size)
        told = self.told(features, text)
        generator = keyed_generator(self.seed, index, "draft")
        x0, cache = draft_chunk(self._backbone, told, cache, generator, alone=self._refiner is None)
        return Draft(told, x0, cache, heard, time.perf_counter() - began)

    def _deliver(self, draft: Draft, final_cache: Cache | None, samples: int) -> None:
        """Move on by one chunk. Nothing moves before: after a failure the same chunk can be asked for again."""
        self.draft_cache, self.final_cache, self.heard = draft.cache, final_cache, draft.heard
        self.waiting.drop(samples)
        self._drafts.pop(self.index, None)
        self.index += 1
        later = [entry for entry in self.texts if entry[0] > self.index]
        self.texts = [(self.index, self._text(self.index)), *later]

    def _text(self, index: int) -> str:
        return next(text for first, text in reversed(self.texts) if first <= index)

    def _encoded(self, text: str) -> tuple[Tensor, Tensor]:
        return _encoded(text, self.model.backbone.dit.config.text_dim)

    def told(self, features: Tensor, text: str) -> Conditions:
        """The conditions of a chunk with features [2, A, M] under `text`."""
        refs = self.refs[None]
        mask = torch.ones(refs.shape[:2], dtype=torch.bool)
        return Conditions(features[None, 0], features[None, 1], *self._encoded(text), refs, mask).to(refs.device)


@lru_cache(maxsize=64)
def _encoded(text: str, dim: int) -> tuple[Tensor, Tensor]:
    return encode_text([text], dim=dim)
