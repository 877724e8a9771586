"""scripts/demo.sh: what it starts, and its message if there is nothing to start."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "demo.sh"
STUDENT = "tiny-llava-base-qwen2-student-base-siglip-student-seed0"
TEACHER = "tiny-llava-base-qwen2-teacher-base-siglip-teacher-handwriting-finetune"


@pytest.fixture
def run(tmp_path):
    """Runs the script with a fake Python that prints its arguments, one per line."""
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\nfor argument in "$@"; do echo "$argument"; done\n')
    python.chmod(0o755)

    def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
        known = {key: value for key, value in os.environ.items() if key not in ("STUDENT", "COMPARE")}
        known |= {"TINYLLAVA_PYTHON": str(python), "QUICKSTART_OUT": str(tmp_path / "quick start")}
        command = ["bash", str(SCRIPT), *arguments]
        return subprocess.run(command, env=known | environment, capture_output=True, text=True)

    return run


def checkpoints(tmp_path, *names):
    for name in names:
        folder = tmp_path / "quick start" / "checkpoints" / name
        folder.mkdir(parents=True)
        (folder / "config.json").touch()
    return tmp_path / "quick start" / "checkpoints"


def test_without_a_quickstart(run):
    done = run()
    assert done.returncode == 1 and done.stdout == ""
    assert "bash scripts/quickstart.sh" in done.stderr and "STUDENT=FOLDER" in done.stderr


def test_the_quickstart_s_models(run, tmp_path):
    folder = checkpoints(
        tmp_path, f"{STUDENT}-distill", f"{STUDENT}-finetune", f"{STUDENT}-equal-time-finetune", TEACHER
    )
    lines = run("--port", "8000").stdout.splitlines()
    assert lines == [
        *("-m", "tinyllava_switchkd.serve.app", "--model_path", f"{folder}/{STUDENT}-distill"),
        *("--compare", f"{folder}/{STUDENT}-finetune", f"{folder}/{TEACHER}"),
        *("--names", "Switch-KD student", "SFT student", "Teacher"),
        *("--port", "8000"),
    ]


def test_with_an_unfinished_quickstart(run, tmp_path):
    folder = checkpoints(tmp_path, f"{STUDENT}-distill")
    assert run().stdout.splitlines()[2:] == [
        *("--model_path", f"{folder}/{STUDENT}-distill", "--names", "Switch-KD student"),
    ]


def test_other_models(run):
    lines = run(STUDENT="my/student", COMPARE="one two/three").stdout.splitlines()
    assert lines[2:] == ["--model_path", "my/student", "--compare", "one", "two/three"]
    assert run(STUDENT="my/student").stdout.splitlines()[2:] == ["--model_path", "my/student"]
