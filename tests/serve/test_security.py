"""Attacks on the demo: files of others, other host names, other routes, too much data."""

from __future__ import annotations

import asyncio
import io
import itertools
import json
import os
import re
from pathlib import Path

import httpx
import pytest
from PIL import Image

from tests.serve.tab import Tab, file_data, serving
from tests.serve.talkers import picture, pool_of, talker
from tests.serve.test_app import wait_until
from tests.serve.test_images import bomb
from tinyllava_switchkd.serve import app
from tinyllava_switchkd.serve.conversation import Sampling
from tinyllava_switchkd.serve.demo import Demo
from tinyllava_switchkd.serve.examples import EXAMPLES, FOLDER
from tinyllava_switchkd.serve.images import ImageLimits, read_image
from tinyllava_switchkd.serve.limits import DemoLimits, Gate, Hosts, Room, is_open
from tinyllava_switchkd.serve.page import Page
from tinyllava_switchkd.serve.upload import REFUSED

LIMITS = DemoLimits(ImageLimits(300_000, 1_000_000, 400), seconds=20, upload_bytes=500_000)
ASK = [0.0, 1.0, 0, 1.0, 5]
NUMBERS = itertools.count(10)
"""Seeds of pictures, so that each test uploads a different one."""


@pytest.fixture(scope="module")
def page():
    return Page(Demo(pool_of([talker("Student")]), LIMITS), Sampling(max_new_tokens=5))


@pytest.fixture(scope="module")
def url(page):
    with serving(page) as url:
        yield url


@pytest.fixture
def tab(url, page):
    return Tab(url, page)


@pytest.fixture
def secret(tmp_path):
    picture(3).save(tmp_path / "secret.png")
    return tmp_path / "secret.png"


@pytest.fixture
def uploaded(tab, tmp_path):
    picture(next(NUMBERS)).save(tmp_path / "mine.png")
    return tab.upload(tmp_path / "mine.png")


def answer(tab, handler, data) -> str:
    """The whole response to a request as text."""
    try:
        return json.dumps(tab.call(handler, data))
    except RuntimeError as error:
        return str(error)


META = {"_type": "gradio.FileData"}
FORMS = {
    "bare": lambda path: {"path": path},
    "with meta": lambda path: {"path": path, "meta": META},
    "with another meta": lambda path: {"path": path, "meta": {"_type": "gradio.Other"}},
    "with an empty meta": lambda path: {"path": path, "meta": {}},
    "as a stream": lambda path: {"path": path, "meta": META, "is_stream": True},
    "with an address": lambda path: {"path": path, "url": f"/gradio_api/file={path}", "meta": META},
    "address only": lambda path: {"path": None, "url": f"/gradio_api/file={path}", "meta": META},
    "file address": lambda path: {"path": f"file://{path}", "meta": META},
    "file address, bare": lambda path: {"path": f"file://{path}"},
    "relative": lambda path: {"path": os.path.relpath(path)},
    "with dots": lambda path: {"path": f"{FOLDER}/../examples/../../../../../../../../../../..{path}"},
    "with a null": lambda path: {"path": path + "\x00.png"},
    "route": lambda path: {"path": f"/gradio_api/file={path}"},
    "as text": lambda path: path,
    "in a list": lambda path: [{"path": path}],
    "nested": lambda path: {"path": {"path": path, "meta": META}, "meta": META},
    "as an update": lambda path: {"__type__": "update", "value": {"path": path}},
}


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("handler", ["ask", "check_image"])
def test_no_request_opens_a_file_of_the_server_or_tells_whether_it_is_there(tab, page, secret, form, handler):
    def ask(path: Path) -> str:
        data = [None, form(str(path))] + (["What?", *ASK] if handler == "ask" else [])
        return answer(tab, getattr(page, handler), data).replace(str(path), "PATH")

    there = ask(secret)
    assert "data:image" not in there and "PATH" not in there
    assert ask(secret.with_name("nothing.png")) == there
    secret.with_name("text.png").write_text("a text")
    assert ask(secret.with_name("text.png")) == there
    assert ask(Path("/root/nothing.png")) == there


