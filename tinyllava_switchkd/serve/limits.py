"""What stands in front of the whole web demo: a limit on the size of requests, and routes that are closed."""

from __future__ import annotations

from typing import Any

CLOSED = (
    "process_recording",  # hands what a client sends to ffmpeg
    "deep_link",  # writes a session to the disk
    "component_server",
    "proxy=",
    "stream/",
    "custom_component/",
    "dev/",
    "vibe-",
    "undo-vibe-",
    "call/",
    "api/",
)
"""Routes of Gradio's that the page does not use, without their prefix."""


class Gate:
    """ASGI middleware that refuses requests whose body is too large, whatever route they take, and `CLOSED` routes.

    Gradio's own `max_file_size` guards its upload route only; an image may also come inside a JSON body.

    Args:
        app: the application behind.
        max_bytes: of a request's body.
    """

    def __init__(self, app: Any, max_bytes: int) -> None:
        self.app = app
        self.max_bytes = max_bytes

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        if scope["path"].removeprefix("/").removeprefix("gradio_api/").startswith(CLOSED):
            await self._refuse(send, 404, "This is not here.")
            return
        headers = dict(scope.get("headers") or ())
        declared = headers.get(b"content-length", b"0")
        if not declared.isdigit() or int(declared) > self.max_bytes:
            await self._refuse(send, 413, f"The request is larger than {self.max_bytes / 2**20:.0f} MB.")
            return
        received = 0

        async def counted() -> dict[str, Any]:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > self.max_bytes:  # a body sent in chunks declares no length
                return {"type": "http.disconnect"}
            return message

        await self.app(scope, counted, send)

    @staticmethod
    async def _refuse(send: Any, status: int, text: str) -> None:
        body = text.encode()
        headers = [(b"content-type", b"text/plain"), (b"content-length", str(len(body)).encode())]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": body})
