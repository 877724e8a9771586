"""The web demo in a real browser: headless Chromium, driven by Playwright, on a desktop and a phone-sized window."""

from __future__ import annotations

import os
import re
import shutil
import zlib
from pathlib import Path

import pytest

from tests.serve.tab import serving
from tests.serve.talkers import picture, pool_of, talker
from tinyllava_switchkd.serve.conversation import Sampling
from tinyllava_switchkd.serve.demo import Demo
from tinyllava_switchkd.serve.page import Page
from tinyllava_switchkd.serve.pool import ModelPool, Slot

CHROMIUM = os.environ.get("CHROMIUM") or next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
playwright_api = pytest.importorskip("playwright.sync_api", reason="no browser tests: playwright is not installed")
expect = playwright_api.expect
PATIENCE = 180_000  # milliseconds; on a busy machine Chromium takes half a minute to start
expect.set_options(timeout=PATIENCE)

pytestmark = [
    pytest.mark.browser,
    pytest.mark.xdist_group("browser"),
    pytest.mark.skipif(CHROMIUM is None, reason="no browser tests: Chromium was not found; set CHROMIUM to its path"),
]

FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
DESKTOP, PHONE = {"width": 1300, "height": 900}, {"width": 390, "height": 844}
EVIL = "<img src=x onerror=alert(1)> <b>bold</b> **bold** ${alert(2)} {{constructor.constructor('alert(3)')()}}"


@pytest.fixture(scope="module")
def browser():
    with playwright_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS, timeout=PATIENCE)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def url():
    models = [talker("Student", 0, 0.01), talker("Teacher", 1, 0.02)]
    with serving(Page(Demo(pool_of(models)), Sampling(max_new_tokens=20))) as url:
        yield url


@pytest.fixture
def photo(tmp_path, request):
    seed = zlib.crc32(request.node.name.encode())  # a different file for each test: servers share a folder by content
    picture(seed % 1000, (400, 300)).save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


class User:
    """A user of the page."""

    def __init__(self, browser, url: str, **context) -> None:
        self.url, self.problems, self.elsewhere = url, [], []
        self.context = browser.new_context(**{"viewport": DESKTOP, **context})
        self.context.set_default_timeout(PATIENCE)
        self.page = self.context.new_page()
        self.page.on("pageerror", lambda error: self.problems.append(str(error)))
        self.page.on("dialog", lambda dialog: (self.problems.append(dialog.message), dialog.dismiss()))
        self.page.on("request", self._note)
        self.page.goto(url)
        expect(self.at("#tl-send")).to_be_visible()

    def _note(self, request) -> None:
        if not request.url.startswith((self.url, "data:", "blob:")):
            self.elsewhere.append(request.url)

    def at(self, selector: str):
        return self.page.locator(selector)

    def upload(self, path: Path) -> None:
        self.at("#tl-image input[type=file]").first.set_input_files(path)
        expect(self.at("#tl-image img")).to_be_visible()

    def ask(self, question: str) -> None:
        self.at("#tl-question textarea").fill(question)
        self.at("#tl-send").click()

    def wait(self, answers: int) -> None:
        """Wait until this many answers are complete."""
        expect(self.at(".tl-answer footer span:last-child")).to_have_count(answers)
        expect(self.at(".tl-caret")).to_have_count(0)
        expect(self.at("#tl-send")).to_be_enabled()

    def answers(self) -> list[str]:
        return self.at(".tl-text").all_inner_texts()

    def shot(self, name: str) -> None:
        """Take a screenshot if they are requested."""
        if folder := os.environ.get("TINYLLAVA_SCREENSHOTS"):
            self.page.wait_for_timeout(400)
            self.page.screenshot(path=Path(folder) / f"{name}.png", full_page=True)

    def overflow(self) -> int:
        """Pixels by which the page is wider than the window."""
        return self.page.evaluate("document.documentElement.scrollWidth - window.innerWidth")

    def leave(self) -> None:
        assert self.problems == [] and self.elsewhere == []
        self.context.close()


@pytest.fixture
def user(browser, url):
    user = User(browser, url)
    yield user
    user.leave()


def test_upload_ask_and_follow_up_side_by_side(user, photo):
    user.shot("1_start")
    user.upload(photo)
    user.ask("What is this?")
    user.wait(2)
    assert user.at(".tl-answer h3").all_inner_texts() == ["Student", "Teacher"]
    first = user.answers()
    assert all(first) and first[0] != first[1]
    for footer in user.at(".tl-answer footer").all_inner_texts():
        assert re.search(r"\d+ ms to first token\s+[\d.]+ tokens/s\s+20 tokens\s+cut at the maximum length", footer)
    assert user.at("#tl-question textarea").input_value() == ""
    user.at("#tl-question textarea").fill("And why?")
    user.page.keyboard.press("Enter")
    user.wait(4)
    assert user.answers()[:2] == first
    assert user.at(".tl-ask p").all_inner_texts() == ["What is this?", "And why?"]
    assert user.at(".tl-ask img").count() == 1
    assert user.overflow() <= 0
    user.shot("2_compare")
    user.at("#tl-clear").click()
    expect(user.at(".tl-empty")).to_be_visible()