def test_links_and_files_next_to_an_upload_are_not_uploads(tab, page, secret, uploaded):
    folder = Path(uploaded["path"]).parent
    (folder / "link.png").symlink_to(secret)
    picture(4).save(folder / "beside.png")
    for name in ("link.png", "beside.png", "missing.png", f"../{folder.name}/mine.png"):
        for form in ("bare", "with meta"):
            assert REFUSED in answer(tab, page.ask, [None, FORMS[form](f"{folder}/{name}"), "What?", *ASK])
    (folder / "link.png").unlink()
    Path(uploaded["path"]).unlink()
    Path(uploaded["path"]).symlink_to(secret)
    assert REFUSED in answer(tab, page.ask, [None, uploaded, "What?", *ASK])
    Path(uploaded["path"]).unlink()
    assert REFUSED in answer(tab, page.ask, [None, uploaded, "What?", *ASK])


def test_pictures_that_the_server_made_of_other_people_s_images_are_no_uploads(tab, page, uploaded):
    tab.ask("What is it?", uploaded, tokens=5)
    made = tab.call(page.show_attention, [None, 0])[3]
    assert REFUSED in answer(Tab(tab.url, page), page.ask, [None, made, "What?", *ASK])


@pytest.mark.parametrize(
    "address", ["http://127.0.0.1:1/a.png", "https://example.org/a.png", "data:image/png;base64,AA"]
)
@pytest.mark.parametrize("form", ["bare", "with meta", "with an address", "as text"])
def test_no_address_is_fetched(tab, page, monkeypatch, address, form):
    async def fetch(*args, **kwargs):
        raise AssertionError("fetched")

    monkeypatch.setattr("gradio.processing_utils.async_ssrf_protected_download", fetch)
    assert "fetched from elsewhere" in answer(tab, page.ask, [None, FORMS[form](address), "What?", *ASK])
    question = {"path": address, "meta": META}  # Gradio fetches what a text box is given, too
    assert "not an object" in answer(tab, page.ask, [None, None, question, *ASK])
    for place in range(5):
        settings = [*ASK[:place], [question], *ASK[place + 1 :]]
        assert "not an object" in answer(tab, page.ask, [None, None, "What?", *settings])


def test_a_file_in_another_field_is_not_copied(tab, page, secret):
    before = set(Path(page.room.folder).rglob("*"))
    for question in ({"path": str(secret), "meta": META}, {"path": str(secret)}):
        assert "not an object" in answer(tab, page.ask, [None, None, question, *ASK])
        assert "not an object" in answer(tab, page.show_attention, [None, question])
    assert set(Path(page.room.folder).rglob("*")) == before


def test_clients_cannot_set_the_state(tab, page, secret):
    assert "There is no image yet" in answer(tab, page.ask, [{"attached": str(secret)}, None, "What?", *ASK])


def test_own_images_are_accepted(tab, page, uploaded):
    assert tab.ask("What is it?", uploaded, tokens=5)[1] == ""
    for index in range(len(EXAMPLES)):
        chosen = page.pick(None, type("Event", (), {"index": index}))[page.image]
        other = Tab(tab.url, page)
        transcript, notice = other.ask("What is it?", file_data(chosen), tokens=5)
        assert notice == "" and "data:image/jpeg" in transcript


def test_the_examples_folder_serves_pictures_only(tab):
    for name, _ in EXAMPLES:
        reply = tab.client.get(f"/gradio_api/file={FOLDER / name}")
        assert reply.status_code == 200 and reply.headers["content-type"] == "image/png"
    for file in (*FOLDER.glob("*.py"), FOLDER, FOLDER / "__pycache__", FOLDER / "none.png", FOLDER.parent / "page.css"):
        assert tab.client.get(f"/gradio_api/file={file}").status_code in (403, 404)


OTHER_HOSTS = """
evil.example|evil.example:7860|127.0.0.1.evil.example|localhost.evil.example|localhost@evil.example
evil.example#localhost|192.168.1.7|0.0.0.0|[::2]:80|127.0.0.1, evil.example|127.0.0.1:x
"""
OTHER_HOSTS = re.split(r"[|\n]", OTHER_HOSTS.strip())


