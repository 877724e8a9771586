"""Fixtures of the scorer tests: one synthetic case per benchmark, scored by the official scorers."""

from __future__ import annotations

import json
from pathlib import Path

FIXTURES = Path(__file__).parents[1] / "fixtures" / "scorers"

FOLDERS = {
    "mme": "MME",
    "mmbench": "mmbench",
    "mmbench_cn": "mmbench_cn",
    "vqav2": "vqav2",
    "gqa": "gqa",
    "scienceqa": "scienceqa",
    "mmmu": "MMMU",
    "textvqa": "textvqa",
    "vizwiz": "vizwiz",
    "pope": "pope",
}


def data_dir(name: str) -> Path:
    """The benchmark's fixture folder."""
    return FIXTURES / FOLDERS[name]


def expected(name: str) -> dict:
    """The official scorers' results."""
    return json.loads((data_dir(name) / "expected.json").read_text(encoding="utf-8"))


def answer_rows(name: str, file_name: str = "answers.jsonl") -> list[dict]:
    """The fixture's answers."""
    text = (data_dir(name) / file_name).read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines() if line]


def write_rows(path: Path, rows: list[dict]) -> Path:
    """A JSONL file."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path
