"""All sessions on one compute thread, in turns of one chunk.

Sessions with something to do stand in a ring; the first makes at most one chunk and goes to the end. So while all have
sound, their numbers of chunks differ by at most one, whatever else each of them asks. What a session is told waits in
its own inbox and is applied in order at its turn: the model is touched by this thread alone, and no session can see
another's audio, text or noise.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

log = logging.getLogger("online_lpm.serve")


class Session(Protocol):
    """The part of student.session.Session that is used here."""

    def push(self, speak: Any = None, listen: Any = None) -> None: ...
    def set_text(self, text: str) -> Any: ...
    def interrupt(self) -> float: ...
    def finish(self) -> None: ...
    def next_chunk(self) -> Any: ...


Command = Callable[[Session], Any]


@dataclass(frozen=True)
class Made:
    """A chunk is there: student.session.Chunk."""

    chunk: Any


@dataclass(frozen=True)
class Problem:
    """Something that was asked could not be done; the session goes on."""

    reason: str


@dataclass(frozen=True)
class Refused:
    """The session could not be made as asked."""

    reason: str


@dataclass(frozen=True)
class Finished:
    """The last chunk was made."""


@dataclass(frozen=True)
class Failed:
    """The session is broken and over."""

    error: Exception


Event = Made | Problem | Refused | Finished | Failed


class Job:
    """One session in the ring. `tell` and `close` may be called from any thread; `deliver` is called by the ring's."""

    def __init__(self, ring: Scheduler, make: Callable[[], Session], deliver: Callable[[Event], None]) -> None:
        self.ring, self.make, self.deliver = ring, make, deliver
        self.inbox: deque[Command] = deque()
        self.session: Session | None = None
        self.finishing = self.closed = self.queued = False

    def tell(self, *commands: Command) -> None:
        """Something for the session, to be applied in order at its next turn."""
        self.inbox.extend(commands)
        self.ring.wake(self)

    def finish(self) -> None:
        """No more sound will come; `Finished` follows the last chunk."""

        def last(session: Session) -> None:
            session.finish()
            self.finishing = True

        self.tell(last)

    def close(self) -> None:
        """Forget the session; nothing is delivered any more."""
        self.closed = True
        self.ring.wake(self)  # the ring's thread drops the session's memory


class Scheduler:
    """The ring and its thread. `with Scheduler() as ring: job = ring.open(...)`."""

    def __init__(self) -> None:
        self._ring: deque[Job] = deque()
        self._change = threading.Condition()
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="compute", daemon=True)

    def __enter__(self) -> Scheduler:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        with self._change:
            self._stopping = True
            self._change.notify()
        self._thread.join()

    def open(self, make: Callable[[], Session], deliver: Callable[[Event], None]) -> Job:
        """A new session at the end of the ring; `make` runs on the compute thread at its first turn."""
        job = Job(self, make, deliver)
        self.wake(job)
        return job

    def wake(self, job: Job) -> None:
        with self._change:
            if not job.queued:
                job.queued = True
                self._ring.append(job)
                self._change.notify()

    def _run(self) -> None:
        while True:
            with self._change:
                self._change.wait_for(lambda: self._ring or self._stopping)
                if self._stopping:
                    return
                job = self._ring.popleft()
                job.queued = False
            if self._turn(job):
                self.wake(job)

    def _turn(self, job: Job) -> bool:
        """One turn: apply what was told, make at most one chunk. True when there may be more to make."""
        try:
            return self._advance(job)
        except Exception as error:  # one broken session must not stop the others
            log.exception("A session failed.")
            job.session = None
            if not job.closed:
                job.closed = True
                job.deliver(Failed(error))
            return False

    def _advance(self, job: Job) -> bool:
        if job.closed:
            job.session = None
            job.inbox.clear()
            return False
        if job.session is None:
            try:
                job.session = job.make()
            except ValueError as error:
                job.closed = True
                job.deliver(Refused(str(error)))
                return False
        while job.inbox and not job.closed:
            command = job.inbox.popleft()
            try:
                command(job.session)
            except ValueError as error:  # a text that cannot be encoded and the like
                job.deliver(Problem(str(error)))
        chunk = job.session.next_chunk()
        if job.closed:  # meanwhile; it stands in the ring again
            return False
        if chunk is not None:
            job.deliver(Made(chunk))
            return True
        if job.finishing:
            job.closed, job.session = True, None
            job.deliver(Finished())
        return False
