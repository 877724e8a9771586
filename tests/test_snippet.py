"""The code in the README, docs/python.md and docs/export.md runs as written."""

import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file

from tests.tiny import tiny_llava, tiny_tokenizer
from tinyllava_switchkd.model import save_pretrained_model
from tinyllava_switchkd.model.export.__main__ import main

ROOT = Path(__file__).parents[1]
PAGES = [page for page in (ROOT / "README.md", ROOT / "docs" / "python.md") if page.is_file()]


def blocks(page, language="python"):
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def write_checkpoint(folder):
    model = tiny_llava()
    processor = model.vision_tower.image_processor
    save_pretrained_model(model, tiny_tokenizer(), processor, folder, template="qwen2_base")


def write_picture(file):
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 30, 3), dtype=np.uint8)).save(file)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_runs_as_written(page, tmp_path, monkeypatch):
    """All blocks in turn, in a folder with the checkpoints and pictures that they name."""
    monkeypatch.chdir(tmp_path)
    code = blocks(page)
    for name in set(re.findall(r'(?:from_pretrained|load_pretrained_model)\("([^"]+)"', "".join(code))):
        write_checkpoint(name)
    for name in set(re.findall(r'"([^"]+\.(?:jpg|png))"', "".join(code))):
        write_picture(name)
    names = {}
    for block in code:
        exec(compile(block, str(page), "exec"), names)


def test_the_short_one_is_short():
    """The README promises five lines."""
    assert len(blocks(ROOT / "docs" / "python.md")[0].splitlines()) == 5


def test_export_and_back_as_written(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    page = ROOT / "docs" / "export.md"
    write_checkpoint("path/to/student")
    write_picture("cat.jpg")
    export, back = (shlex.split(block) for block in blocks(page, "bash"))
    for command in (export, back):
        assert command[:3] == ["python", "-m", "tinyllava_switchkd.model.export"]
    main(export[3:])
    (code,) = blocks(page)
    exec(compile(code, str(page), "exec"), {})
    assert capsys.readouterr().out.strip()
    main(back[3:])
    before, after = (load_file(Path("path/to", name, "model.safetensors")) for name in ("student", "returned"))
    assert before.keys() == after.keys() and all((before[name] == after[name]).all() for name in before)
