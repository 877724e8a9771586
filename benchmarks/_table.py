"""Shared by all benchmarks: describe the machine, and write a section of docs/benchmarks.md."""

from __future__ import annotations

import os
import platform
import re
import shlex
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
DOCUMENT = ROOT / "docs" / "benchmarks.md"
HEADING = """# Benchmarks

Each section is written by the command that it names, between markers; run the command again and its section is
replaced. Read the ratios, which are measured side by side in one run: absolute times are those of one machine.
"""

Table = tuple[Sequence[str], Sequence[Sequence[object]]]


def machine() -> str:
    """Processor, threads, accelerator and versions, in one line."""
    parts = [f"{_processor()}, {os.cpu_count()} cores, {torch.get_num_threads()} thread(s)"]
    if torch.cuda.is_available():
        parts.append(f"{torch.cuda.get_device_name()} (CUDA {torch.version.cuda})")
    parts.append(f"Python {platform.python_version()}")
    parts += [f"{package} {version(package)}" for package in ("torch", "transformers")]
    return "; ".join(parts)


def _processor() -> str:
    try:
        names = re.findall(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(encoding="utf-8"), re.MULTILINE)
    except OSError:
        names = []
    return names[0].strip() if names else platform.processor() or platform.machine()


def command() -> str:
    """The current command line, with the script as a module of the repository."""
    script = Path(sys.argv[0]).resolve()
    module = script.relative_to(ROOT).with_suffix("") if script.is_relative_to(ROOT) else script.with_suffix("")
    return f"python -m {'.'.join(module.parts)} {shlex.join(sys.argv[1:])}".strip()


def markdown(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table, padded to be readable as text; the first column is left-aligned, the others right-aligned."""
    cells = [[str(cell) for cell in row] for row in (header, *rows)]
    widths = [max(2, *map(len, column)) for column in zip(*cells, strict=True)]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    padded = [
        [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        for row in (cells[0], rule, *cells[1:])
    ]
    return "\n".join(f"| {' | '.join(row)} |" for row in padded)


def write_section(
    key: str, title: str, tables: Sequence[Table], machine: str, note: str = "", document: Path = DOCUMENT
) -> None:
    """Print tables, and write them to the document in place of the section with the same key.

    Args:
        key: name in the section's markers.
        title: heading of the section.
        tables: header and rows of each table.
        machine: from `machine()`.
        note: one or more sentences on what was measured.
        document: a Markdown file; created if it does not exist.
    """
    parts = [f"## {title}", *([note] if note else []), *(markdown(*table) for table in tables)]
    parts.append(f"{machine}. Made by `{command()}`.")
    section = "\n\n".join(parts)
    print(section)
    begin, end = f"<!-- begin: {key} -->", f"<!-- end: {key} -->"
    text = document.read_text(encoding="utf-8") if document.is_file() else HEADING
    block = f"{begin}\n{section}\n{end}"
    if begin in text and end in text:
        head, tail = text[: text.index(begin)], text[text.index(end) + len(end) :]
        text = head + block + tail
    else:
        text = f"{text.rstrip()}\n\n{block}\n"
    document.parent.mkdir(parents=True, exist_ok=True)
    document.write_text(text, encoding="utf-8")


def readme_cell(start: str, *texts: str) -> None:
    """Write texts to the cells, from the second on, of the row of README.md's tables that begins with `start`."""
    file = ROOT / "README.md"
    lines = file.read_text(encoding="utf-8").split("\n")
    [at] = [i for i, line in enumerate(lines) if line.startswith(start)]
    cells = lines[at].split("|")
    cells[2 : 2 + len(texts)] = [f" {text} " for text in texts]
    lines[at] = "|".join(cells)
    file.write_text("\n".join(lines), encoding="utf-8")
