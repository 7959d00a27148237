"""One client: what it says goes to its sessions, what they make goes to it, and every rule that ends it.

Nothing grows with a bad client. Sound that waits for computing is bounded by `ahead_seconds` and `backlog_seconds`,
messages that wait for the network by `frames_waiting` (then pictures are left out) and `messages_waiting` (then the
client is dropped). Whoever breaks a rule is closed with a code and a sentence; the others never notice.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections import deque
from collections.abc import Callable
from typing import Any

import numpy as np
from starlette.websockets import WebSocket, WebSocketDisconnect

from student.live.meters import Load, memory_mib
from student.live.scheduler import Command, Event, Failed, Finished, Job, Made, Problem, Refused, Session
from student.live.studio import Part, Studio
from student.live.wire import (
    Close,
    Control,
    Finish,
    Interrupt,
    Refusal,
    Start,
    Text,
    has_pictures,
    jpeg,
    pack_chunk,
    parse_audio,
    parse_control,
)
from teacher.audio import SAMPLE_RATE

log = logging.getLogger("online_lpm.serve")
BROKEN = "The server failed at this session; the others go on."
SLOW = "This client takes the video too slowly."


class Running:
    """One session of a connection: its job, its meters, and how far into the pushed sound it is."""

    def __init__(self, part: Part, open_job: Callable[[Running], Job]) -> None:
        self.part, self.load = part, Load()
        self.dropped = 0  # samples thrown away by interruptions; set by the compute thread
        self.done = 0  # samples that became chunks or were thrown away; set by the compute thread
        self.finished = False
        self.job = open_job(self)

    def interrupt(self, session: Session) -> None:
        """On the compute thread: throw away what is not yet a chunk."""
        dropped = round(session.interrupt() * SAMPLE_RATE)
        self.dropped += dropped
        self.done += dropped


class Connection:
    """The life of one accepted WebSocket, from `start` to the close frame."""

    def __init__(self, socket: WebSocket, studio: Studio) -> None:
        self.socket, self.studio, self.limits = socket, studio, studio.limits
        self.loop = asyncio.get_running_loop()
        self.running: dict[str, Running] = {}
        self.outgoing: deque[str | bytes] = deque()
        self.drawn = self.shown = 0  # chunks with pictures: made (by the compute thread), sent
        self.something = asyncio.Event()  # to send, or to notice
        self.broken: asyncio.Future[None] = self.loop.create_future()
        self.began = 0.0
        self.pushed = 0  # samples
        self.arrivals: deque[tuple[int, float]] = deque()  # (samples pushed by then, when), of sound not yet done
        self.finishing = False

    async def run(self) -> None:
        """Serve until one side ends; the places are given back whatever happens."""
        tasks = [asyncio.ensure_future(self._read()), asyncio.ensure_future(self._write())]
        try:
            await asyncio.wait([self.broken, *tasks], return_when=asyncio.FIRST_COMPLETED)
            await self._close(next(one.exception() for one in (self.broken, *tasks) if one.done()))
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            for one in self.running.values():
                one.job.close()
            self.studio.leave(len(self.running))
            self.broken.cancel() or self.broken.exception()  # retrieved: nobody waits for it any more

    async def _close(self, error: BaseException | None) -> None:
        """Say why it ends; without an error everything was sent."""
        if isinstance(error, WebSocketDisconnect):
            return
        code, reason = Close.FINISHED, "finished"
        if isinstance(error, Refusal):
            code, reason = error.code, error.reason
        elif error is not None:
            log.error("A connection failed.", exc_info=error)
            code, reason = Close.FAILED, BROKEN
        try:  # a client that does not read cannot be told; its transport is cut soon (student/serve.py)
            await asyncio.wait_for(self.socket.close(int(code), reason), self.limits.close_seconds)
        except (asyncio.TimeoutError, RuntimeError, WebSocketDisconnect):
            pass

    # ---- what the client says ---------------------------------------------------------------------------------

    async def _read(self) -> None:
        first = await self._receive(self.limits.start_seconds, "start message")
        told = parse_control(first) if isinstance(first, str) else None
        if not isinstance(told, Start):
            raise Refusal(Close.MALFORMED, "The first message must be of type 'start'.")
        self._start(told)
        while True:
            message = await self._receive(None if self.finishing else self.limits.idle_seconds, "message")
            if self.finishing:
                raise Refusal(Close.MALFORMED, "Nothing may follow 'finish'.")
            if isinstance(message, bytes):
                self._hear(*parse_audio(message))
            else:
                self._obey(parse_control(message))

    async def _receive(self, seconds: float | None, what: str) -> str | bytes:
        try:
            message = await asyncio.wait_for(self.socket.receive(), seconds)
        except asyncio.TimeoutError:
            raise Refusal(Close.IDLE, f"No {what} came for {seconds:g} s.") from None
        if message["type"] == "websocket.disconnect":
            raise WebSocketDisconnect(message.get("code", 1006))
        text = message.get("text")
        return message["bytes"] if text is None else text

    def _start(self, told: Start) -> None:
        parts = self.studio.enter(told)  # takes the places, or refuses
        self.began = time.monotonic()
        self._send(json.dumps({"type": "started", "models": [part.name for part in parts]}))
        for part in parts:
            self.running[part.name] = Running(part, self._open_job)

    def _open_job(self, one: Running) -> Job:
        return self.studio.ring.open(one.part.make, self._deliver(one))

    def _obey(self, told: Control) -> None:
        if isinstance(told, Start):
            raise Refusal(Close.MALFORMED, "This session has started already; open another connection.")
        if isinstance(told, Finish):
            self.finishing = True
            for one in self.running.values():
                one.job.finish()
        elif isinstance(told, Text):
            text = told.text
            self._tell(lambda one: lambda session: session.set_text(text))
        elif isinstance(told, Interrupt):
            self._tell(lambda one: one.interrupt)

    def _hear(self, speak: np.ndarray, listen: np.ndarray) -> None:
        now = time.monotonic()
        self.pushed += len(speak)
        ahead = self.pushed / SAMPLE_RATE - (now - self.began)
        if ahead > self.limits.ahead_seconds:
            reason = f"Sound came {ahead:.1f} s ahead of real time; {self.limits.ahead_seconds:g} s are allowed."
            raise Refusal(Close.TOO_FAST, reason)
        waiting = (self.pushed - self._done()) / SAMPLE_RATE
        if waiting > self.limits.backlog_seconds:
            reason = f"{waiting:.1f} s of sound wait for the server; {self.limits.backlog_seconds:g} s are allowed."
            raise Refusal(Close.BEHIND, reason)
        self.arrivals.append((self.pushed, now))
        self._tell(lambda one: lambda session: session.push(speak=speak, listen=listen))

    def _tell(self, command: Callable[[Running], Command]) -> None:
        for one in self.running.values():
            if len(one.job.inbox) >= self.limits.commands_waiting:
                raise Refusal(Close.TOO_FAST, "Too many small messages: send sound in pieces of 20 ms or more.")
            one.job.tell(command(one))

    def _done(self) -> int:
        return min(one.done for one in self.running.values())

    # ---- what the sessions make -------------------------------------------------------------------------------

    def _deliver(self, one: Running) -> Callable[[Event], None]:
        """What the compute thread calls with every event of a session; the rest happens on the event loop."""

        def deliver(event: Event) -> None:
            made = self._render(one, event.chunk) if isinstance(event, Made) else None
            self.loop.call_soon_threadsafe(self._happened, one, event, made)

        return deliver

    def _render(self, one: Running, chunk: Any) -> tuple[dict[str, Any], list[bytes]]:
        """On the compute thread: header and pictures of a chunk; no pictures for a client that is far behind."""
        frames = np.asarray(chunk.frames)
        ends = (chunk.start, chunk.start + chunk.seconds)
        sound = [round(at * SAMPLE_RATE) + one.dropped for at in ends]
        one.done = sound[1]
        meter = one.part.meter
        crowded = self.drawn - self.shown >= self.limits.frames_waiting
        shown = frames[:0] if crowded else frames
        self.drawn += not crowded
        header = {
            "type": "chunk",
            "model": one.part.name,
            "index": chunk.index,
            "start": chunk.start,
            "seconds": chunk.seconds,
            "state": chunk.state,
            "sound": sound,
            "times": [round(chunk.start + chunk.seconds * i / len(frames), 6) for i in range(len(shown))],
            "dropped_frames": len(frames) - len(shown),
            "compute_seconds": round(chunk.compute_seconds, 6),
            "load": round(one.load.add(chunk.compute_seconds, chunk.seconds), 4),
            "drift": None if meter is None else round(meter.distance(frames), 4),
            "memory_mib": round(memory_mib(), 1),
        }
        return header, [jpeg(frame) for frame in shown]

    def _happened(self, one: Running, event: Event, made: tuple[dict[str, Any], list[bytes]] | None) -> None:
        if made is not None:
            header, pictures = made
            self._send(pack_chunk({**header, "server_seconds": self._waited(header["sound"][1])}, pictures))
        elif isinstance(event, Problem):
            self._send(json.dumps({"type": "problem", "model": one.part.name, "reason": event.reason}))
        elif isinstance(event, Finished):
            one.finished = True
            self._send(json.dumps({"type": "done", "model": one.part.name}))
        elif isinstance(event, Refused):
            self._break(Refusal(Close.MALFORMED, event.reason))
        elif isinstance(event, Failed):
            self._break(Refusal(Close.FAILED, BROKEN))

    def _waited(self, sample: int) -> float:
        """Seconds between the arrival of a sample and now."""
        done = self._done()
        while len(self.arrivals) > 1 and self.arrivals[0][0] < done:
            self.arrivals.popleft()
        when = next((when for count, when in self.arrivals if count >= min(sample, self.pushed)), self.began)
        return round(time.monotonic() - when, 4)

    def _send(self, message: str | bytes) -> None:
        if self.broken.done():
            return
        if len(self.outgoing) >= self.limits.messages_waiting:
            self.outgoing.clear()
            self._break(Refusal(Close.TOO_SLOW, SLOW))
            return
        self.outgoing.append(message)
        self.something.set()

    def _break(self, refusal: Refusal) -> None:
        if not self.broken.done():
            self.broken.set_exception(refusal)

    async def _write(self) -> None:
        """Send what waits; ends when everything of a finished stream has left."""
        while True:
            while self.outgoing:
                message = self.outgoing.popleft()
                try:
                    await asyncio.wait_for(self._put(message), self.limits.send_seconds)
                except asyncio.TimeoutError:
                    raise Refusal(Close.TOO_SLOW, SLOW) from None
            if self.finishing and all(one.finished for one in self.running.values()):
                return
            self.something.clear()
            await self.something.wait()

    async def _put(self, message: str | bytes) -> None:
        if isinstance(message, str):
            await self.socket.send_text(message)
        else:
            await self.socket.send_bytes(message)
            self.shown += has_pictures(message)
