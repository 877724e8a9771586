"""benchmarks/: sections of docs/benchmarks.md, and the measurement of the evaluation on a few questions."""

from __future__ import annotations

import argparse
import json
import re

from benchmarks import eval_throughput
from benchmarks._table import ROOT, machine, markdown, write_section


def test_a_section_replaces_its_own_and_leaves_the_others(tmp_path, capsys):
    page = tmp_path / "docs" / "benchmarks.md"
    header = ["what", "seconds"]
    write_section("a", "First", [(header, [["x", 1]])], "a machine", note="A note.", document=page)
    write_section("b", "Second", [(header, [["y", 2]]), (header, [["z", 3]])], "a machine", document=page)
    write_section("a", "First again", [(header, [["x", 4]])], "a machine", document=page)
    text = page.read_text(encoding="utf-8")
    assert text.startswith("# Benchmarks\n")
    assert [line for line in text.splitlines() if line.startswith("## ")] == ["## First again", "## Second"]
    assert text.count("<!-- begin: a -->") == text.count("<!-- end: a -->") == 1
    assert "A note." not in text
    assert "| x    |       4 |" in text
    assert "a machine. Made by `python -m " in text
    assert "## First again" in capsys.readouterr().out


def test_tables_are_aligned():
    assert markdown(["a", "bb"], [["long", 1], ["x", 222]]).splitlines() == [
        "| a    |  bb |",
        "| ---- | --: |",
        "| long |   1 |",
        "| x    | 222 |",
    ]
    assert "torch" in machine()


def test_batches_are_measured_against_the_same_answers(tmp_path):
    args = argparse.Namespace(device="cpu", questions=12, batch_sizes=[4], repeats=1)
    (_, rows), (_, of_one_token) = eval_throughput.measure("tiny", args, tmp_path)[0]
    assert [row[0] for row in rows] == ["one at a time", "batch size 4"]
    assert rows[0][2] == of_one_token[0][2] == "1.00"
    assert len(of_one_token) == 2


def test_the_loss_figures_are_those_stored():
    rows = json.loads((ROOT / "docs" / "loss_ratios.json").read_text())
    page, readme = (ROOT / "docs" / "benchmarks.md").read_text(), (ROOT / "README.md").read_text()
    assert {(row["threads"], row["torch"]) for row in rows} == {
        (int(threads), version) for threads, version in re.findall(r"(\d) threads?, (2[.\d]+) ", page)
    }
    assert all(f" {row['ratio']:.2f} " in page for row in rows)
    for kind in ("simulated", "skewed"):
        found = [row["ratio"] for row in rows if row["logits"] == kind]
        assert f"| {min(found):.2f} to {max(found):.2f} |" in readme
