"""What stands in front of the whole web demo: its name, its open routes, the size of requests, room for uploads."""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import os
import socket
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from tinyllava_switchkd.serve.images import ImageLimits

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

logger = logging.getLogger(__name__)

OPEN = (
    ("GET", ("/config", "/theme.css", "/favicon.ico", "/robots.txt", "/manifest.json", "/assets/*", "/static/*")),
    ("GET", ("/svelte/*", "/pwa_icon*", "/gradio_api/info", "/gradio_api/startup-events", "/gradio_api/heartbeat/*")),
    ("GET", ("/gradio_api/app_id", "/gradio_api/queue/data", "/gradio_api/upload_progress", "/gradio_api/file=/*")),
    ("POST", ("/gradio_api/upload", "/gradio_api/queue/join", "/gradio_api/run/predict", "/gradio_api/cancel")),
    ("POST", ("/gradio_api/reset",)),
)
"""Gradio's routes that the page uses, by method. A star stands for any further text. All others are closed: among them
are ones that fetch addresses, hand files to ffmpeg or write to the disk."""

BROKEN_OFF_SECONDS = 600.0
"""Age at which a half-written upload is taken for one whose sender is gone."""

BODY_SECONDS = 120.0
"""Time for a request to arrive whole. A sender that goes on for ever would keep room for its upload for ever."""

_UNKNOWN_NAME = "The demo is not known under this name: start it with --allow_host NAME if it should be."
_BLOCK = 4096  # the least that a file takes on a disk
_LOOPBACK = frozenset({"localhost", "127.0.0.1", "::1"})


@dataclass(frozen=True)
class DemoLimits:
    """What one request may cost.

    Attributes:
        image: of an upload.
        question_chars: length of a question.
        max_new_tokens: the most that the page offers, and that any request gets.
        seconds: time for each model's answer.
        upload_bytes: of all uploads that are on the disk, of all visitors together.
    """

    image: ImageLimits = field(default_factory=lambda: ImageLimits(10 * 2**20, 20_000_000, 1600))
    question_chars: int = 4000
    max_new_tokens: int = 1024
    seconds: float = 120.0
    upload_bytes: int = 2**30


class Hosts:
    """The names under which the demo may be asked for.

    A page of another site can let its own name point to this machine (DNS rebinding), and would then read the demo as
    its own. The browser still sends that site's name in ``Host``.

    Args:
        bound: the address that the server listens on.
        more: further names, such as the one of a reverse proxy.
    """

    def __init__(self, bound: str, more: Iterable[str] = ()) -> None:
        bound = bound.strip("[]").lower()
        self.names = {bound, *(name.strip("[]").lower() for name in more)}
        self._any_address = bound in ("0.0.0.0", "::")
        if bound in _LOOPBACK:
            self.names |= _LOOPBACK
        if self._any_address:
            self.names |= _LOOPBACK | {socket.gethostname().lower(), socket.getfqdn().lower()}

    def know(self, header: str) -> bool:
        """Whether a ``Host`` header (a name or an address, perhaps with a port) is one of them."""
        try:
            name = urlsplit(f"//{header}").hostname or ""
            urlsplit(f"//{header}").port  # noqa: B018 (raises where the port is none)
        except ValueError:
            return False
        if any(char in header for char in "/?#@ ,"):
            return False
        return name.rstrip(".") in self.names or (self._any_address and _is_address(name))


def _is_address(name: str) -> bool:
    """Whether a host is written in digits: then no name server was asked, and none was lied to by."""
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


class Room:
    """The disk space that all uploads together may take, those under way included.

    Args:
        folder: where Gradio writes uploads before they have their names.
        files: gives the files that this server has written.
        max_bytes: for all of them; every file counts for a disk block at least.
    """

    def __init__(self, folder: Path, files: Callable[[], Iterable[str]], max_bytes: int) -> None:
        self.folder, self.files, self.max_bytes = folder, files, max_bytes
        self._under_way = 0

    def taken(self) -> int:
        """Bytes of all uploads. Half-written ones whose sender is gone are removed on the way."""
        now, total = time.time(), self._under_way
        for name in self.files():
            total += _size(name)
        for file in self.folder.glob("tmp*") if self.folder.is_dir() else ():
            if now - _changed(file) > BROKEN_OFF_SECONDS:
                file.unlink(missing_ok=True)
            elif self._under_way == 0:  # else it is counted already
                total += _size(file)
        return total

    def enter(self, num_bytes: int) -> bool:
        """Keep room for an upload; False if there is none."""
        if self.taken() + max(num_bytes, _BLOCK) > self.max_bytes:
            return False
        self._under_way += num_bytes
        return True

    def leave(self, num_bytes: int) -> None:
        """An upload has ended, well or not."""
        self._under_way -= num_bytes


