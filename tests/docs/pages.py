"""The documentation as the tests read it: its pages, their code blocks, their headings."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"

_FENCE = re.compile(r"^```(?P<info>[^\n]*)\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL)


def read(page: str) -> str:
    """The text of a page, by its file name."""
    return (DOCS / page).read_text(encoding="utf-8")


def files_of(page: str) -> dict[str, str]:
    """The code blocks of a page that carry a ``title="file name"``."""
    files = {}
    for fence in _FENCE.finditer(read(page)):
        title = re.search(r'title="([^"]+)"', fence["info"])
        if title is not None:
            assert title[1] not in files, f"{page} has two blocks called {title[1]}"
            files[title[1]] = fence["code"]
    return files


def codes_of(page: str, language: str) -> list[str]:
    """The code blocks of a page in a language that have no file name."""
    return [fence["code"] for fence in _FENCE.finditer(read(page)) if fence["info"].strip() == language]


def without_code(text: str) -> str:
    """A page without its code blocks."""
    return _FENCE.sub("", text)


def section(page: str, heading: str) -> str:
    """What stands under a heading of a page, up to the next heading of its level or above."""
    lines, level, found = [], 0, False
    for line in read(page).splitlines():
        match = re.match(r"(#+) (.*)", line)
        if match and found and len(match[1]) <= level:
            break
        if found:
            lines.append(line)
        if match and match[2] == heading:
            found, level = True, len(match[1])
    assert found, f"{page} has no heading {heading!r}"
    return "\n".join(lines)


def first_cells(markdown: str) -> list[str]:
    """First cell of every row of the tables in a text, header rows left out."""
    rows = [line for line in markdown.splitlines() if line.startswith("|")]
    heads = {rows[index - 1] for index, row in enumerate(rows) if re.fullmatch(r"[|:\- ]+", row)}
    return [row.split("|")[1].strip() for row in rows if row not in heads and not re.fullmatch(r"[|:\- ]+", row)]


def import_from(folder: Path, file: str, code: str) -> ModuleType:
    """Write a file and import it, under a name of its own."""
    path = folder / file
    path.write_text(code, encoding="utf-8")
    name = f"docs_plugin_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module