class TestHost:
    @pytest.mark.parametrize("host", [*OTHER_HOSTS, ""])
    def test_other_host_names_are_refused(self, tab, host):
        for method, route in (("GET", "/"), ("GET", "/config"), ("POST", "/gradio_api/queue/join"), ("HEAD", "/")):
            reply = tab.client.request(method, route, headers={"Host": host})
            assert reply.status_code in (400, 421), (method, route)

    @pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.1:1234", "localhost", "LOCALHOST:80", "[::1]:7860"])
    def test_bound_host_name_is_accepted(self, tab, host):
        assert tab.client.get("/theme.css", headers={"Host": host}).status_code == 200

    def test_two_host_headers_or_none(self, url):
        import socket

        host, port = url.removeprefix("http://").split(":")
        for lines in (f"Host: {host}\r\nHost: evil.example\r\n", ""):
            with socket.create_connection((host, int(port)), timeout=10) as connection:
                connection.sendall(f"GET /config HTTP/1.1\r\n{lines}Connection: close\r\n\r\n".encode())
                assert connection.recv(100).split()[1] in (b"400", b"421")

    def test_nor_does_a_proxys_header_name_another(self, tab):
        """Gradio would build the page's URLs from it."""
        for name, status in (("evil.example", 421), ("127.0.0.1, evil.example", 421), ("localhost:80", 200)):
            assert tab.client.get("/config", headers={"X-Forwarded-Host": name}).status_code == status

    def test_names_of_an_open_server(self):
        hosts = Hosts("0.0.0.0", ["demo.example.org"])
        for good in (
            "0.0.0.0:7860",
            "127.0.0.1",
            "10.1.2.3:7860",
            "[fe80::1]:7860",
            "demo.example.org",
            "Demo.Example.org.",
        ):
            assert hosts.know(good), good
        for bad in ("evil.example", "10.1.2.3.evil.example", "example.org", "x.demo.example.org", ""):
            assert not hosts.know(bad), bad
        assert not Hosts("192.168.1.7").know("localhost") and Hosts("192.168.1.7").know("192.168.1.7:7860")
        assert Hosts("my-pc.lan").know("MY-PC.lan:80")

    @pytest.mark.parametrize("origin", ["http://evil.example", "null", "https://127.0.0.1.evil.example", "file://"])
    def test_requests_from_other_sites_are_refused(self, tab, origin):
        for route in ("/gradio_api/upload", "/gradio_api/queue/join", "/gradio_api/run/predict"):
            assert tab.client.post(route, headers={"Origin": origin}).status_code == 403

    def test_requests_from_the_page_are_accepted(self, tab, url):
        reply = tab.client.post("/gradio_api/upload", files={"files": b"x"}, headers={"Origin": url})
        assert reply.status_code == 200


