"""Limits in front of the web demo: host names, open routes, request size, disk space for uploads."""

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
"""Gradio's routes that the page uses, by method. A trailing star matches any text. All other routes are closed: some of
them fetch URLs, pass files to ffmpeg or write to the disk."""

BROKEN_OFF_SECONDS = 600.0
"""A half-written upload is considered abandoned after this time without a change."""

BODY_SECONDS = 120.0
"""Time for a request to arrive completely. A sender that never ends would occupy disk space forever."""

_UNKNOWN_NAME = "The demo does not answer under this host name: start it with --allow_host NAME if it should."
_BLOCK = 4096  # the least disk space of a file
_LOOPBACK = frozenset({"localhost", "127.0.0.1", "::1"})


@dataclass(frozen=True)
class DemoLimits:
    """Limits of the demo.

    Attributes:
        image: limits on an upload.
        images: number of images in a conversation.
        question_chars: length of a question.
        max_new_tokens: length of an answer.
        seconds: time for each model's answer.
        upload_bytes: disk space of all visitors' uploads together.
    """

    image: ImageLimits = field(default_factory=lambda: ImageLimits(10 * 2**20, 20_000_000, 1600))
    images: int = 8
    question_chars: int = 4000
    max_new_tokens: int = 1024
    seconds: float = 120.0
    upload_bytes: int = 2**30


class Hosts:
    """The host names under which the demo answers.

    Another site can let its own name resolve to this machine (DNS rebinding); its page could then read the demo as its
    own. The browser still sends that site's name in ``Host``.

    Args:
        bound: the address that the server listens on.
        more: other names, such as a reverse proxy's.
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
        """Whether a ``Host`` header (a name or an address, optionally with a port) is one of them."""
        try:
            name = urlsplit(f"//{header}").hostname or ""
            urlsplit(f"//{header}").port  # noqa: B018 (raises if the port is invalid)
        except ValueError:
            return False
        if any(char in header for char in "/?#@ ,"):
            return False
        return name.rstrip(".") in self.names or (self._any_address and _is_address(name))


def _is_address(name: str) -> bool:
    """Whether a host is an IP address: no name server was asked, so DNS rebinding is impossible."""
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


class Room:
    """Disk space for all uploads together, including those in progress.

    Args:
        folder: where Gradio writes uploads before it gives them their names.
        files: returns the files that this server has written.
        max_bytes: limit on all uploads; every file counts as at least one disk block.
    """

    def __init__(self, folder: Path, files: Callable[[], Iterable[str]], max_bytes: int) -> None:
        self.folder, self.files, self.max_bytes = folder, files, max_bytes
        self._under_way = 0

    def taken(self) -> int:
        """Bytes of all uploads. Deletes abandoned half-written uploads."""
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
        """Reserve space for an upload; False if there is not enough."""
        if self.taken() + max(num_bytes, _BLOCK) > self.max_bytes:
            return False
        self._under_way += num_bytes
        return True

    def leave(self, num_bytes: int) -> None:
        """Release the reservation when an upload has succeeded or failed."""
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
    """ASGI middleware that refuses unknown host names, closed routes, large requests, and uploads without disk space.

    Gradio's `max_file_size` covers only its upload route; an image may also arrive inside a JSON body.

    Args:
        app: the application behind this one.
        max_bytes: limit on a request's body.
        hosts: host names under which the demo answers.
        room: disk space for uploads.
        body_seconds: time for a request to arrive completely.
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
            text = f"All visitors' uploads together fill their {self.room.max_bytes / 2**20:.1f} MB: try again later."
            await _answer(send, 507, text)
            return
        received, whole = 0, False
        deadline = time.monotonic() + self.body_seconds

        async def counted() -> Message:
            nonlocal received, whole
            if whole:  # the next message says that the visitor has left, whenever that is
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
        except Exception as error:  # a request that no page sends: Gradio does not check all of its input
            logger.warning("%s %.200r was not answered (%r).", scope["method"], scope["path"], error)
            if not begun:
                await _answer(send, 400, "This request cannot be answered.")
        finally:
            if is_upload:
                self.room.leave(kept)

    def _refusal(self, scope: Scope, headers: dict[bytes, list[bytes]]) -> tuple[int, str] | None:
        """Status and message if a request is refused, else None."""
        hosts = [value.decode("latin-1") for value in headers.get(b"host", [])]
        if len(hosts) != 1 or not self.hosts.know(hosts[0]):
            return 421, _UNKNOWN_NAME
        # the host that a proxy was asked for: Gradio builds the page's URLs from it
        asked = [name for value in headers.get(b"x-forwarded-host", []) for name in value.decode("latin-1").split(",")]
        if not all(self.hosts.know(name.strip()) for name in asked):
            return 421, _UNKNOWN_NAME
        origins = [value.decode("latin-1") for value in headers.get(b"origin", [])]
        if scope["method"] not in ("GET", "HEAD") and not all(map(self._is_own, origins)):
            return 403, "Requests from pages of other sites are refused."
        if not is_open(scope["method"], scope["path"]):
            return 404, "There is no such page."
        if self._declared(headers, 0) > self.max_bytes:
            return 413, f"The request is larger than {self.max_bytes / 2**20:.0f} MB."
        return None

    def _is_own(self, origin: str) -> bool:
        scheme, _, host = origin.partition("://")
        return scheme in ("http", "https") and self.hosts.know(host)

    def _declared(self, headers: dict[bytes, list[bytes]], otherwise: int) -> int:
        """The declared length of the body; an invalid one counts as too long."""
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
