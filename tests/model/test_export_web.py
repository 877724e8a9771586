"""The page of playground/web and Node: the same pixels and answers as Python, streamed, offline, on a phone's window.

``bash scripts/export/check_web.sh`` prepares what these need (npm's package, a student) and runs them; without it they
are skipped. `WEB_ROOT` is the folder that scripts/web_demo.sh filled.
"""

import functools
import http.server
import json
import os
import shutil
import subprocess
import threading
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).parents[2]
WEB = Path(os.environ.get("WEB_ROOT", ROOT / "playground" / "web"))
STUDENT = WEB / "models" / "student"
CHROMIUM = shutil.which("chromium")
NODE = shutil.which("node")
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]
FLAGS += ["--disable-component-update", "--disable-sync"]
QUESTIONS = int(os.environ.get("WEB_QUESTIONS", "24"))

needs_web = pytest.mark.skipif(not (STUDENT / "config.json").is_file(), reason="run scripts/export/check_web.sh")
needs_node = pytest.mark.skipif(NODE is None, reason="needs Node.js")

IN_NODE = """
import { readFileSync } from 'node:fs';
import { preprocess } from '%s/preprocess.js';
for (const { file, width, height, processor, aspect } of JSON.parse(readFileSync(process.argv[2], 'utf-8'))) {
  const image = { data: new Uint8ClampedArray(readFileSync(file)), width, height };
  process.stdout.write(Buffer.from(preprocess(image, processor, aspect).data.buffer));
}
"""


PAGE = """
import { readFileSync } from 'node:fs';
import vm from 'node:vm';
const [vision_config, text_config] = [{ model_type: 'a' }, { model_type: 'b' }];
const config = { vision_config, text_config, tinyllava: { dtypes: ['fp32'] } };
const elements = {};
const element = (id) => (elements[id] ??= {
  children: [], files: [], value: '8', classList: { toggle() {}, add() {}, remove() {} },
  append() {}, add() {}, replaceChildren() {}, scrollIntoView() {}, getContext: () => ({ drawImage() {} }),
});
const posted = [];
let worker;
class Worker {
  constructor() { worker = this; }
  postMessage({ kind, history = null }) { posted.push([kind, history && [...history]]); }
}
const page = {
  document: { getElementById: element, createElement: () => element(Symbol()) },
  navigator: {}, Worker, Promise, setTimeout, Option: class {}, createImageBitmap: async () => ({}),
  fetch: async (address) => ({ ok: address.endsWith('config.json'), json: async () => config }),
};
vm.runInNewContext(readFileSync(process.argv[2], 'utf-8'), page);
const later = () => new Promise((done) => setTimeout(done));
await later();
worker.onmessage({ data: { kind: 'ready' } });
for (const question of ['What animal?', 'What colour?', 'And now?']) {
  if (question !== 'And now?') {
    element('file').files = [{}];
    element('file').onchange();
    await later();
  }
  if (question === 'What colour?') worker.onmessage({ data: { kind: 'answer', text: 'A cat.', first: 1 } });
  element('question').value = question;
  element('form').onsubmit({ preventDefault() {} });
  await later();
  if (question === 'What colour?') worker.onmessage({ data: { kind: 'answer', text: 'Red.', first: 1 } });
}
console.log(JSON.stringify(posted));
"""


