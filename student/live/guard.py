"""Who may talk to the server: the right Host, and for browsers a page of this very server (Origin).

A foreign page can make a visitor's browser connect to 127.0.0.1, and a foreign domain can be pointed at 127.0.0.1 (DNS
rebinding). The first carries its own Origin, the second its own Host; an address in numbers cannot be rebound.
"""

from __future__ import annotations

import ipaddress
import socket
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Receive, Scope, Send


class Guard:
    """ASGI middleware: requests with a foreign Host or Origin get 403 with one sentence."""

    def __init__(self, app: ASGIApp, host: str) -> None:
        self.app = app
        self.names = {"localhost", socket.gethostname().lower(), host.lower()}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] in ("http", "websocket"):
            if reason := self.objection(Headers(scope=scope)):
                await PlainTextResponse(reason + "\n", 403)(scope, receive, send)
                return
        await self.app(scope, receive, send)

    def objection(self, headers: Headers) -> str:
        """Why these headers are refused, empty when they are not."""
        hosts, origins = headers.getlist("host"), headers.getlist("origin")
        if len(hosts) != 1 or not self._is_ours(hosts[0]):
            return "This server is reached by its address, localhost or its own name; the Host header says otherwise."
        if origins and (len(origins) > 1 or urlsplit(origins[0]).netloc.lower() != hosts[0].lower()):
            return "Only the page of this very server may connect; the Origin header says otherwise."
        return ""

    def _is_ours(self, host: str) -> bool:
        try:
            name = urlsplit(f"//{host}").hostname or ""
            urlsplit(f"//{host}").port  # noqa: B018  raises when it is no number
        except ValueError:
            return False
        if name in self.names:
            return True
        try:
            ipaddress.ip_address(name)
        except ValueError:
            return False
        return True
