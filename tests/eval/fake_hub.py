"""A local server that replaces the Hugging Face hub and the authors' download sites.

Just enough of the hub's interface for huggingface_hub's look-up and download: ``/api/datasets/<id>`` with the commit
and the file list, ``.../tree/<revision>`` with the files' sizes, and ``/datasets/<id>/resolve/<revision>/<file>`` with
commit, ETag and byte ranges. Other paths are plain files. `cuts` interrupts an answer, as a bad connection does.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class FakeHub:
    """Data sets are folders ``<root>/datasets/<owner>/<name>``; anything else under `root` is a plain file."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.requests: list[tuple[str, str, str | None]] = []
        """(method, path, Range header) in order."""
        self.cuts: dict[str, int] = {}
        """File name -> bytes after which the next full answer is interrupted."""
        self.versions: dict[str, str] = {}
        """File name -> suffix of its ETag: a new version of the file."""
        self.url = ""

    def folder(self, repo_id: str) -> Path:
        folder = self.root / "datasets" / repo_id
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def gets(self, name: str) -> list[str | None]:
        """Range headers of the GET requests for files of this name."""
        return [ranged for method, path, ranged in self.requests if method == "GET" and path.endswith(name)]


@contextlib.contextmanager
def serve(root: Path) -> Iterator[FakeHub]:
    """Run a `FakeHub` on a free port."""
    hub = FakeHub(root)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args: object) -> None:
            pass

        def do_HEAD(self) -> None:
            self._answer(body=False)

        def do_GET(self) -> None:
            self._answer(body=True)

        def _answer(self, body: bool) -> None:
            path = unquote(self.path.split("?")[0])
            hub.requests.append((self.command, path, self.headers.get("Range")))
            info = re.fullmatch(r"/api/datasets/([^/]+/[^/]+)(?:/revision/[^/]+)?", path)
            tree = re.fullmatch(r"/api/datasets/([^/]+/[^/]+)/tree/[^/]+", path)
            file = re.fullmatch(r"/datasets/([^/]+/[^/]+)/resolve/[^/]+/(.+)", path)
            if info:
                self._info(info[1])
            elif tree:
                self._tree(tree[1])
            else:
                self._file(hub.root / "datasets" / file[1] / file[2] if file else hub.root / path.lstrip("/"), body)

        def _info(self, repo_id: str) -> None:
            folder = hub.root / "datasets" / repo_id
            if not folder.is_dir():
                self._send(404, b"", {"X-Error-Code": "RepoNotFound"})
                return
            names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
            answer = {"id": repo_id, "sha": COMMIT, "siblings": [{"rfilename": name} for name in names]}
            self._send(200, json.dumps(answer).encode(), {"Content-Type": "application/json"})

        def _tree(self, repo_id: str) -> None:
            folder = hub.root / "datasets" / repo_id
            files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
            answer = [
                {
                    "type": "file",
                    "path": file.relative_to(folder).as_posix(),
                    "size": file.stat().st_size,
                    "oid": hashlib.sha256(file.read_bytes()).hexdigest(),
                }
                for file in files
            ]
            self._send(200, json.dumps(answer).encode(), {"Content-Type": "application/json"})

        def _file(self, path: Path, body: bool) -> None:
            if not path.is_file():
                self._send(404, b"", {"X-Error-Code": "EntryNotFound"})
                return
            data = path.read_bytes()
            etag = f'"{hashlib.sha256(data).hexdigest()}{hub.versions.get(path.name, "")}"'
            headers = {"ETag": etag, "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
            status, start = 200, 0
            ranged = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or "")
            if ranged and self.headers.get("If-Range") in (None, etag):
                status, start = 206, int(ranged[1])
                if start >= len(data):
                    self._send(416, b"", {})
                    return
                headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
            self._send(status, data[start:], headers, body, hub.cuts.pop(path.name, None) if body else None)

        def _send(self, status: int, data: bytes, headers: dict, body: bool = True, cut: int | None = None) -> None:
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(data))}.items():
                self.send_header(name, value)
            self.end_headers()
            if body:
                self.wfile.write(data[:cut])
            if cut is not None:
                self.close_connection = True

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
