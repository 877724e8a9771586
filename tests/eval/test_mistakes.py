"""The page of mistakes shows the differences, escaped, and needs no other file."""

from __future__ import annotations

import base64
import io
import json
import re
import shutil

import pytest
from PIL import Image

from tests.eval.scorers import answer_rows, data_dir, write_rows
from tinyllava_switchkd.eval.benchmarks import BenchmarkFactory
from tinyllava_switchkd.eval.mistakes import SIDE, main, thumbnail
from tinyllava_switchkd.eval.score import score_file
from tinyllava_switchkd.eval.score import write_rows as write_verdicts


def test_the_page(tmp_path, capsys):
    data = shutil.copytree(data_dir("pope"), tmp_path / "pope")
    for question in BenchmarkFactory("pope").questions(data):
        question.image.parent.mkdir(exist_ok=True)
        Image.new("RGB", (900, 40), "red").save(question.image)
    rows = answer_rows("pope")
    first = score_file("pope", data, data / "answers.jsonl")
    changed = [
        row | {"text": "No <script>alert(1)</script>"} if place % 4 == 0 else row for place, row in enumerate(rows)
    ]
    second = score_file("pope", data, write_rows(tmp_path / "b.jsonl", changed))
    write_verdicts(first, tmp_path / "A" / "pope.rows.jsonl")
    write_verdicts(second, tmp_path / "BASE" / "pope.rows.jsonl")
    files = [str(tmp_path / model / "pope.rows.jsonl") for model in ("A", "BASE")]
    page = tmp_path / "page.html"
    assert main([*files, "--data_dir", str(data), "--output", str(page)]) == 0
    text = page.read_text(encoding="utf-8")
    pairs = list(zip(first.rows, second.rows, strict=True))
    kinds = {
        "lost": sum(a["value"] > b["value"] for a, b in pairs),
        "gained": sum(a["value"] < b["value"] for a, b in pairs),
        "wrong": sum(a["value"] == b["value"] == 0 for a, b in pairs),
    }
    assert {kind: text.count(f'data-kind="{kind}"') for kind in kinds} == kinds and kinds["lost"] > 0
    assert "only A right" in text and "only BASE right" in text
    assert f"{kinds['lost'] + kinds['gained']} questions that one of them has right" in capsys.readouterr().out
    assert "<script>alert" not in text and "&lt;script&gt;" in text
    assert not re.search(r'(src|href)="(?!data:)', text)  # self-contained
    assert text.count("data:image/jpeg") == text.count("<article>")

    (tmp_path / "other.jsonl").write_text(json.dumps({"benchmark": "gqa", "question_id": 1, "value": 1, "truth": "a"}))
    assert main([files[0], str(tmp_path / "other.jsonl"), "--data_dir", str(data), "--output", str(page)]) == 1
    assert "has verdicts of pope, but" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([*files, "--data_dir", str(data), "--output", str(page), "--limit", "0"])
    assert "--limit is 0" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("size", "shown"), [((900, 40), (SIDE, 14)), ((32, 32), (SIDE, SIDE)), ((200, 50), (200, 50)), ((1, 3), (106, 318))]
)
def test_pictures_are_shrunk_and_tiny_ones_enlarged(size, shown):
    file = io.BytesIO()
    Image.new("RGB", size, "red").save(file, "PNG")
    with Image.open(io.BytesIO(base64.b64decode(thumbnail(file.getvalue()).partition(",")[2]))) as picture:
        assert picture.size == shown
