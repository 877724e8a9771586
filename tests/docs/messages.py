"""Every text that the program can print, with a mark where a value goes in."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

from tests.docs.pages import ROOT

VALUE = "\0"


def _text(node: ast.AST) -> str | None:
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else None
    if isinstance(node, ast.JoinedStr):
        return "".join(_text(part) or VALUE for part in node.values)
    if isinstance(node, ast.BinOp):
        return (_text(node.left) or VALUE) + (_text(node.right) or VALUE)
    return None


def texts() -> Iterator[str]:
    """String literals of the package (adjacent ones joined), and lines of the scripts."""
    for path in (ROOT / "tinyllava_switchkd").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            text = _text(node)
            if text:
                yield re.sub(r"%[sdr]|%\.\d+f", VALUE, text)
    for path in (ROOT / "scripts").rglob("*.sh"):
        for line in path.read_text(encoding="utf-8").splitlines():
            yield re.sub(r"\$\{?\w+\}?", VALUE, line)


def pattern(fragment: str) -> re.Pattern[str]:
    """What a fragment of a message looks like in the source; "…" stands for anything."""
    return re.compile(".*".join(re.escape(piece.strip()) for piece in fragment.split("…")), re.DOTALL)
