"""What a setting's value must look like. A check takes the text of a value and says what is expected, or None."""

from __future__ import annotations

import math
import re
from collections.abc import Callable

Check = Callable[[str], "str | None"]


LARGEST = 2**31 - 1
"""Of whole numbers that say no limit of their own: what any library takes."""


def whole(least: int = 1, most: int | None = None) -> Check:
    """A whole number of at least `least`, and at most `most`."""
    expected = f"a whole number of at least {least}" if most is None else f"a whole number from {least} to {most}"
    limit = LARGEST if most is None else most

    def check(text: str) -> str | None:
        if re.fullmatch(r"[+-]?[0-9]+", text) is None:
            return expected
        if len(text) > 4000 or int(text) > limit:
            return f"a whole number from {least} to {limit}"
        return None if int(text) >= least else expected

    return check


def number(least: float = 0, *, strictly: bool = False) -> Check:
    """A finite number of at least `least`, or above it."""
    expected = f"a number {'above' if strictly else 'of at least'} {least:g}"

    def check(text: str) -> str | None:
        try:
            value = float(text)
        except ValueError:
            return expected
        good = math.isfinite(value) and (value > least or (value == least and not strictly))
        return None if good and "_" not in text else expected

    return check


def one_of(*choices: str) -> Check:
    """One of some words."""
    listed = ", ".join(choices[:-1]) + f" or {choices[-1]}"
    return lambda text: None if text in choices else listed


def boolean(text: str) -> str | None:
    """True or False, as transformers reads them."""
    words = ("true", "false", "yes", "no", "t", "f", "y", "n", "1", "0")
    return None if text.lower() in words else "True or False"


def steps(text: str) -> str | None:
    """A number of steps, or a share of the run below 1."""
    wrong = number(0, strictly=True)(text)
    if wrong is None and float(text) >= 1 and float(text) != int(float(text)):
        wrong = "not whole"
    return wrong and "a whole number of steps, or a share of the run between 0 and 1"


def max_steps(text: str) -> str | None:
    """At least one step, or -1 for no limit (transformers' default)."""
    return None if text == "-1" or whole(1)(text) is None else "a whole number of at least 1"


def folder_name(text: str) -> str | None:
    """A name that stays one folder: no separator, no way up, nothing that a shell or a file system trips over."""
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
    return None if "\n" not in text and "\x00" not in text else "a text of one line"
