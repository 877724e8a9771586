"""Checks of settings' values. A check takes a value as text and returns what is expected, or None if it is valid."""

from __future__ import annotations

import re

from tinyllava_switchkd.train.command_line.flags import BOOLEANS


def boolean(text: str) -> str | None:
    """True or False, as transformers reads them."""
    return None if text.lower() in BOOLEANS else "True or False"


def folder_name(text: str) -> str | None:
    """A single folder name: no separator, no "..", nothing that causes trouble in a shell or file system."""
    if text != text.strip() or text in ("", ".", "..") or text.startswith("-"):
        return "a name for a folder"
    bad = re.search(r"[/\\\x00-\x1f\x7f]", text)
    return "a name for a folder, without / or \\" if bad or len(text.encode()) > 200 else None


def word(text: str) -> str | None:
    """One word, such as a registered name."""
    return None if text and not re.search(r"\s", text) and not text.startswith("-") else "one word"


def flags(text: str) -> str | None:
    """Arguments of the entry point."""
    return None if not text.split() or text.split()[0].startswith("--") else "arguments such as --packing True"


def anything(text: str) -> str | None:
    """Any text without a line break."""
    return None if "\n" not in text and "\x00" not in text else "text on one line"
