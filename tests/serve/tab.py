"""A browser tab without a browser: uses Gradio's queue protocol with a running demo."""

from __future__ import annotations

import contextlib
import json
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
from gradio_client.utils import apply_diff

from tinyllava_switchkd.serve.page import Page, launch

# Updates that leave an output unchanged.
_LEFT = (
    {"__type__": "update"},
    {"__type__": "update", "props": {"__type__": "update"}},
)
SETTINGS = [0.0, 1.0, 0, 1.0]  # temperature, top-p, top-k, repetition penalty


@contextlib.contextmanager
def serving(page: Page, **kwargs: Any) -> Iterator[str]:
    """Serve a page within the block; yields its URL."""
    _, url, _ = launch(page, prevent_thread_lock=True, quiet=True, **kwargs)
    try:
        yield url.rstrip("/")
    finally:
        page.blocks.server.force_exit = True  # uvicorn would wait for abandoned streams
        page.blocks.close(verbose=False)


class Tab:
    """One user.

    Args:
        url: URL of the demo.
        page: the served page, to find its handlers.
    """

    def __init__(self, url: str, page: Page) -> None:
        self.url, self.page = url, page
        self.hash = uuid.uuid4().hex[:10]
        self.client = httpx.Client(base_url=url, timeout=60, trust_env=False)

    def upload(self, path: Path) -> dict[str, Any]:
        """Upload a file as the page does; returns what the image component then sends."""
        with open(path, "rb") as file:
            reply = self.client.post("/gradio_api/upload", files={"files": (path.name, file)})
        reply.raise_for_status()
        return file_data(reply.json()[0])

    def join(self, handler: Any, data: list[Any]) -> httpx.Response:
        """Put a request into the queue."""
        return self.client.post("/gradio_api/queue/join", json=self._body(handler, data))

    def run(self, handler: Any, data: list[Any]) -> list[Any]:
        """Outputs of a request without queue, such as that of the Stop button."""
        reply = self.client.post("/gradio_api/run/predict", json=self._body(handler, data))
        reply.raise_for_status()
        return reply.json()["data"]

    def _body(self, handler: Any, data: list[Any]) -> dict[str, Any]:
        number = next(n for n, fn in self.page.blocks.fns.items() if fn.fn == handler)
        return {"data": data, "fn_index": number, "session_hash": self.hash, "event_data": None, "trigger_id": 0}

    def messages(self) -> Iterator[dict[str, Any]]:
        """The server's messages about this tab's requests."""
        with self.client.stream("GET", "/gradio_api/queue/data", params={"session_hash": self.hash}) as stream:
            for line in stream.iter_lines():
                if line.startswith("data:"):
                    yield json.loads(line[5:])

    def call(self, handler: Any, data: list[Any]) -> list[Any]:
        """Send a request; returns what the page shows afterwards, in the order of the handler's outputs.

        Raises:
            RuntimeError: the server reports an error.
        """
        reply = self.join(handler, data)
        if reply.status_code != 200:
            raise RuntimeError(f"{reply.status_code}: {reply.text}")
        outputs: list[Any] = []
        shown: list[Any] = []
        for message in self.messages():
            if message["msg"] in ("process_generating", "process_completed"):
                if not message["success"]:
                    raise RuntimeError(json.dumps(message["output"]))
                new = message["output"].get("data", [])
                if message["msg"] == "process_completed" and not new:
                    return shown
                is_diff = message["msg"] == "process_generating" and outputs
                outputs = [apply_diff(old, edits) for old, edits in zip(outputs, new, strict=True)] if is_diff else new
                shown = [old if new in _LEFT else new for old, new in zip(shown or outputs, outputs, strict=True)]
            if message["msg"] == "process_completed":
                return shown
            if message["msg"] == "unexpected_error":
                raise RuntimeError(message["message"])
        raise RuntimeError("The server hung up.")

    def ask(self, question: str, image: dict[str, Any] | None = None, tokens: int = 10) -> tuple[str, str]:
        """Transcript and notice after a question."""
        outputs = self.call(self.page.ask, [None, image, question, *SETTINGS, tokens])
        return outputs[1], outputs[2]


def file_data(path: str, **more: Any) -> dict[str, Any]:
    """A client's description of a file."""
    return {"path": path, "meta": {"_type": "gradio.FileData"}, **more}