def test_paste(user):
    user.context.grant_permissions(["clipboard-read", "clipboard-write"])
    user.page.evaluate(
        """async () => {
            const canvas = Object.assign(document.createElement('canvas'), {width: 60, height: 40});
            const blob = await new Promise(done => canvas.toBlob(done, 'image/png'));
            await navigator.clipboard.write([new ClipboardItem({'image/png': blob})]);
        }"""
    )
    user.at("#tl-image button[aria-label='Paste from clipboard']").click()
    expect(user.at("#tl-image img")).to_be_visible()
    user.ask("What was pasted?")
    user.wait(2)


def test_example(user):
    user.at("#tl-examples .gallery-item button").nth(4).click()
    expect(user.at("#tl-question textarea")).to_have_value("What lies to the left of the banana?")
    expect(user.at("#tl-image img")).to_be_visible()
    user.at("#tl-send").click()
    user.wait(2)
    user.at("#tl-examples .gallery-item button").nth(3).click()
    expect(user.at("#tl-notice [role=status]")).to_contain_text("added to the conversation")
    expect(user.at("#tl-question textarea")).to_have_value(re.compile("How many trees"))
    user.at("#tl-send").click()
    user.wait(4)
    assert user.at(".tl-ask img").count() == 2
    expect(user.at("#tl-notice [role=status]")).to_have_count(0)


def test_stop(browser, photo):
    page = Page(Demo(pool_of([talker("Slow", 0, 0.3), talker("Never", 1)])), Sampling(max_new_tokens=400))
    with serving(page) as url:
        user = User(browser, url)
        user.upload(photo)
        expect(user.at("#tl-stop")).to_be_disabled()
        user.ask("Tell me everything.")
        expect(user.at(".tl-answer footer").first).to_contain_text("tokens/s")
        expect(user.at("#tl-send")).to_be_disabled()
        user.shot("3_streaming")
        user.at("#tl-stop").click()
        expect(user.at(".tl-answer footer").first).to_contain_text("stopped")
        expect(user.at(".tl-answer").nth(1)).to_contain_text("no answer")
        expect(user.at("#tl-send")).to_be_enabled()
        assert 0 < len(user.answers()[0]) < 350
        user.leave()


def test_repeated_clicks_ask_once(user, photo):
    user.upload(photo)
    user.at("#tl-question textarea").fill("Once?")
    user.at("#tl-send").dblclick(delay=60)
    user.wait(2)
    user.at("#tl-question textarea").fill("And once more?")
    for _ in range(3):
        user.page.keyboard.press("Enter")
    user.wait(4)
    assert user.at(".tl-ask p").all_inner_texts() == ["Once?", "And once more?"]


def test_waiting_for_others(browser, tmp_path):
    page = Page(Demo(pool_of([talker("Slow", 0, 0.1)])), Sampling(max_new_tokens=400))
    with serving(page, queue_size=1) as url:
        first, second, third = (User(browser, url) for _ in range(3))
        for seed, user in enumerate((first, second, third)):
            picture(seed, (90, 70)).save(tmp_path / f"{seed}.png")
            user.upload(tmp_path / f"{seed}.png")
        first.ask("Me first.")
        expect(first.at(".tl-caret")).to_be_visible()
        second.ask("Me too.")
        expect(second.at("#tl-notice [role=status]")).to_contain_text("Others are being answered first")
        expect(second.at("#tl-send")).to_be_disabled()
        third.ask("And me.")
        expect(third.at("#tl-notice [role=alert]")).to_contain_text("too many people are asking")
        expect(third.at("#tl-send")).to_be_enabled()
        assert third.at("#tl-question textarea").input_value() == "And me."
        second.at("#tl-stop").click()  # stopped before its turn
        expect(second.at("#tl-stop")).to_be_disabled()
        first.at("#tl-stop").click()
        expect(second.at(".tl-answer")).to_contain_text("no answer")
        expect(second.at("#tl-send")).to_be_enabled()
        third.ask("And me.")
        expect(third.at(".tl-caret")).to_be_visible()
        third.at("#tl-stop").click()
        third.wait(1)
        for user in (first, second, third):
            user.leave()


def test_an_upload_during_an_answer_waits_for_the_next_question(browser, photo, tmp_path):
    page = Page(Demo(pool_of([talker("Slow", 0, 0.05)])), Sampling(max_new_tokens=400))
    picture(1, (90, 70)).save(tmp_path / "next.png")
    with serving(page) as url:
        user = User(browser, url)
        user.upload(photo)
        user.ask("First?")
        expect(user.at(".tl-answer footer")).to_contain_text("tokens/s")
        user.at("#tl-image button[aria-label='Remove Image']").click()
        user.upload(tmp_path / "next.png")
        notice = user.at("#tl-notice [role=status]")
        expect(notice).to_contain_text("added to the conversation")
        user.at("#tl-stop").click()
        user.wait(1)
        expect(notice).to_contain_text("added to the conversation")
        user.ask("Second?")
        expect(user.at(".tl-ask img")).to_have_count(2)
        user.at("#tl-stop").click()
        user.wait(2)
        user.leave()


