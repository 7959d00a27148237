"""The messages of the live server as values: reading what a client sends, writing what it gets.

Text messages are JSON objects, sound is int16 at 16 kHz behind a channel number, a chunk of video is a JSON header with
JPEG pictures behind it (docs/SERVING.md). Whatever breaks a rule raises `Refusal`, whose code and reason close the
connection. Nothing here knows sockets.

sound [S] int16 -> (speak [S], listen [S]) float32 in [-1, 1);  frames uint8 [F, H, W, 3] -> one binary message
"""

from __future__ import annotations

import io
import json
from dataclasses import dataclass, fields
from enum import IntEnum
from typing import Any

import numpy as np
from PIL import Image

from teacher.audio import SAMPLE_RATE

PROTOCOL = 1
JPEG_QUALITY = 90
SPEAK, LISTEN, BOTH = 1, 2, 3  # channels of a sound message; BOTH = speak and listen interleaved
REASON_BYTES = 123  # what a close frame can carry


class Close(IntEnum):
    """Why the server ends a connection; the last two digits follow the HTTP status nearest in meaning."""

    FINISHED = 1000
    TOO_LARGE = 1009  # by the WebSocket library, before a message is read whole
    RESTARTING = 1012  # the server stops
    MALFORMED = 4400
    IDLE = 4408
    WRONG_FORMAT = 4415
    FULL = 4429
    TOO_FAST = 4430
    BEHIND = 4431
    TOO_SLOW = 4432
    FAILED = 4500


class Refusal(Exception):
    """Ends one connection: a close code and one sentence."""

    def __init__(self, code: Close, reason: str) -> None:
        super().__init__(reason)
        self.code = code
        self.reason = reason.encode()[:REASON_BYTES].decode(errors="ignore")


@dataclass(frozen=True)
class Start:
    """The first message: who, told what, from which seed, played by which of the server's models."""

    character: str
    text: str = ""
    seed: int = 0
    sample_rate: int = SAMPLE_RATE
    models: tuple[str, ...] = ("a",)


@dataclass(frozen=True)
class Text:
    """What the character is told from now on."""

    text: str


@dataclass(frozen=True)
class Interrupt:
    """Forget the sound that is not yet a chunk."""


@dataclass(frozen=True)
class Finish:
    """No more sound: make what is left, then say goodbye."""


Control = Start | Text | Interrupt | Finish
_CONTROLS: dict[str, type] = {"start": Start, "text": Text, "interrupt": Interrupt, "finish": Finish}
_KINDS = {
    "character": (str, "a string"),
    "text": (str, "a string"),
    "seed": (int, "a whole number"),
    "sample_rate": (int, "a whole number"),
    "models": (list, "a list of names"),
}
TEXT_LENGTH = 200


def parse_control(message: str) -> Control:
    """A text message -> what it asks for; Refusal when it is not exactly one of the documented objects."""
    try:
        told = json.loads(message)
    except (ValueError, RecursionError):
        raise Refusal(Close.MALFORMED, "A text message must be a JSON object.") from None
    kind = told.pop("type", None) if isinstance(told, dict) else None
    control = _CONTROLS.get(kind) if isinstance(kind, str) else None
    if control is None:
        raise Refusal(Close.MALFORMED, f"A text message needs a type, one of {', '.join(_CONTROLS)}.")
    known = {field.name for field in fields(control)}
    for name, value in told.items():
        if name not in known:
            raise Refusal(Close.MALFORMED, f"'{kind}' takes {', '.join(sorted(known)) or 'nothing'}, not '{name}'.")
        wanted, words = _KINDS[name]
        if not isinstance(value, wanted) or isinstance(value, bool):
            raise Refusal(Close.MALFORMED, f"'{name}' must be {words}.")
    return _checked(control, told)


def _checked(control: type, told: dict[str, Any]) -> Control:
    if len(told.get("text", "")) > TEXT_LENGTH:
        raise Refusal(Close.MALFORMED, f"The text is longer than {TEXT_LENGTH} characters.")
    if not 0 <= told.get("seed", 0) < 2**31:
        raise Refusal(Close.MALFORMED, "The seed must lie between 0 and 2147483647.")
    if (rate := told.get("sample_rate", SAMPLE_RATE)) != SAMPLE_RATE:
        raise Refusal(Close.WRONG_FORMAT, f"Sound must come at {SAMPLE_RATE} Hz, not at {rate} Hz: resample it first.")
    if "models" in told:
        names = told["models"]
        if not names or not all(isinstance(name, str) for name in names) or len(set(names)) < len(names):
            raise Refusal(Close.MALFORMED, "'models' must name different models, at least one.")
        told["models"] = tuple(names)
    try:
        return control(**told)
    except TypeError:  # a required field is missing
        missing = "character" if control is Start else "text"
        raise Refusal(Close.MALFORMED, f"'{control.__name__.lower()}' needs '{missing}'.") from None


def parse_audio(message: bytes) -> tuple[np.ndarray, np.ndarray]:
    """A binary message, uint32 channel then int16 samples, both little endian -> speak [S], listen [S] float32."""
    if len(message) < 6:
        raise Refusal(Close.MALFORMED, "A sound message needs 4 bytes of channel and at least one sample.")
    channel = int.from_bytes(message[:4], "little")
    if channel not in (SPEAK, LISTEN, BOTH):
        raise Refusal(Close.WRONG_FORMAT, f"The channel must be 1 (speak), 2 (listen) or 3 (both), not {channel}.")
    if (len(message) - 4) % (4 if channel == BOTH else 2):
        raise Refusal(Close.WRONG_FORMAT, "Sound must be whole int16 samples, in pairs on channel 3.")
    samples = np.frombuffer(message, "<i2", offset=4).astype(np.float32) / 32768.0
    if channel == BOTH:
        return samples[::2], samples[1::2]
    silence = np.zeros_like(samples)
    return (samples, silence) if channel == SPEAK else (silence, samples)


def pack_audio(channel: int, wave: np.ndarray) -> bytes:
    """The inverse, for clients in Python: wave [S] in [-1, 1], or [S, 2] (speak, listen) on channel 3."""
    samples = np.clip(np.round(np.asarray(wave) * 32768.0), -32768, 32767).astype("<i2")
    return channel.to_bytes(4, "little") + samples.tobytes()


def jpeg(frame: np.ndarray) -> bytes:
    """One frame uint8 [H, W, 3]."""
    buffer = io.BytesIO()
    Image.fromarray(frame).save(buffer, "JPEG", quality=JPEG_QUALITY, subsampling=0)
    return buffer.getvalue()


def pack_chunk(header: dict[str, Any], pictures: list[bytes]) -> bytes:
    """uint32 length of the header, the header as JSON with the pictures' sizes, the pictures one after the other."""
    told = json.dumps({**header, "sizes": [len(picture) for picture in pictures]}).encode()
    return b"".join([len(told).to_bytes(4, "little"), told, *pictures])


def has_pictures(message: bytes) -> bool:
    """Whether a chunk carries pictures; without them its header is all there is."""
    return len(message) > 4 + int.from_bytes(message[:4], "little")


def unpack_chunk(message: bytes) -> tuple[dict[str, Any], list[bytes]]:
    """The inverse, for clients in Python."""
    at = 4 + int.from_bytes(message[:4], "little")
    header, pictures = json.loads(message[4:at]), []
    for size in header["sizes"]:
        pictures.append(message[at : at + size])
        at += size
    return header, pictures
