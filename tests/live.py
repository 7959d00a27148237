"""A live server in a thread, with a model that answers at once: for the tests of the server and of its page.

The pretended session keeps a running mean of what it hears; its pictures show that, the text, the seed and the
references, so that a mix-up of sessions changes pictures.
"""

from __future__ import annotations

import json
import threading
import time
import wave
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from PIL import Image
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import ClientConnection, connect

from student import serve
from student.live.studio import Limits, Shown
from student.live.wire import SPEAK, pack_audio, unpack_chunk

RATE, CHUNK = 16_000, 2_000  # samples per second, per chunk
SECONDS, FRAMES, SIDE = CHUNK / RATE, 3, 16


class PretendedSession:
    """Same surface as student.session.Session."""

    def __init__(self, references: Any, text: str, seed: int, before: Callable[[], None]):
        self.base = float(np.asarray(references).mean())
        self.seed, self.before = seed, before
        self.waiting, self.index, self.memory = np.zeros((2, 0), np.float32), 0, np.zeros(2)
        self.set_text(text)

    def push(self, speak: Any = None, listen: Any = None) -> None:
        self.waiting = np.concatenate([self.waiting, np.stack([speak, listen])], 1)

    def set_text(self, text: str) -> None:
        if len(text.split()) > 16:
            raise ValueError(f"The caption has {len(text.split())} words, the text encoder takes 16.")
        self.text = text

    def interrupt(self) -> float:
        dropped, self.waiting = self.waiting.shape[1], self.waiting[:, :0]
        return dropped / RATE

    def finish(self) -> None:
        missing = -self.waiting.shape[1] % CHUNK
        self.waiting = np.pad(self.waiting, ((0, 0), (0, missing)))

    def next_chunk(self) -> Any:
        if self.waiting.shape[1] < CHUNK:
            return None
        self.before()
        sound, self.waiting = self.waiting[:, :CHUNK], self.waiting[:, CHUNK:]
        level = np.abs(sound).mean(1)
        self.memory = 0.8 * self.memory + level
        frames = np.zeros((FRAMES, SIDE, SIDE, 3), np.uint8)
        told = sum(ord(letter) for letter in self.text) + self.seed
        frames[..., 0] = 255 * np.clip(self.memory[0] + self.base, 0, 1)
        frames[..., 1] = 255 * np.clip(self.memory[1] + (told % 50) / 100, 0, 1)
        frames[:, self.index % SIDE, :, 2] = 255
        state = "speak" if level[0] > 0.01 else "listen" if level[1] > 0.01 else "silence"
        chunk = SimpleNamespace(
            index=self.index,
            start=self.index * SECONDS,
            seconds=SECONDS,
            state=state,
            frames=frames,
            compute_seconds=0.001,
        )
        self.index += 1
        return chunk


class PretendedModel:
    """Makes sessions; `before` runs before each chunk (to be slow, to fail, to count)."""

    def __init__(self, before: Callable[[], None] = lambda: None):
        self.before = before
        self.backbone = SimpleNamespace(stream=SimpleNamespace(chunk_frames=3))

    def stream(self, references: Any, text: str = "", seed: int = 0, look_ahead: int = 1) -> PretendedSession:
        assert look_ahead == 0, "the server works with one thread"
        return PretendedSession(references, text, seed, self.before)


def one(**changes: Any) -> list[Shown]:
    """What a server of one model shows."""
    return [Shown("a", "first", PretendedModel(**changes))]


def tone(seconds: float, hertz: float = 200.0, loud: float = 0.3) -> np.ndarray:
    """A wave [S] at 16 kHz."""
    return (loud * np.sin(2 * np.pi * hertz * np.arange(round(seconds * RATE)) / RATE)).astype(np.float32)


def small_demo(folder: Path, names: tuple[str, ...] = ("ann", "ben"), side: int = SIDE) -> Path:
    """Characters of one color each, and one recording."""
    characters = {}
    for number, name in enumerate(names):
        place = folder / "characters" / name
        place.mkdir(parents=True)
        color = tuple(np.random.default_rng(number).integers(40, 216, 3).tolist())
        Image.new("RGB", (side, side), color).save(place / "reference_0.png")
        characters[name] = {"references": [f"characters/{name}/reference_0.png"]}
    (folder / "voices").mkdir()
    with wave.open(str(folder / "voices" / "hello.wav"), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(RATE)
        file.writeframes((tone(3.0) * 32767).astype("<i2").tobytes())
    captions = {
        "form": "a {expression} person, {gaze}, {pose}",
        "expression": ["neutral", "happy", "sad", "surprised"],
        "gaze": ["looking ahead", "looking left", "looking right"],
        "pose": ["head straight", "head tilted left", "head tilted right"],
    }
    index = {"characters": characters, "texts": {}, "captions": captions}
    index["voices"] = {"hello": {"file": "voices/hello.wav", "role": "speak", "text": "Hello."}}
    (folder / "demo.json").write_text(json.dumps(index))
    return folder


@contextmanager
def running(shown: list[Shown], folder: Path, limits: Limits | None = None) -> Iterator[int]:
    """The port of a server that runs until the block ends.

    Unless `limits` say otherwise no picture is left out: a model that answers at once is chunks ahead of any reader.
    """
    limits = limits or Limits(frames_waiting=Limits.messages_waiting)
    listener = serve.bind("127.0.0.1", 0)
    server = serve.server(serve.application(shown, folder, limits), limits)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        while not server.started:
            time.sleep(0.01)
        yield listener.getsockname()[1]
    finally:
        server.should_exit = True
        thread.join(20)
        listener.close()
        assert not thread.is_alive()


def wait_until(true: Callable[[], bool], seconds: float = 15.0) -> None:
    """Ask until the answer is yes; fails after a while."""
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, "it never came true"
        time.sleep(0.02)


class Client:
    """What a page does, in Python. `chunks` [(header, pictures)] and `said` [JSON] fill while it reads."""

    def __init__(self, port: int, **options: Any):
        self.socket: ClientConnection = connect(
            f"ws://127.0.0.1:{port}/stream", compression=None, max_size=None, **options
        )
        self.chunks: list[tuple[dict[str, Any], list[bytes]]] = []
        self.said: list[dict[str, Any]] = []

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()

    def send(self, message: str | bytes) -> None:
        """Send, even into a connection that the server has just closed: `ended` tells why it did."""
        with suppress(ConnectionClosed):
            self.socket.send(message)

    def tell(self, kind: str, **fields: Any) -> None:
        self.send(json.dumps({"type": kind, **fields}))

    def start(self, character: str = "ann", **fields: Any) -> None:
        self.tell("start", character=character, **fields)
        assert self.read() == "started"

    def push(self, sound: np.ndarray, channel: int = SPEAK) -> None:
        self.send(pack_audio(channel, sound))

    def read(self, timeout: float = 20.0) -> str:
        """One message; its type."""
        message = self.socket.recv(timeout)
        if isinstance(message, str):
            self.said.append(json.loads(message))
            return self.said[-1]["type"]
        self.chunks.append(unpack_chunk(message))
        return "chunk"

    def read_chunks(self, count: int) -> None:
        while len(self.chunks) < count:
            self.read()

    def ended(self, timeout: float = 20.0) -> tuple[int, str]:
        """Read to the end: close code and reason."""
        try:
            while True:
                self.read(timeout)
        except ConnectionClosed as closed:
            assert closed.rcvd is not None, "cut without a word"
            return closed.rcvd.code, closed.rcvd.reason