class TestRoutes:
    def test_requests_that_crash_gradio_are_refused(self, tab, page, uploaded, caplog):
        file = tab.client.get(f"/gradio_api/file={uploaded['path']}", headers={"Range": "bytes=0-1,0-1"})
        join = tab.client.post("/gradio_api/queue/join", json={"data": [], "fn_index": -1, "session_hash": "x"})
        for reply in (file, join):
            assert (reply.status_code, reply.text) == (400, "This request cannot be answered.")
        assert "Traceback" not in caplog.text and "was not answered (KeyError(-1))" in caplog.text

    @pytest.mark.parametrize(
        ("method", "route"),
        [
            ("GET", "/gradio_api/file=http://127.0.0.1:1/x"),
            ("GET", "/gradio_api/file=https://example.org/x.png"),
            ("GET", "/gradio_api/file/etc/passwd"),
            ("GET", "/file=/etc/passwd"),
            ("GET", "/gradio_api/proxy=https://example.org/"),
            ("GET", "/gradio_api/deep_link"),
            ("GET", "/gradio_api/runs"),
            ("GET", "/monitoring"),
            ("GET", "/gradio_api/openapi.json"),
            ("GET", "/gradio_api/custom_component/a/b/c/d"),
            ("GET", "/gradio_api/vibe-code"),
            ("GET", "/gradio_api/dev/reload"),
            ("POST", "/gradio_api/undo-vibe-edit"),
            ("GET", "/docs"),
            ("POST", "/gradio_api/component_server"),
            ("POST", "/gradio_api/api/predict"),
            ("POST", "/gradio_api/api/ask"),
            ("POST", "/gradio_api/call/ask"),
            ("POST", "/gradio_api/call/v2/ask"),
            ("POST", "/gradio_api/run/ask"),
            ("POST", "/gradio_api/stream/x"),
            ("POST", "/gradio_api/process_recording"),
            ("POST", "/gradio_api/vibe-edit/"),
            ("POST", "/login"),
            ("PUT", "/gradio_api/upload"),
            ("DELETE", "/gradio_api/upload"),
            ("POST", "/config"),
        ],
    )
    def test_closed(self, tab, method, route):
        assert not is_open(method, route)
        assert tab.client.request(method, route).status_code == 404

    def test_queued_handlers_do_not_run_past_the_queue(self, tab, page, secret):
        body = tab._body(page.ask, [None, {"path": str(secret)}, "What?", *ASK])
        assert tab.client.post("/gradio_api/run/predict", json=body).status_code == 404

    def test_a_websocket(self, url):
        head = {
            "Connection": "Upgrade",
            "Upgrade": "websocket",
            "Sec-WebSocket-Version": "13",
            "Sec-WebSocket-Key": "a" * 24,
        }
        assert httpx.get(f"{url}/gradio_api/queue/join", headers=head, trust_env=False).status_code >= 400


class TestRoom:
    def test_all_uploads_together(self, tmp_path):
        page = Page(Demo(pool_of([talker("S")]), LIMITS))
        with serving(page) as url:
            tab = Tab(url, page)
            codes = [
                tab.client.post("/gradio_api/upload", files={"files": ("a.png", os.urandom(150_000))}).status_code
                for _ in range(4)
            ]
            assert codes == [200, 200, 200, 507]
            many = [("files", (f"{n}.png", os.urandom(10))) for n in range(20)]
            assert tab.client.post("/gradio_api/upload", files=many).status_code == 200  # one disk block each
            assert tab.client.post("/gradio_api/upload", files={"files": b"x"}).status_code == 507
            assert "fill their" in tab.client.post("/gradio_api/upload", files={"files": b"x"}).text
            for file in list(page.blocks.upload_file_set):
                Path(file).unlink()
            assert tab.client.post("/gradio_api/upload", files={"files": b"x"}).status_code == 200

    def test_uploads_in_progress_and_abandoned_ones_count(self, tmp_path):
        room = Room(tmp_path, lambda: [], 100_000)
        assert room.enter(60_000) and not room.enter(60_000)
        room.leave(60_000)
        assert room.enter(60_000)
        room.leave(60_000)
        (tmp_path / "tmpabc").write_bytes(bytes(90_000))
        assert not room.enter(60_000)
        os.utime(tmp_path / "tmpabc", (0, 0))
        assert room.enter(60_000) and not (tmp_path / "tmpabc").exists()

    def test_a_sender_that_never_ends_keeps_no_room(self, tmp_path):
        """The upload is abandoned after a while, and others can use its space."""
        room, sent, ended = Room(tmp_path, lambda: [], 100_000), [], []

        async def app(scope, receive, send):
            while (message := await receive())["type"] != "http.disconnect":
                assert message["more_body"]
            ended.append(message)

        async def drip():
            await asyncio.sleep(0.05)
            return {"type": "http.request", "body": b"x", "more_body": True}

        async def send(message):
            sent.append(message)

        gate = Gate(app, max_bytes=90_000, hosts=Hosts("127.0.0.1"), room=room, body_seconds=0.3)
        headers = [(b"host", b"127.0.0.1"), (b"content-length", b"90000")]
        scope = {"type": "http", "method": "POST", "path": "/gradio_api/upload", "headers": headers}
        asyncio.run(asyncio.wait_for(gate(scope, drip, send), 20))
        assert ended and room.enter(90_000)

    def test_refused_or_failed_upload_releases_its_space(self, tab, page):
        for content in (b"no form", b"--x\r\nnothing"):
            tab.client.post("/gradio_api/upload", content=content, headers={"Content-Type": "multipart/form-data"})
        wait_until(lambda: page.room._under_way == 0)


