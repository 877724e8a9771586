"""The web demo over HTTP: what it serves, what it refuses, and separation of users."""

from __future__ import annotations

import base64
import dataclasses
import itertools
import os
import re
import signal
import threading
import time
from pathlib import Path

import pytest
from PIL import Image

from tests.serve.tab import Tab, file_data, serving
from tests.serve.talkers import picture, pool_of, talker
from tests.serve.test_images import bomb
from tinyllava_switchkd.serve import app, render
from tinyllava_switchkd.serve.conversation import Sampling
from tinyllava_switchkd.serve.demo import Demo
from tinyllava_switchkd.serve.engine import Reply
from tinyllava_switchkd.serve.examples import EXAMPLES, FOLDER
from tinyllava_switchkd.serve.images import ImageLimits, read_image
from tinyllava_switchkd.serve.limits import DemoLimits
from tinyllava_switchkd.serve.page import Page, launch
from tinyllava_switchkd.serve.pool import ModelPool, Slot

LIMITS = DemoLimits(ImageLimits(300_000, 1_000_000, 400), question_chars=200, max_new_tokens=300, seconds=20)


def page_of(*models, limits=LIMITS):
    return Page(Demo(pool_of(models), limits), Sampling(max_new_tokens=10))


@pytest.fixture(scope="module")
def page():
    return page_of(talker("Student"), talker("Teacher", seed=1))


@pytest.fixture(scope="module")
def url(page):
    with serving(page) as url:
        yield url


@pytest.fixture
def tab(url, page):
    return Tab(url, page)


@pytest.fixture
def upload(tab, tmp_path):
    picture().save(tmp_path / "photo.png")
    return tab.upload(tmp_path / "photo.png")