def test_attention_map(user, photo):
    user.at("#tl-attend").click()
    expect(user.at("#tl-attention-notice [role=alert]")).to_contain_text("Student has not answered yet")
    user.upload(photo)
    user.ask("Where?")
    user.wait(2)
    user.at("#tl-attend").click()
    tokens, caption, image = user.at("#tl-tokens .score-token"), user.at("#tl-caption"), user.at("#tl-picture img")
    expect(tokens).to_have_count(20)
    expect(caption).to_contain_text("the whole answer")
    expect(image).to_be_visible()
    whole = image.get_attribute("src")
    tokens.nth(4).click()
    expect(caption).to_contain_text("token 5 of 20")
    expect(image).not_to_have_attribute("src", whole)
    user.page.wait_for_function("document.querySelector('#tl-picture img').naturalWidth >= 400")
    user.at("#tl-position input[type=range]").press("ArrowRight")
    expect(caption).to_contain_text("token 6 of 20")
    user.shot("4_attention")
    user.at("#tl-which label").nth(1).click()  # the teacher's
    expect(caption).to_contain_text("the whole answer")
    expect(image).not_to_have_attribute("src", whole)
    user.ask("And now?")  # the map belonged to the previous answer
    expect(user.at("#tl-picture")).to_have_count(0)
    user.wait(4)


def test_phone(browser, url, photo):
    user = User(browser, url, viewport=PHONE, has_touch=True, is_mobile=True, device_scale_factor=2)
    assert user.overflow() <= 0
    user.upload(photo)
    user.ask("What is this?")
    user.wait(2)
    user.at("#tl-attend").tap()
    expect(user.at("#tl-picture img")).to_be_visible()
    user.at("#tl-tokens .score-token").nth(2).tap()
    expect(user.at("#tl-caption")).to_contain_text("token 3 of 20")
    user.shot("5_phone")
    assert user.overflow() <= 0
    for selector in ("#tl-image", "#tl-examples", "#tl-chat", "#tl-question", "#tl-send", "#tl-stop", "#tl-picture"):
        box = user.at(selector).bounding_box()
        assert box["x"] >= 0 and box["x"] + box["width"] <= PHONE["width"] and box["height"] >= 36
    cards = [card.bounding_box() for card in user.at(".tl-answer").all()]
    assert cards[0]["y"] + cards[0]["height"] <= cards[1]["y"]  # cards are stacked
    user.leave()


def test_text_is_text(user, photo):
    user.upload(photo)
    user.ask(EVIL)
    user.wait(2)
    assert user.at(".tl-ask p").inner_text() == EVIL
    assert user.at(".tl-ask p *").count() == 0
    user.page.wait_for_timeout(300)  # `leave` fails if a dialog was opened


def test_bad_input_is_explained(user, tmp_path):
    user.ask("What is this?")
    alert = user.at("#tl-notice [role=alert]")
    expect(alert).to_have_text("There is no image yet: upload or paste one, or pick an example.")
    assert user.at("#tl-question textarea").input_value() == "What is this?"  # nothing typed is lost
    (tmp_path / "fake.png").write_text("no image")
    user.at("#tl-image input[type=file]").first.set_input_files(tmp_path / "fake.png")
    expect(alert).to_contain_text("The file is not an image in a supported format")
    expect(user.at("#tl-image img")).to_have_count(0)
    user.shot("6_bad_input")


def test_while_loading(browser):
    import threading

    gate = threading.Event()

    def load():
        gate.wait(30)
        return talker("Student")

    def fail():
        raise ValueError("<b>teacher</b> is no TinyLLaVA checkpoint.")

    pool = ModelPool([Slot("Student", load), Slot("Teacher", fail)])
    pool.start()
    with serving(Page(Demo(pool))) as url:
        user = User(browser, url, color_scheme="dark")
        expect(user.at(".tl-model").first).to_contain_text(re.compile(r"loading, \d+ s"))
        expect(user.at("#tl-send")).to_be_disabled()
        user.shot("7_loading_dark")
        gate.set()
        expect(user.at("#tl-send")).to_be_enabled()
        expect(user.at(".tl-model").first).to_contain_text("parameters")
        expect(user.at(".tl-model").nth(1)).to_contain_text("<b>teacher</b> is no TinyLLaVA checkpoint.")
        user.leave()


def test_two_users_do_not_mix(browser, url, tmp_path):
    users = [User(browser, url) for _ in range(2)]
    for index, user in enumerate(users):
        picture(index).save(tmp_path / f"{index}.png")
        user.upload(tmp_path / f"{index}.png")
    for index, user in enumerate(users):
        user.ask(f"I am user {index}.")
    for index, user in enumerate(users):
        user.wait(2)
        assert user.at(".tl-ask p").all_inner_texts() == [f"I am user {index}."]
    assert users[0].answers() != users[1].answers()
    for user in users:
        user.leave()
