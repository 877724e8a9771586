"""Files are written completely or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest

from tinyllava_switchkd.io import atomic_file, write_jsonl


def test_interrupted_write_leaves_nothing(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("old")
    with pytest.raises(RuntimeError), atomic_file(path) as file:
        file.write(b"half")
        raise RuntimeError
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_jsonl_keeps_text_readable(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", [{"text": "图"}, {"text": "a\nb"}])
    assert (tmp_path / "a.jsonl").read_text(encoding="utf-8") == '{"text": "图"}\n{"text": "a\\nb"}\n'
