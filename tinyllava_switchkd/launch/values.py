"""Checks of settings' values. A check takes a value as text and returns what is expected, or None if it is valid."""

from __future__ import annotations

import re
import shlex

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
    try:
        words = split_words(text)
    except ValueError:
        return "arguments such as --run_name 'a b', with every quotation mark closed"
    return None if not words or words[0].startswith("--") else "arguments such as --packing True"


def split_words(text: str) -> list[str]:
    """The words of a text as in a shell; a JSON object needs no quotation marks around it.

    Raises:
        ValueError: a quotation mark is not closed.
    """
    return shlex.split(re.sub(r"""(?<=[\s=])\{\s*".*?\}(?=\s|$)""", lambda match: shlex.quote(match[0]), text))


def anything(text: str) -> str | None:
    """Any text without a line break."""
    return None if "\n" not in text and "\x00" not in text else "text on one line"