class TestCost:
    @pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA", "P", "1", "I;16"])
    def test_49_megapixels_are_not_decoded_by_default(self, tmp_path, monkeypatch, mode):
        Image.new(mode, (7000, 7000)).save(tmp_path / "large.png")
        monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda self: pytest.fail("it was decoded"))
        with pytest.raises(ValueError, match=r"49\.0 million pixels; at most 20\.0 million"):
            read_image(tmp_path / "large.png", DemoLimits().image)

    @pytest.mark.parametrize("kind", ["JPEG", "WEBP", "GIF", "BMP"])
    def test_formats_of_large_images(self, tmp_path, kind):
        Image.new("RGB" if kind == "WEBP" else "1", (5000, 4100)).save(tmp_path / "large", format=kind)
        with pytest.raises(ValueError, match=r"20\.5 million pixels; at most 20\.0"):
            read_image(tmp_path / "large", DemoLimits().image)

    def test_a_jpeg_with_a_thousand_scans(self, tmp_path):
        buffer = io.BytesIO()
        picture(1, (64, 64)).save(buffer, format="JPEG", progressive=True)
        data = buffer.getvalue()
        last = data.rindex(b"\xff\xda")
        (tmp_path / "scans.jpg").write_bytes(data[:last] + data[last:-2] * 1000 + data[-2:])
        with pytest.raises(ValueError, match="more than 100 scans"):
            read_image(tmp_path / "scans.jpg", DemoLimits().image)

    def test_a_bomb_is_refused_as_it_arrives(self, tab, page, tmp_path):
        (tmp_path / "bomb.png").write_bytes(bomb(30_000, 30_000))
        tab.client.timeout = 60
        if (tmp_path / "bomb.png").stat().st_size > LIMITS.image.max_bytes:
            (tmp_path / "bomb.png").write_bytes(bomb(9000, 9000))
        value, _, notice = tab.call(page.check_image, [None, tab.upload(tmp_path / "bomb.png")])
        assert (value is None and "million pixels; at most 1.0" in notice) or "too many pixels" in notice


OPTIONS = """
--port 0; --port 70000; --port x; --queue_size 0; --queue_size -1; --queue_size 1.5; --time_limit 0; --time_limit -3
--time_limit nan; --time_limit inf; --max_upload_mb 0; --max_upload_mb -1; --max_upload_mb nan; --max_megapixels 0
--max_megapixels 1e9; --all_uploads_mb 0; --all_uploads_mb 2; --temperature nan; --temperature -1; --temperature inf
--top_p 0; --top_p 1.1; --top_k -1; --top_k x; --repetition_penalty 0; --repetition_penalty nan; --max_new_tokens 0
--max_new_tokens -5; --max_new_tokens 1e3; --dtype int8; --device tpu; --device cuda:99; --device cpu:x
--conv_mode no-such; --host not.a.host.invalid; --names a b c; --attn_implementation none-such; --hots 0.0.0.0
"""


@pytest.mark.parametrize("option", [option.strip() for option in re.split(r"[;\n]", OPTIONS.strip())])
def test_options_out_of_range_are_one_sentence(option, tmp_path, capsys, monkeypatch):
    (tmp_path / "config.json").touch()
    monkeypatch.setattr("tinyllava_switchkd.serve.page.launch", lambda *args, **kwargs: pytest.fail("the demo started"))
    name, *values = option.split()
    try:
        code = app.main(["--model_path", str(tmp_path), name, *values])
    except SystemExit as error:
        code = error.code
    written = capsys.readouterr().err
    assert code not in (0, None) and "Traceback" not in written
    last = written.strip().splitlines()[-1]
    assert "error: " in last and (values[0] in last or name in last), last
