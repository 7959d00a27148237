"""What the server plays with: the models, the characters and recordings beside the first, the places for sessions.

A place is one session of one model; a comparison takes two. All models of a session get the same character, text, seed
and sound.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from student.demo import read_demo
from student.hearing import LATENT_RATE
from student.live.meters import IdentityMeter
from student.live.scheduler import Scheduler, Session
from student.live.wire import PROTOCOL, Close, Refusal, Start
from teacher.audio import SAMPLE_RATE
from teacher.codec import STRIDE
from teacher.embedder import IdentityEmbedder


@dataclass(frozen=True)
class Limits:
    """What one client may cost, and how many there may be. Seconds of sound or of waiting; messages."""

    sessions: int = 20
    message_bytes: int = 65_536  # about two seconds of sound on one channel
    ahead_seconds: float = 4.0  # sound may come that far ahead of real time
    backlog_seconds: float = 10.0  # sound may wait that long for computing
    commands_waiting: int = 2048  # messages may wait for computing
    frames_waiting: int = 8  # chunks that wait for the network, before pictures are left out
    messages_waiting: int = 40  # and before the client is dropped
    send_seconds: float = 20.0  # one message may take that long to leave
    start_seconds: float = 10.0
    idle_seconds: float = 30.0
    close_seconds: float = 5.0


@dataclass(frozen=True)
class Shown:
    """One model that the server offers. `embedder` None: this export measures no identity."""

    name: str  # "a", "b": what the protocol calls it
    label: str  # what people call it
    model: Any  # an OnlineLPM
    embedder: IdentityEmbedder | None = None

    @property
    def chunk_seconds(self) -> float:
        return self.model.backbone.stream.chunk_frames / LATENT_RATE


@dataclass(frozen=True)
class Part:
    """One session to be: a model, a character, and the meter that knows the character."""

    name: str
    make: Callable[[], Session]
    meter: IdentityMeter | None


class Studio:
    """Models, characters, limits, the compute thread; counts who is in."""

    def __init__(self, shown: list[Shown], folder: Path, ring: Scheduler, limits: Limits | None = None) -> None:
        self.shown = {one.name: one for one in shown}
        self.folder, self.demo = folder, read_demo(folder)
        self.ring, self.limits = ring, limits or Limits()
        self.sessions = 0
        self.connections = 0
        self.references: dict[str, Tensor] = {name: self.demo.references(name) for name in self.demo.characters}
        self._meters: dict[tuple[str, str], IdentityMeter] = {}

    def describe(self) -> dict[str, Any]:
        """What a page needs before it starts."""
        return {
            "protocol": PROTOCOL,
            "sample_rate": SAMPLE_RATE,
            "fps": LATENT_RATE * STRIDE[0],
            "models": [
                {
                    "name": one.name,
                    "label": one.label,
                    "chunk_seconds": one.chunk_seconds,
                    "natural": None if one.embedder is None else round(1 - one.embedder.natural, 4),
                }
                for one in self.shown.values()
            ],
            "limits": {"sessions": self.limits.sessions, "ahead_seconds": self.limits.ahead_seconds},
            "characters": [
                {"name": name, "image": self._address(files[0])} for name, files in self.demo.characters.items()
            ],
            "voices": [
                {"name": name, "file": self._address(voice.file), "role": voice.role, "text": voice.text}
                for name, voice in self.demo.voices.items()
            ],
            "captions": self.demo.captions,
        }

    def _address(self, file: Path) -> str:
        """Where the page finds a file of the export, from the server's root."""
        return file.relative_to(self.folder).as_posix()

    def enter(self, told: Start) -> list[Part]:
        """The sessions of one start message, each with its place taken; Refusal when it cannot be."""
        for name in told.models:
            if name not in self.shown:
                raise Refusal(Close.MALFORMED, f"There is no model '{name}' here, only {', '.join(self.shown)}.")
        if told.character not in self.references:
            raise Refusal(Close.MALFORMED, "There is no character of that name here.")
        if self.sessions + len(told.models) > self.limits.sessions:
            raise Refusal(
                Close.FULL, f"The server is full: {self.sessions} of {self.limits.sessions} places are taken."
            )
        self.sessions += len(told.models)
        return [self._part(self.shown[name], told) for name in told.models]

    def leave(self, places: int) -> None:
        """Give places back."""
        self.sessions -= places

    def _part(self, shown: Shown, told: Start) -> Part:
        references = self.references[told.character]

        def make() -> Session:
            # look_ahead 0: everything happens on the one compute thread, in turns
            return shown.model.stream(references, text=told.text, seed=told.seed, look_ahead=0)

        key = (shown.name, told.character)
        if shown.embedder is not None and key not in self._meters:
            self._meters[key] = IdentityMeter(shown.model.codec, shown.embedder, references)
        return Part(shown.name, make, self._meters.get(key))
