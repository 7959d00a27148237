"""The live server: one page and one WebSocket, on which sound goes in and a talking, listening character comes out.

WebSocket /stream (docs/SERVING.md has every field; student/live/wire.py reads and writes them):
  -> {"type": "start", "character": "ann", "text": "happy", "seed": 0, "sample_rate": 16000, "models": ["a", "b"]}
  -> binary: uint32 channel (1 speak, 2 listen, 3 both interleaved), int16 samples at 16 kHz; little endian
  -> {"type": "text", "text": "sad"}   {"type": "interrupt"}   {"type": "finish"}
  <- {"type": "started"}   {"type": "problem", "reason"}   {"type": "done", "model"}
  <- binary: uint32 length, JSON header {"type": "chunk", "model", "index", "start", "seconds", "state", "sound",
     "times", "sizes", "drift", "load", "server_seconds", "memory_mib", ...}, then one JPEG per frame
  every end has a close code and a sentence (wire.Close)
GET / the page, /about what can be played, /characters/... and /voices/... the files of the export.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import socket
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import FileResponse
from fastapi.staticfiles import StaticFiles
from starlette.types import ASGIApp
from starlette.websockets import WebSocket
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol

from student.demo import read_demo
from student.live.connection import Connection
from student.live.guard import Guard
from student.live.scheduler import Scheduler
from student.live.studio import Limits, Shown, Studio
from student.live.wire import Close
from student.online import OnlineLPM
from teacher.embedder import IdentityEmbedder

PAGE = Path(__file__).parent / "live" / "page"
CUT_SECONDS = 10.0  # after its end, a connection that the client does not close is cut
POLICY = (  # the WebSocket is named because not every browser counts it to 'self'
    "default-src 'self'; connect-src 'self' ws://{host} wss://{host}; img-src 'self' blob:; "
    "frame-ancestors 'none'; base-uri 'none'"
)
HEADERS = [
    ("X-Content-Type-Options", "nosniff"),
    ("Referrer-Policy", "no-referrer"),
    ("Cache-Control", "no-cache"),
    ("Permissions-Policy", "camera=(), geolocation=(), microphone=(self)"),
]


class CutOff(WebSocketsSansIOProtocol):
    """A client that stops reading would keep its last messages in memory for as long as it likes: cut it off."""

    async def run_asgi(self) -> None:
        await super().run_asgi()
        self.loop.call_later(CUT_SECONDS, self.transport.abort)


def load(folders: list[Path]) -> list[Shown]:
    """Online LPM folders -> the models "a", "b"; the characters are those of the first. ValueError: what is missing."""
    shown = []
    for name, folder in zip("ab", folders, strict=False):
        embedder = IdentityEmbedder.load(folder) if (folder / "embedder.json").is_file() else None
        shown.append(Shown(name, label(folder), OnlineLPM.from_pretrained(folder), embedder))
    if not read_demo(folders[0]).characters:
        raise ValueError(f"{folders[0]} comes without characters (demo.json): make it again with `make export`.")
    return shown


def label(folder: Path) -> str:
    """What people call a folder: runs/tiny/online-lpm -> tiny, for the last part is the same for all."""
    folder = folder.resolve()
    return folder.parent.name if folder.name == "online-lpm" else folder.name


def application(shown: list[Shown], folder: Path, limits: Limits | None = None, host: str = "127.0.0.1") -> ASGIApp:
    """The server as an ASGI application, with the characters of `folder`; the compute thread lives while it runs."""

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        with Scheduler() as ring:
            app.state.studio = Studio(shown, folder, ring, limits)
            yield

    app = FastAPI(lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)

    @app.get("/")
    def page(request: Request) -> FileResponse:
        policy = POLICY.format(host=request.headers["host"])  # checked by the guard
        return FileResponse(PAGE / "index.html", headers={"Content-Security-Policy": policy})

    @app.get("/about")
    def about() -> dict[str, Any]:
        return app.state.studio.describe()

    @app.websocket("/stream")
    async def stream(connection: WebSocket) -> None:
        studio: Studio = app.state.studio
        await connection.accept()
        if studio.connections >= 2 * studio.limits.sessions:
            await connection.close(int(Close.FULL), "The server is full: too many connections are open.")
            return
        studio.connections += 1
        try:
            await Connection(connection, studio).run()
        finally:
            studio.connections -= 1

    app.mount("/page", StaticFiles(directory=PAGE))
    for kind in ("characters", "voices"):
        app.mount(f"/{kind}", StaticFiles(directory=folder / kind, check_dir=False))
    return Guard(app, host)


def bind(host: str, port: int) -> socket.socket:
    """A listening socket; ValueError with one sentence when the address cannot be had."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
            listener.listen()
        except BaseException:
            listener.close()
            raise
    except (OSError, OverflowError) as error:
        taken = isinstance(error, OSError) and error.errno == errno.EADDRINUSE
        why = f"Port {port} of {host} is taken" if taken else f"Port {port} of {host} cannot be used ({error})"
        raise ValueError(f"{why}: give another one with PORT=.") from None
    return listener


def server(app: ASGIApp, limits: Limits | None = None) -> uvicorn.Server:
    """The uvicorn server of an application; `run(sockets=[bind(...)])` starts it."""
    config = uvicorn.Config(
        app,
        ws=CutOff,
        ws_max_size=(limits or Limits()).message_bytes,
        ws_per_message_deflate=False,  # pictures and sound do not shrink, and nothing can blow up when unpacked
        headers=HEADERS,
        server_header=False,
        log_level=logging.WARNING,
        timeout_graceful_shutdown=3,
    )
    return uvicorn.Server(config)


def serve(folders: list[Path], listener: socket.socket, host: str = "127.0.0.1") -> None:
    """Serve one or two Online LPM folders until ctrl-C. ValueError, one sentence, when one of them is not whole."""
    with contextlib.closing(listener):
        port = listener.getsockname()[1]
        app = application(load(folders), folders[0], host=host)
        address = f"[{host}]" if ":" in host else host
        print(f"Online LPM is at http://{address}:{port} (ctrl-C ends it)", flush=True)
        with contextlib.suppress(KeyboardInterrupt):  # uvicorn has ended everything in order by then
            server(app).run(sockets=[listener])
