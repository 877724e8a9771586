"""Push to and load from a hub that speaks HTTP on the loopback, with huggingface_hub's own client."""

import base64
import contextlib
import json
import os
import re
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

from PIL import Image

from tests.model import test_auto
from tests.model.checkpoints import save
from tests.tiny import tiny_llava

ROOT = Path(__file__).parents[2]
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@contextlib.contextmanager
def hub(root):
    """A hub whose repositories are the folders ``<root>/<owner>/<name>``; yields its address and the requests."""
    requests = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args):
            pass

        def send(self, status, body=b"", **headers):
            self.send_response(status)
            for name, value in {"Content-Length": str(len(body)), **headers}.items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def send_json(self, answer):
            self.send(200, json.dumps(answer).encode(), Content_Type="application/json")

        def do_POST(self):
            path = unquote(urlsplit(self.path).path)
            body = self.rfile.read(int(self.headers["Content-Length"]))
            requests.append((self.command, path, self.headers.get("Authorization")))
            if path == "/api/repos/create":
                fields = json.loads(body)
                name = "/".join(part for part in (fields.get("organization"), fields["name"]) if part)
                (root / name).mkdir(parents=True, exist_ok=True)
                self.send_json({"url": f"http://{self.headers['Host']}/{name}", "name": name})
            elif path == "/api/validate-yaml":  # of the model card
                self.send_json({"warnings": [], "errors": []})
            elif "/preupload/" in path:
                files = [
                    {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                    for file in json.loads(body)["files"]
                ]
                self.send_json({"files": files})
            elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/commit/main", path):
                for line in body.splitlines():
                    entry = json.loads(line)
                    if entry["key"] == "file":
                        file = root / match[1] / entry["value"]["path"]
                        file.write_bytes(base64.b64decode(entry["value"]["content"]))
                url = f"http://{self.headers['Host']}/{match[1]}/commit/{COMMIT}"
                self.send_json({"success": True, "commitOid": COMMIT, "commitUrl": url})
            else:
                self.send(404)

        def do_HEAD(self):
            self.do_GET()

        def do_GET(self):
            path = unquote(urlsplit(self.path).path)
            requests.append((self.command, path, self.headers.get("Authorization")))
            info = re.fullmatch(r"/api/models/([^/]+/[^/]+?)(?:/(revision|tree)/[^/]+)?", path)
            file = re.fullmatch(r"/([^/]+/[^/]+)/resolve/[^/]+/(.+)", path)
            folder = root / (info or file)[1] if info or file else None
            if folder is None or not folder.is_dir():
                self.send(404, X_Error_Code="RepoNotFound")
            elif file and not (folder / file[2]).is_file():
                self.send(404, X_Error_Code="EntryNotFound", X_Repo_Commit=COMMIT)
            elif file:
                data = (folder / file[2]).read_bytes()
                self.send(200, data, X_Repo_Commit=COMMIT, ETag=f'"{len(data)}-{file[2]}"')
            elif info[2] == "tree":
                self.send_json(
                    [
                        {"type": "file", "path": f.name, "size": f.stat().st_size, "oid": f"{index:040x}"}
                        for index, f in enumerate(sorted(folder.iterdir()))
                    ]
                )
            else:
                siblings = [{"rfilename": f.name} for f in sorted(folder.iterdir())]
                self.send_json({"id": info[1], "sha": COMMIT, "siblings": siblings})

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", requests
    finally:
        server.shutdown()


PROGRAM = f"""
from transformers import AutoConfig, AutoModelForCausalLM
import tinyllava_switchkd
{test_auto.QUESTIONS}
from tinyllava_switchkd.model import load_pretrained_model, push_pretrained_model

model, tokenizer, image_processor, _ = load_pretrained_model("local", device="cpu")
answer = model.chat("What is this?", "image.png", max_new_tokens=5)
push_pretrained_model(model, tokenizer, image_processor, "someone/student", token="hf_secret")
auto = AutoModelForCausalLM.from_pretrained("someone/student")
assert auto.chat("What is this?", "image.png", max_new_tokens=5) == answer
again, *_ = load_pretrained_model("someone/student", device="cpu")
assert again.chat("What is this?", "image.png", max_new_tokens=5) == answer
assert again.config.template == "qwen2_base"
print("done")
"""


def test_round_trip(tmp_path):
    save(tiny_llava(), tmp_path / "local", template="qwen2_base")
    Image.new("RGB", (40, 30), (200, 30, 60)).save(tmp_path / "image.png")
    with hub(tmp_path / "hub") as (url, requests):
        environment = os.environ | {
            "HF_ENDPOINT": url,
            "HF_HOME": str(tmp_path / "home"),
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "PYTHONPATH": str(ROOT),
        }
        result = subprocess.run(
            [sys.executable, "-c", PROGRAM], cwd=tmp_path, env=environment, capture_output=True, text=True
        )
    assert result.stdout.endswith("done\n"), (result.stderr[-3000:], requests)
    assert result.stdout.splitlines()[: len(test_auto.ANSWERS)] == test_auto.ANSWERS  # transformers came first
    uploaded = {file.name: file.read_bytes() for file in (tmp_path / "hub" / "someone" / "student").iterdir()}
    assert b"# someone/student" in uploaded["README.md"]
    for file in set((tmp_path / "local").iterdir()) - {tmp_path / "local" / "README.md"}:
        assert json.loads(uploaded[file.name]) if file.suffix == ".json" else uploaded[file.name] == file.read_bytes()
    writes = [token for method, path, token in requests if method == "POST"]
    assert writes and set(writes) == {"Bearer hf_secret"}
