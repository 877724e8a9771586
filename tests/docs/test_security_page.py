"""SECURITY.md: each promise names a test, and the test is there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ROWS = [line for line in (ROOT / "SECURITY.md").read_text().splitlines() if line.startswith("| ")]
ROWS = [row for row in ROWS if not row.startswith(("| promise", "|---"))]
NAMES = sorted({name for row in ROWS for name in re.findall(r"`(tests/[^`]+)`", row)})


def test_every_promise_has_one():
    assert len(ROWS) >= 15 and all("`tests/" in row.rsplit(" | ", 1)[1] for row in ROWS)


@pytest.mark.parametrize("name", NAMES)
def test_it_is_there(name):
    path, _, test = name.partition("::")
    text = (ROOT / path).read_text()
    assert re.search(rf"(def|class) {test}\b" if test else r"def test_", text), name
