"""Ids of a data set on the hub name files, but none of them leads out of the benchmark's folder."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from tests.eval.fake_hub import FakeHub
from tests.eval.hub_rows import BENCHMARKS
from tests.eval.hub_schemas import write_parquet
from tests.eval.miniature import write_benchmark
from tests.eval.scorers import data_dir
from tests.eval.test_prepare import hub, prepare  # noqa: F401 (a fixture)
from tinyllava_switchkd.eval.benchmarks import BenchmarkFactory
from tinyllava_switchkd.eval.benchmarks.files import picture_path

FIELDS = {
    "gqa": "id",
    "textvqa": "image_id",
    "vizwiz": "question_id",
    "mmmu": "id",
    "mme": "category",
    "pope": "image_source",
}


@pytest.mark.parametrize("name", FIELDS)
@pytest.mark.parametrize("away", ["../../../../away", "{}/away", "a/../../../../../away"])
def test_an_id_that_leads_away(name: str, away: str, hub: FakeHub, tmp_path: Path, capsys) -> None:  # noqa: F811
    away = away.format(tmp_path)
    changed = 0
    for file, (schema, rows) in BENCHMARKS[name][2](data_dir(name)).items():
        rows = [dict(row) for row in rows]
        for row in rows:
            if FIELDS[name] in row and "image" in "".join(row):
                row[FIELDS[name]] = away
                changed += 1
        write_parquet(hub.folder(BENCHMARKS[name][1]) / file, schema, rows)
    assert changed
    before = {path for path in tmp_path.rglob("*") if "eval" not in path.parts and "cache" not in path.parts}
    code = prepare(tmp_path, name, "--source", "hf")
    assert code != 0 or away.startswith("/")  # an absolute one ends up below the folder, harmless
    after = {path for path in tmp_path.rglob("*") if "eval" not in path.parts and "cache" not in path.parts}
    assert after == before and "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize("name", ["gqa", "mme", "mmmu", "pope", "scienceqa", "textvqa", "vizwiz", "vqav2"])
@pytest.mark.parametrize("image", ["{}/away.png", "../away.png", "a/../../away.png"])
def test_a_question_names_no_picture_elsewhere(name: str, image: str, tmp_path: Path) -> None:
    """Question files may come from others, and a page of mistakes would show the picture."""
    folder = write_benchmark(name, tmp_path)
    benchmark = BenchmarkFactory(name)
    asked = next(question for question in benchmark.questions(folder) if question.images)
    old = asked.images[0].name
    for file in [file for file in folder.rglob("*.json*") if file.is_file()]:
        text = file.read_text()
        new = re.sub(rf'"[^"]*{re.escape(old)}"', json.dumps(image.format(tmp_path)), text)
        file.write_text(new)
    with pytest.raises(ValueError, match=r"away\.png' lies outside"):
        list(benchmark.questions(folder))


def test_names_within_the_folder_are_taken(tmp_path: Path) -> None:
    for name in ("a.png", "a/b.png", "./a.png", "a/../b.png", "..a.png"):
        assert picture_path(tmp_path, name, "here") == tmp_path / name