def _size(file: str | Path) -> int:
    try:
        return max(os.lstat(file).st_size, _BLOCK)
    except OSError:
        return 0


def _changed(file: Path) -> float:
    try:
        return file.lstat().st_mtime
    except OSError:
        return time.time()


class Gate:
    """ASGI middleware that refuses other hosts, closed routes, large requests and uploads for which there is no room.

    Gradio's own `max_file_size` guards its upload route only; an image may also come inside a JSON body.

    Args:
        app: the application behind.
        max_bytes: of a request's body.
        hosts: names under which the demo is asked for.
        room: for uploads.
        body_seconds: for a request to arrive whole.
    """

    def __init__(
        self, app: ASGIApp, max_bytes: int, hosts: Hosts, room: Room, body_seconds: float = BODY_SECONDS
    ) -> None:
        self.app = app
        self.max_bytes = max_bytes
        self.hosts = hosts
        self.room = room
        self.body_seconds = body_seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":  # a websocket: the page opens none
            await send({"type": "websocket.close", "code": 1008})
            return
        headers: dict[bytes, list[bytes]] = {}
        for name, value in scope.get("headers") or ():
            headers.setdefault(name.lower(), []).append(value)
        refusal = self._refusal(scope, headers)
        if refusal is not None:
            await _answer(send, *refusal)
            return
        is_upload = scope["path"].rstrip("/").endswith("/upload")
        kept = self._declared(headers, self.max_bytes) if is_upload else 0
        if is_upload and not self.room.enter(kept):
            text = f"The uploads of all visitors fill their {self.room.max_bytes / 2**20:.1f} MB: try again later."
            await _answer(send, 507, text)
            return
        received, whole = 0, False
        deadline = time.monotonic() + self.body_seconds

        async def counted() -> Message:
            nonlocal received, whole
            if whole:  # what comes now is that the visitor leaves, whenever that is
                return await receive()
            try:
                message = await asyncio.wait_for(receive(), max(deadline - time.monotonic(), 0))
            except asyncio.TimeoutError:
                return {"type": "http.disconnect"}
            received += len(message.get("body", b""))
            whole = not message.get("more_body", False)
            if received > self.max_bytes:  # a body sent in chunks declares no length
                return {"type": "http.disconnect"}
            return message

        begun = False

        async def noted(message: Message) -> None:
            nonlocal begun
            begun = True
            await send(message)

        try:
            await self.app(scope, counted, noted)
        except Exception as error:  # of a request that no page sends: Gradio does not look at all that it reads
            logger.warning("%s %.200r was not answered (%r).", scope["method"], scope["path"], error)
            if not begun:
                await _answer(send, 400, "This request cannot be answered.")
        finally:
            if is_upload:
                self.room.leave(kept)

    def _refusal(self, scope: Scope, headers: dict[bytes, list[bytes]]) -> tuple[int, str] | None:
        """Status and sentence of why a request is refused."""
        hosts = [value.decode("latin-1") for value in headers.get(b"host", [])]
        if len(hosts) != 1 or not self.hosts.know(hosts[0]):
            return 421, _UNKNOWN_NAME
        # what a proxy was asked for: Gradio makes the page's addresses of it
        asked = [name for value in headers.get(b"x-forwarded-host", []) for name in value.decode("latin-1").split(",")]
        if not all(self.hosts.know(name.strip()) for name in asked):
            return 421, _UNKNOWN_NAME
        origins = [value.decode("latin-1") for value in headers.get(b"origin", [])]
        if scope["method"] not in ("GET", "HEAD") and not all(map(self._is_own, origins)):
            return 403, "Requests from the pages of other sites are not taken."
        if not is_open(scope["method"], scope["path"]):
            return 404, "This is not here."
        if self._declared(headers, 0) > self.max_bytes:
            return 413, f"The request is larger than {self.max_bytes / 2**20:.0f} MB."
        return None

    def _is_own(self, origin: str) -> bool:
        scheme, _, host = origin.partition("://")
        return scheme in ("http", "https") and self.hosts.know(host)

    def _declared(self, headers: dict[bytes, list[bytes]], otherwise: int) -> int:
        """Length of the body as the request declares it; what is no number counts as too much."""
        values = headers.get(b"content-length")
        if not values:
            return otherwise
        return int(values[0]) if len(values) == 1 and values[0].isdigit() else self.max_bytes + 1


def is_open(method: str, path: str) -> bool:
    """Whether the page uses a route."""
    method = "GET" if method in ("HEAD", "OPTIONS") else method
    path = path.rstrip("/")
    if path == "":
        return method == "GET"
    for known, routes in OPEN:
        if method == known:
            for route in routes:
                if path.startswith(route[:-1]) if route.endswith("*") else path == route:
                    return True
    return False


async def _answer(send: Send, status: int, text: str) -> None:
    body = text.encode()
    headers = [(b"content-type", b"text/plain; charset=utf-8"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