@needs_node
def test_a_written_placeholder_is_not_counted(tmp_path):
    (tmp_path / "run.mjs").write_text(f"""
import {{ Student }} from '{ROOT / "playground" / "web"}/student.js';
const tokenizer = {{ apply_chat_template: (messages) => messages.map(({{ content }}) => content).join('|') }};
const student = new Student(null, {{ config: {{ tinyllava: {{}}, image_seq_length: 2 }} }}, tokenizer, null);
const history = [['<image> Hi', 'An <image>.']];
console.log(JSON.stringify([true, false].map((shown) => student.prompt('<image>?', shown, history))));
""")
    told = subprocess.run([NODE, "run.mjs"], cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    assert json.loads(told) == ["<image><image>\nHi|An < image>.|< image>?", "< image> Hi|An < image>.|< image>?"]


@needs_node
def test_the_answer_about_the_picture_before_is_not_in_the_conversation(tmp_path):
    (tmp_path / "page.mjs").write_text(PAGE)
    done = subprocess.run([NODE, str(tmp_path / "page.mjs"), str(WEB / "app.js")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [
        ["load", None],
        ["ask", []],
        ["stop", None],
        ["ask", []],
        ["ask", [["What colour?", "Red."]]],
    ]


@needs_node
@pytest.mark.parametrize("tower", ["siglip", "clip", "dinov2"])
@pytest.mark.parametrize("aspect", ["square", "pad"])
def test_pixels_are_pillows(tower, aspect, tmp_path):
    """playground/web/preprocess.js against `ImagePreprocess`: enlarged, made smaller, odd sizes, extreme shapes."""
    from types import SimpleNamespace

    from tests.tiny import tiny_vision_config
    from tinyllava_switchkd.data import ImagePreprocess
    from tinyllava_switchkd.model.vision_tower import VisionTowerFactory

    processor = VisionTowerFactory(tower)(tiny_vision_config(tower)).default_image_processor()
    ours = ImagePreprocess(processor, SimpleNamespace(image_aspect_ratio=aspect))
    cases, expected = [], []
    for index, (width, height) in enumerate([(28, 28), (50, 30), (31, 64), (320, 240), (9, 11), (200, 17), (29, 28)]):
        pixels = np.random.default_rng(index).integers(0, 256, (height, width, 3), dtype=np.uint8)
        (tmp_path / f"{index}.rgb").write_bytes(pixels.tobytes())
        settings = json.loads(processor.to_json_string()) | {"resample": (3, 2, 1)[index % 3]}
        ours.image_processor.resample, ours._shortcut._resample = settings["resample"], settings["resample"]
        cases.append({"file": str(tmp_path / f"{index}.rgb"), "width": width, "height": height})
        cases[-1] |= {"processor": settings, "aspect": aspect}
        expected.append(ours(Image.fromarray(pixels)).numpy().ravel())
    (tmp_path / "cases.json").write_text(json.dumps(cases))
    (tmp_path / "run.mjs").write_text(IN_NODE % (ROOT / "playground" / "web"))
    command = [NODE, str(tmp_path / "run.mjs"), str(tmp_path / "cases.json")]
    found = np.frombuffer(subprocess.run(command, capture_output=True, check=True).stdout, np.float32)
    # One grey level is 1 / (255 * 0.23) > 0.01: every pixel is the same one of 256; the rest is rounding of its value.
    assert np.abs(found - np.concatenate(expected)).max() < 1e-6


def questions():
    """(question, image) of the student's samples."""
    samples = json.loads((WEB / "models" / "samples.json").read_text())
    texts = [" ".join(text.split()) for text in samples["questions"]]  # the page's field holds one line
    pairs = [(text, WEB / "models" / image) for image in samples["images"] for text in texts]
    return pairs[:QUESTIONS]


@pytest.fixture(scope="module")
def expected():
    """Python's answers, by the graphs in onnxruntime, which tests/model/test_export_onnx.py holds against torch."""
    from tinyllava_switchkd.model.export.onnx_student import OnnxStudent

    student = OnnxStudent(STUDENT, threads=1)
    return [student.chat(text, Image.open(file).convert("RGB"), max_new_tokens=32) for text, file in questions()]


@needs_web
@needs_node
@pytest.mark.slow
def test_the_same_answers_in_node(expected, tmp_path):
    rows = [{"text": text, "image": str(file.relative_to(WEB / "models"))} for text, file in questions()]
    (tmp_path / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = [NODE, str(WEB / "check_node.mjs"), str(STUDENT), str(tmp_path / "questions.jsonl"), str(WEB / "models")]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
    assert [json.loads(line)["answer"] for line in result.stdout.splitlines()] == expected


@pytest.fixture
def site():
    """The folder on a port of 127.0.0.1: (address, the server)."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(WEB)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/", server
    server.shutdown()
    server.server_close()


SETTLED = """() => document.getElementById('status').textContent === 'Ready.'
    || document.getElementById('status').classList.contains('error')"""


@needs_web
@pytest.mark.slow
@pytest.mark.browser
@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")
def test_the_same_answers_in_chromium_and_offline(site, expected, tmp_path):
    sync_api = pytest.importorskip("playwright.sync_api")
    address, server = site
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS, timeout=240_000)
        page = browser.new_page(viewport={"width": 390, "height": 844})  # a phone's
        page.set_default_timeout(240_000)
        errors = []
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(address)
        page.wait_for_function(SETTLED, timeout=240_000)
        assert page.inner_text("#status") == "Ready."
        assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")

        found, rates = [], []
        page.evaluate("""() => { window.grown = 0; new MutationObserver(() => window.grown++).observe(
            document.getElementById('turns'), { subtree: true, childList: true, characterData: true }); }""")

        def ask(text, file):
            page.set_input_files("#file", file)
            page.wait_for_function("document.getElementById('turns').children.length === 0")
            page.fill("#question", text)
            page.click("#ask")
            page.wait_for_function("document.querySelector('.answer small')?.textContent", timeout=240_000)
            rates.append(page.inner_text(".answer small"))
            return page.text_content(".answer span")

        for text, file in questions():
            found.append(ask(text, file))
        assert found == expected
        assert all("tokens" in line and " s" in line for line in rates) and any("tokens/s" in line for line in rates)
        assert page.evaluate("window.grown") > 3 * len(found)  # answers grow while they are written
        page.screenshot(path=tmp_path / "phone.png", full_page=True)

        server.shutdown()
        server.server_close()
        page.reload()
        page.wait_for_function(SETTLED, timeout=240_000)
        assert page.inner_text("#status") == "Ready." and ask(*questions()[0]) == expected[0]
        page.set_viewport_size({"width": 1200, "height": 800})
        page.screenshot(path=tmp_path / "desktop.png")
        if os.environ.get("WEB_SHOTS"):
            for name in ("phone.png", "desktop.png"):
                shutil.copy(tmp_path / name, os.environ["WEB_SHOTS"])
        assert not errors
        browser.close()
