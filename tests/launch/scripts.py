"""The scripts of scripts/train and scripts/eval in this process: what they say to the launcher's command.

Such a script sources ``launch.sh`` and says one line; `words_of` holds it to that. So looking at what the command makes
of it needs no shell and no interpreter of its own. That bash runs them is seen where one is run.
"""

from __future__ import annotations

import contextlib
import io
import os
import shlex
import subprocess
from collections.abc import Mapping
from pathlib import Path
from unittest import mock

from tinyllava_switchkd.launch.__main__ import SCRIPT, main
from tinyllava_switchkd.registry import ENTRY_POINT_GROUP

SCRIPTS = Path(__file__).parents[2] / "scripts"
SOURCED = '. "$(dirname "${BASH_SOURCE[0]}")/../launch.sh"'


def words_of(script: Path) -> list[str]:
    """The words that a script passes to the command before its own arguments."""
    code = [line for line in script.read_text(encoding="utf-8").splitlines() if line and not line.startswith("#")]
    assert code[0] == SOURCED and len(code) == 2 and code[1].endswith(' "$@"'), script
    called, *words, _ = shlex.split(code[1])
    assert called == "launch", script
    return words


def run_here(script: Path, *arguments: object, environment: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
    """Run a script's command with that environment in this process; returns its output and exit code."""
    out, err = io.StringIO(), io.StringIO()
    words = [*words_of(script), *map(str, arguments)]
    with (
        mock.patch.dict(os.environ, {**environment, SCRIPT: str(script)}, clear=True),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        code = main(words)
    return subprocess.CompletedProcess(words, code, out.getvalue(), err.getvalue())


def installed(folder: Path, code: str) -> str:
    """A ``PYTHONPATH`` with an installed plugin that runs `code` in every process that looks up plugins."""
    information = folder / "plugin" / "of_a_test-1.dist-info"
    information.mkdir(parents=True)
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: of-a-test\nVersion: 1\n")
    (information / "entry_points.txt").write_text(f"[{ENTRY_POINT_GROUP}]\nof_a_test = of_a_test\n")
    (information.parent / "of_a_test.py").write_text(code)
    return os.pathsep.join(filter(None, (str(information.parent), os.environ.get("PYTHONPATH"))))