def wait_until(happened, seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < end
        time.sleep(0.02)


def answers(transcript: str) -> list[str]:
    return re.findall(r"<p class='tl-text'>(.*?)</p>", transcript)


class TestAnswers:
    def test_two_models_answer_side_by_side(self, tab, upload):
        transcript, notice = tab.ask("What is it?", upload)
        assert notice == "" and transcript.count("data:image/jpeg") == 1
        assert re.findall(r"<h3>(.*?)</h3>", transcript) == ["Student", "Teacher"]
        texts = answers(transcript)
        assert len(texts) == 2 and len(set(texts)) == 2 and all(texts)
        assert transcript.count("to first token") == transcript.count("tokens/s") == 2

    def test_follow_up(self, tab, upload):
        first, _ = tab.ask("What is it?", upload)
        second, _ = tab.ask("And why?", upload)
        assert answers(second)[:2] == answers(first) and len(answers(second)) == 4
        assert second.count("data:image/jpeg") == 1  # the same image is not shown twice

    def test_new_chat(self, tab, page, upload):
        first, _ = tab.ask("What is it?", upload)
        tab.ask("And why?", upload)
        assert "Nothing asked yet" in tab.run(page.restart, [None])[1]
        again, _ = tab.ask("What is it?", upload)
        assert answers(again) == answers(first)

    @pytest.mark.parametrize(
        ("question", "has_image", "message"),
        [
            ("  ", True, "Please type a question."),
            ("What?", False, "There is no image yet"),
            ("W" * 201, True, "201 characters; at most 200"),
        ],
    )
    def test_bad_questions(self, tab, upload, question, has_image, message):
        transcript, notice = tab.ask(question, upload if has_image else None)
        assert message in notice and "role='alert'" in notice and "Nothing asked yet" in transcript

    def test_settings_out_of_range(self, tab, page, upload):
        for settings in ([-1, 1, 0, 1, 10], [0, 1, 0, 1, 301]):
            with pytest.raises(RuntimeError):
                tab.call(page.ask, [None, upload, "What?", *settings])

    def test_too_long_conversation_is_reported_and_can_continue(self, tab, upload):
        for _ in range(3):
            transcript, _ = tab.ask("W" * 150, upload, tokens=100)
        assert transcript.count("start a new conversation") >= 2

    def test_attention(self, tab, page, upload):
        assert "has not answered yet" in tab.call(page.show_attention, [None, 1])[-1]
        tab.ask("What is it?", upload)
        outputs = tab.call(page.show_attention, [None, 1])
        tokens, position, image, caption, notice = outputs[1:]
        assert notice == "" and position["maximum"] == len(tokens) == 10 and "the whole answer" in caption
        assert 0 <= min(token["class_or_confidence"] for token in tokens) <= 1
        served = tab.client.get(image["url"].removeprefix(tab.url))
        assert served.status_code == 200 and served.headers["content-type"].startswith("image/")
        picture_of_token, caption = tab.call(page.show_token, [None, 1, 3])
        assert "token 3 of 10" in caption and picture_of_token["path"] != image["path"]


class TestApart:
    def test_concurrent_users_get_the_same_answers_as_alone(self, url, page, tmp_path):
        def talk(user: int) -> list[str]:
            tab = Tab(url, page)
            picture(user).save(tmp_path / f"{user}.png")
            image = tab.upload(tmp_path / f"{user}.png")
            tab.ask(f"I am {user}.", image)
            transcript, _ = tab.ask(f"{user} again?", image)
            asked = re.findall(r"<p>(.*?)</p>", transcript)
            assert asked == [f"I am {user}.", f"{user} again?"]
            return answers(transcript)

        alone = [talk(user) for user in range(3)]
        assert len({tuple(texts) for texts in alone}) == 3
        together: dict[int, list[str]] = {}
        threads = [threading.Thread(target=lambda user=user: together.update({user: talk(user)})) for user in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert [together.get(user) for user in range(3)] == alone

    def test_stop_stops_one_user_only(self, tmp_path):
        page = page_of(talker("Slow", seconds_per_token=0.02))
        picture().save(tmp_path / "photo.png")
        with serving(page) as url:
            first, second = Tab(url, page), Tab(url, page)
            image = first.upload(tmp_path / "photo.png")
            results = {}
            first.run(page.begin, [None])  # as the page does: the session exists before its turn
            asking = [
                threading.Thread(target=lambda t=t, n=n, k=k: results.update({n: t.ask("Go on.", image, tokens=k)}))
                for n, t, k in (("first", first, 290), ("second", second, 60))
            ]
            asking[0].start()
            wait_until(lambda: page.demo.is_busy)
            asking[1].start()
            time.sleep(0.3)
            first.run(page.halt, [None])
            for thread in asking:
                thread.join()
        assert "stopped" in results["first"][0] and "stopped" not in results["second"][0]
        assert "<b>60</b> tokens" in results["second"][0]

    def test_a_closed_tab_stops_its_answer(self, tmp_path):
        model = talker("Slow", seconds_per_token=0.2)
        page = page_of(model)
        picture().save(tmp_path / "photo.png")
        with serving(page) as url:
            tab = Tab(url, page)
            tab.join(page.ask, [None, tab.upload(tmp_path / "photo.png"), "Go on.", 0.0, 1.0, 0, 1.0, 290])
            growing = (message for message in tab.messages() if message["msg"] == "process_generating")
            next(itertools.islice(growing, 3, None))
            assert model._lock.locked()
            tab.client.close()
            assert model._lock.acquire(timeout=40)  # the whole answer takes 58 s
            model._lock.release()


class TestLimits:
    def test_time_limit(self, tmp_path):
        limits = DemoLimits(LIMITS.image, seconds=0.3)
        page = page_of(talker("Slow", seconds_per_token=0.02), limits=limits)
        picture().save(tmp_path / "photo.png")
        with serving(page) as url:
            tab = Tab(url, page)
            transcript, _ = tab.ask("Go on.", tab.upload(tmp_path / "photo.png"), tokens=300)
        assert "cut at the time limit" in transcript

    def test_the_queue_is_bounded(self, tmp_path):
        page = page_of(talker("Slow", seconds_per_token=0.02))
        picture().save(tmp_path / "photo.png")
        with serving(page, queue_size=2) as url:
            image = Tab(url, page).upload(tmp_path / "photo.png")
            data = [None, image, "Go on.", 0.0, 1.0, 0, 1.0, 200]
            codes = [Tab(url, page).join(page.ask, data).status_code for _ in range(6)]
        assert codes.count(200) <= 4 and 503 in codes

    def test_a_large_upload(self, tab, tmp_path):
        (tmp_path / "big.png").write_bytes(bytes(400_000))
        assert tab.client.post("/gradio_api/upload", files={"files": b"x" * 400_000}).status_code in (400, 413)
        assert tab.client.post("/gradio_api/upload", files={"files": b"x" * 2_000_000}).status_code == 413

    def test_a_large_request_on_any_route(self, tab):
        big = "data:image/png;base64," + base64.b64encode(bytes(1_500_000)).decode()
        assert tab.client.post("/gradio_api/queue/join", json={"data": [big]}).status_code == 413
        chunks = (b"x" * 100_000 for _ in range(20))  # without a declared length
        assert tab.client.post("/gradio_api/queue/join", content=chunks).status_code >= 400

    def test_a_decompression_bomb(self, tab, page, tmp_path):
        (tmp_path / "bomb.png").write_bytes(bomb(9000, 9000))
        image = tab.upload(tmp_path / "bomb.png")
        assert tab.call(page.check_image, [None, image])[0] is None
        _, notice = tab.ask("What?", image)
        assert "9000 x 9000 = 81.0 million pixels; at most 1.0 million are allowed" in notice

    def test_images_of_a_conversation(self, tmp_path):
        """Also those whose question was refused, since they wait for the next one."""
        demo = Demo(pool_of([talker()]), dataclasses.replace(LIMITS, images=2))
        session = demo.new_session()
        for number, question in enumerate(["What?", "long " * 40]):
            picture(number).save(tmp_path / f"{number}.png")
            list(demo.ask(session, str(tmp_path / f"{number}.png"), question, Sampling(max_new_tokens=300)))
        picture(2).save(tmp_path / "2.png")
        with pytest.raises(ValueError, match="at most 2 images"):
            list(demo.ask(session, str(tmp_path / "2.png"), "And?", Sampling()))
        assert len(session.conversations[0].images()) == 2
        list(demo.ask(session, str(tmp_path / "1.png"), "And?", Sampling(max_new_tokens=2)))  # goes on without it

    def test_an_image_that_no_model_can_read_is_not_kept(self, tmp_path):
        demo = Demo(pool_of([talker(tower="clip")]), LIMITS)
        demo.pool.ready[0].image_processor.size = {"shortest_edge": 800}
        session = demo.new_session()
        Image.new("RGB", (400, 1)).save(tmp_path / "line.png")
        with pytest.raises(ValueError, match="too narrow"):
            list(demo.ask(session, str(tmp_path / "line.png"), "What?", Sampling()))
        assert session.conversations[0].images() == []

    @pytest.mark.parametrize(("name", "content"), [("a.png", b"no image"), ("a.svg", b"<svg onload='alert(1)'/>")])
    def test_no_image(self, tab, tmp_path, name, content):
        (tmp_path / name).write_bytes(content)
        _, notice = tab.ask("What?", tab.upload(tmp_path / name))
        assert "The file is not an image in a supported format" in notice and str(tmp_path) not in notice


class TestFiles:
    @pytest.mark.parametrize("path", ["/etc/passwd", "{repo}/pyproject.toml", "{repo}/tinyllava_switchkd/serve/app.py"])
    def test_other_files_are_not_served(self, tab, path):
        path = path.format(repo=FOLDER.parents[2])
        for route in (f"/gradio_api/file={path}", f"/file={path}", f"/gradio_api/file={FOLDER}/../../{path}"):
            assert tab.client.get(route).status_code in (403, 404)

    def test_examples_are_served(self, tab, page):
        for index, (name, question) in enumerate(EXAMPLES):
            chosen = page.pick(None, type("Event", (), {"index": index}))
            assert chosen[page.question] == question and read_image(chosen[page.image]).width >= 32
            assert tab.client.get(f"/gradio_api/file={FOLDER / name}").status_code == 200

    def test_a_client_cannot_name_a_file_after_a_good_upload(self, tab, page, upload):
        tab.call(page.check_image, [None, upload])  # does not change the image, so Gradio recreates its component
        for path in ("http://127.0.0.1:1/image.png", "/etc/hostname"):
            with pytest.raises(RuntimeError, match="Images are uploaded, not fetched"):
                tab.call(page.ask, [None, file_data(path), "What?", 0.0, 1.0, 0, 1.0, 5])

    def test_uploads_are_opened_only_by_our_reader(self, tab, page, upload, monkeypatch):
        monkeypatch.setattr("gradio.image_utils.preprocess_image", None)
        tab.call(page.check_image, [None, upload])
        assert tab.ask("What is it?", upload)[1] == ""

    def test_no_handler_is_public(self, tab):
        info = tab.client.get("/gradio_api/info").json()
        assert info["named_endpoints"] == {} and info["unnamed_endpoints"] == {}


class TestEscaping:
    EVIL = "<img src=x onerror=alert(1)>${alert(2)}{{alert(3)}}'\"`\\ & <b>bold</b>"

    def test_text_of_users_and_models_is_escaped(self):
        reply = Reply(self.EVIL, (1,), "length", 0.1, 2.0, None, ())
        exchange = render.Exchange(
            self.EVIL, (), [render.Cell(0, self.EVIL, reply), render.Cell(1, "b", error=self.EVIL)]
        )
        slot = Slot(self.EVIL, error=self.EVIL)
        pages = [
            render.transcript([exchange]),
            render.notice(self.EVIL, "error"),
            render.header([slot]),
            render.token_caption(0, [self.EVIL], 0.5),
        ]
        for page in pages:
            assert "&lt;img src=x onerror=alert(1)&gt;" in page
            for bad in ("<img src=x", "<b>bold", "${", "{{", "`", "\\", 'onerror=alert(1)>"'):
                assert bad not in page

    def test_escaped_text_shows_the_same(self):
        import html

        assert html.unescape(render.escape(self.EVIL)) == self.EVIL


class TestPool:
    def test_states(self):
        gate = threading.Event()

        def load_slowly():
            gate.wait(10)
            return talker("A")

        def fail():
            raise ValueError("no such checkpoint")

        pool = ModelPool([Slot("A", load_slowly), Slot("B", fail)])
        assert [slot.state for slot in pool.slots] == ["waiting", "waiting"] and not pool.is_settled
        thread = pool.start()
        wait_until(lambda: pool.slots[0].state == "loading")
        assert [slot.state for slot in pool.slots] == ["loading", "waiting"] and not pool.ready
        assert re.search(r"loading, \d s", render.header(pool.slots)) and "waiting to be loaded" in render.header(
            pool.slots
        )
        with pytest.raises(ValueError, match="still loading"):
            next(Demo(pool).ask(Demo(pool).new_session(), None, "What?", {}))
        gate.set()
        thread.join()
        assert [slot.state for slot in pool.slots] == ["ready", "failed"] and pool.is_settled
        assert list(pool.ready) == [0]
        assert "could not be loaded: no such checkpoint" in render.header(pool.slots)

    def test_failing_model_does_not_affect_the_others(self, monkeypatch):
        good, bad = talker("Good"), talker("Bad")
        monkeypatch.setattr(bad.model, "generate", lambda *args, **kwargs: 1 / 0)
        demo = Demo(pool_of([bad, good]))
        session = demo.new_session()
        list(demo.ask(session, str(FOLDER / "fruit.png"), "What?", Sampling(max_new_tokens=5)))
        cells = session.exchanges[0].cells
        assert cells[0].error == "This model failed; the server's log has the details." and cells[1].reply.text


class TestCommandLine:
    def test_safe_by_default(self, monkeypatch, tmp_path):
        (tmp_path / "config.json").touch()
        args = app.build_parser().parse_args(["--model_path", str(tmp_path)])
        assert (args.host, args.share) == ("127.0.0.1", False)
        seen = {}
        page = app.build_page(args)
        monkeypatch.setattr(page.blocks, "launch", lambda **kwargs: seen.update(kwargs))
        launch(page, args.host, args.port, args.share, args.queue_size)
        assert seen["server_name"] == "127.0.0.1" and seen["share"] is False
        assert seen["allowed_paths"] == [str(FOLDER / name) for name, _ in EXAMPLES]
        assert seen["max_file_size"] == 10 * 2**20
        assert page.blocks._queue.max_size == 16

    def test_uploads_are_deleted_with_the_server(self, monkeypatch, tmp_path):
        (tmp_path / "config.json").touch()
        seen = []

        def launch(*args, **kwargs):
            seen.append(Path(os.environ["GRADIO_TEMP_DIR"]))
            assert seen[0].is_dir()
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(5)

        monkeypatch.setattr("tinyllava_switchkd.serve.page.launch", launch)
        monkeypatch.delenv("GRADIO_TEMP_DIR", raising=False)
        before = signal.getsignal(signal.SIGTERM)
        try:
            assert app.main(["--model_path", str(tmp_path)]) == 0
        finally:
            signal.signal(signal.SIGTERM, before)
            os.environ.pop("GRADIO_TEMP_DIR", None)
        assert seen and not seen[0].exists()

    @pytest.mark.parametrize(
        ("argv", "message"),
        [
            (["--model_path", "./nowhere"], "There is no checkpoint './nowhere'."),
            (["--model_path", "/tmp", "--compare", "/no/where/at/all"], "/no/where/at/all"),
            (["--model_path", "/tmp", "--names", "a", "b"], "--names takes one distinct name"),
            (["--model_path", "/tmp", "--temperature", "9"], "temperature must be a number"),
        ],
    )
    def test_bad_options_are_one_sentence(self, argv, message, capsys):
        assert app.main(argv) == 1
        error = capsys.readouterr().err
        assert error.count("error:") == 1 and message in error
