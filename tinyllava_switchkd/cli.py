"""The parser of every command: ``--snake_case`` options, as in transformers; ``--kebab-case`` is accepted as well.

Needs only the standard library, so that ``--help`` and wrong arguments are answered at once.
"""

from __future__ import annotations

import argparse
import difflib
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    from _typeshed import SupportsWrite


def show(text: str) -> None:
    """Print to standard output; a reader that closes the pipe early (such as ``head``) is not an error."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def first_line(error: BaseException) -> str:
    """The first line of an error's message; the name of its class if the message is empty."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def table(rows: Sequence[Sequence[str]], text_columns: int = 1, rule: str = "-") -> list[str]:
    """Rows of cells as lines of text with aligned columns and a rule below the header.

    Args:
        rows: the header, then the rest.
        text_columns: how many columns, counted from the left, are left-aligned; the others are right-aligned.
        rule: the character of the rule.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(
            cell.ljust(width) if column < text_columns else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    return [lines[0], rule * (sum(widths) + 2 * (len(widths) - 1)), *lines[1:]]


class CommandParser(argparse.ArgumentParser):
    """An `argparse.ArgumentParser` that treats ``-`` and ``_`` in the name of a long option as the same.

    Options are declared with underscores (``add_argument("--model_path")``), as help and errors print them. For an
    unknown option the error suggests the closest known one. Every wrong command line gives one sentence and exit code
    2.
    """

    def parse_known_args(  # type: ignore[override]  # argparse fills objects of any class; ours are Namespaces
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> tuple[argparse.Namespace, list[str]]:
        words = list(sys.argv[1:] if args is None else args)
        return super().parse_known_args(self._declared(words), namespace)

    def _declared(self, words: list[str]) -> list[str]:
        """The words, with every option spelled as it was declared."""
        spelling = {option.replace("-", "_"): option for option in self._option_string_actions}
        end = words.index("--") if "--" in words else len(words)
        result = []
        for word in words[:end]:
            name, equals, value = word.partition("=")
            if name.startswith("--") and name not in self._option_string_actions:
                asked = name.replace("-", "_")
                if asked in spelling:
                    name = spelling[asked]
                elif self.allow_abbrev and any(known.startswith(asked) for known in spelling):
                    name = f"--{asked[2:]}"
            result.append(name + equals + value)
        return result + words[end:]

    def parse_args(  # type: ignore[override]  # likewise
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> argparse.Namespace:
        arguments, unknown = self.parse_known_args(args, namespace)
        if unknown:
            self.error(self._unknown(unknown))
        return arguments

    def print_help(self, file: SupportsWrite[str] | None = None) -> None:
        if file is None:
            show(self.format_help().rstrip())
        else:
            super().print_help(file)

    def _unknown(self, words: list[str]) -> str:
        options = [option for option in self._option_string_actions if option.startswith("--")]
        for word in words:
            name = word.partition("=")[0]
            if name.startswith("--"):
                near = difflib.get_close_matches(name.replace("-", "_"), [o.replace("-", "_") for o in options], n=1)
                hint = f"did you mean --{near[0][2:]}?" if near else "see --help."
                return f"there is no argument {name}; {hint}"
        return f"unrecognized arguments: {' '.join(words)}; see --help."

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")
