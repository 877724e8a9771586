"""The version is the same everywhere."""

from __future__ import annotations

import re
from pathlib import Path

import tinyllava_switchkd

ROOT = Path(__file__).parents[1]


def test_one_version():
    version = tinyllava_switchkd.__version__
    assert f'version = "{version}"' in (ROOT / "pyproject.toml").read_text()
    assert f"version: {version}\n" in (ROOT / "CITATION.cff").read_text()
    assert re.search(rf"^## {re.escape(version)}", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
