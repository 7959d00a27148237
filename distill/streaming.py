"""`make stream`: recordings in, a film of the character out, chunk by chunk; memory stays the same at any length.

AUDIO (what the character says), LISTEN (what it hears), CHARACTER, TEXT, MODEL  ->  OUT, an mp4 with both voices
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from itertools import zip_longest
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import pad

from distill.errors import ExitCode, UserError
from distill.options import Options
from distill.runs import run_folder
from distill.tracking import progress
from evaluation.film import Film, open_film
from evaluation.sound import read_audio, seconds_of
from evaluation.video import enlarge
from student.demo import Demo, read_demo
from student.online import OnlineLPM
from student.session import Chunk, Session

BLOCK = 4000  # samples pushed at once
SIDE = 384  # pixels of a film's height, at least
Pieces = Iterator[tuple[Tensor, Tensor]]  # speak and listen, of one length


def stream(options: Options) -> str:
    """Play recordings to a character and film it."""
    own = options.own
    folder = Path(own["model"]) if own["model"] else run_folder(options.run) / "online-lpm"
    model = load(folder)
    try:
        demo = read_demo(folder)
        character = own["character"] or next(iter(demo.characters), "")
        references = demo.references(character)
        session = model.stream(
            references, demo.texts.get(own["text"]) or own["text"] or next(iter(demo.texts.values()), "")
        )
    except ValueError as error:
        raise UserError(str(error)) from None
    given = [_recording(own[name], demo) for name in ("audio", "listen")]
    if given == [None, None]:
        voices = ", ".join(demo.voices) or "none"
        raise UserError(
            f"There is nothing to play: give AUDIO=file or LISTEN=file, or a recording of the model: {voices}."
        )
    name = "-".join([character, *(path.stem for path in given if path)])
    target = Path(own["out"]) if own["out"] else run_folder(options.run) / "streams" / f"{name}.mp4"
    lengths = [seconds_of(path) for path in given if path]
    known = [length for length in lengths if length is not None]
    total = math.ceil(max(known) / session.chunk_seconds) if len(known) == len(lengths) else None
    pace = _film(session, _pieces(given[0], given[1]), target, (references.shape[2], references.shape[3]), total)
    return f"Wrote {target} ({pace}); next: open it in a player, or make latency."


def load(folder: Path) -> OnlineLPM:
    """The Online LPM of a folder; UserError when there is none or it cannot be read."""
    if not folder.is_dir():
        raise UserError(f"There is no Online LPM at {folder}: run `make export`, or give MODEL=folder.")
    try:
        return OnlineLPM.from_pretrained(folder)
    except ValueError as error:
        raise UserError(str(error), ExitCode.CHECKPOINT) from None


def _recording(given: str, demo: Demo) -> Path | None:
    """A file, or a recording of the model's folder by its name."""
    if not given:
        return None
    return demo.voices[given].file if given in demo.voices and not Path(given).exists() else Path(given)


def _pieces(speak: Path | None, listen: Path | None) -> Pieces:
    """Both recordings side by side in blocks of equal length, the shorter one followed by silence."""
    blocks = [_blocks(read_audio(path)) if path else iter(()) for path in (speak, listen)]
    for said, heard in zip_longest(*blocks, fillvalue=torch.zeros(0)):
        length = max(len(said), len(heard))
        yield pad(said, (0, length - len(said))), pad(heard, (0, length - len(heard)))


def _blocks(pieces: Iterator[Tensor]) -> Iterator[Tensor]:
    """The same samples in blocks of `BLOCK`, the last one shorter."""
    waiting = torch.zeros(0)
    for piece in pieces:
        waiting = torch.cat([waiting, piece])
        while len(waiting) >= BLOCK:
            yield waiting[:BLOCK]
            waiting = waiting[BLOCK:]
    if len(waiting):
        yield waiting


def _film(session: Session, pieces: Pieces, target: Path, size: tuple[int, int], total: int | None) -> str:
    """Film the session in pictures of `size`; returns how long the film is and how fast it was made."""
    began, seconds, computed, scale = time.perf_counter(), 0.0, 0.0, max(1, round(SIDE / size[0]))

    def pace() -> str:
        return f"{seconds / max(time.perf_counter() - began, 1e-9):.1f}x real time"

    try:
        with open_film(target, size[0] * scale, size[1] * scale) as film:
            for chunk in progress(_chunks(session, pieces, film), "stream", total, pace):
                film.show(enlarge(chunk.frames.permute(0, 3, 1, 2), scale))
                seconds += chunk.seconds
                computed += chunk.compute_seconds
    except ValueError as error:
        raise UserError(str(error), ExitCode.DATA) from None
    return f"{seconds:.1f} s of video, {pace()}, the model alone {seconds / computed:.1f}x"


def _chunks(session: Session, pieces: Pieces, film: Film) -> Iterator[Chunk]:
    """Chunks as their audio comes; the film gets the sound of both."""
    for said, heard in pieces:
        session.push(speak=said, listen=heard)
        film.sound(said + heard)
        yield from session
    session.finish()
    yield from session
