"""The shared command-line parser."""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

import pytest

from tinyllava_switchkd.cli import CommandParser


@pytest.fixture
def parser():
    parser = CommandParser(prog="command")
    parser.add_argument("benchmark", nargs="?")
    parser.add_argument("--model_path", "-m")
    parser.add_argument("--max_new_tokens", type=int, default=8)
    parser.add_argument("--packed_rows", action=argparse.BooleanOptionalAction)
    parser.add_argument("--old-name", dest="old")
    return parser


@pytest.mark.parametrize(
    "words",
    [
        ["--model_path", "a-b", "--max_new_tokens", "3"],
        ["--model-path", "a-b", "--max-new-tokens", "3"],
        ["--model-path=a-b", "--max_new-tokens=3"],
        ["--model-p", "a-b", "--max-new", "3"],
    ],
)
def test_both_spellings(parser, words):
    arguments = parser.parse_args(words)
    assert (arguments.model_path, arguments.max_new_tokens) == ("a-b", 3)


def test_values_are_left_as_they_are(parser):
    assert parser.parse_args(["--model_path=--x-y=z"]).model_path == "--x-y=z"
    assert parser.parse_args(["--", "--model-path"]).benchmark == "--model-path"
    assert parser.parse_args(["-m", "p-q", "bench-mark"]).benchmark == "bench-mark"
    assert parser.parse_args(["--max-new-tokens", "-1"]).max_new_tokens == -1


def test_options_declared_otherwise(parser):
    assert parser.parse_args(["--old_name", "x"]).old == parser.parse_args(["--old-name", "x"]).old == "x"
    for word in ("--no-packed_rows", "--no-packed-rows", "--no_packed_rows"):
        assert parser.parse_args([word]).packed_rows is False


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--model-pth", "x"], "there is no argument --model-pth; did you mean --model_path?"),
        (["--zzz=1"], "there is no argument --zzz; see --help."),
        (["a", "b"], "unrecognized arguments: b; see --help."),
        (["--max-new-tokens", "few"], "argument --max_new_tokens: invalid int value: 'few'"),
    ],
)
def test_errors_are_one_line(parser, words, sentence, capsys):
    with pytest.raises(SystemExit) as stopped:
        parser.parse_args(words)
    assert stopped.value.code == 2
    assert capsys.readouterr().err == f"command: error: {sentence}\n"


def test_commands_within_a_command():
    parser = CommandParser(prog="command")
    inner = parser.add_subparsers(dest="which").add_parser("run")
    inner.add_argument("--data_dir")
    assert parser.parse_args(["run", "--data-dir", "d"]).data_dir == "d"


def test_help_waits_for_nothing_heavy():
    code = """
import runpy, sys
from docs._generate_flags import COMMANDS
for name in ("train.train", "launch", *COMMANDS):
    sys.argv = [name, "--help"]
    try:
        runpy.run_module(f"tinyllava_switchkd.{name}", run_name="__main__")
    except SystemExit as done:
        heavy = [name for name in ("torch", "transformers", "gradio", "pandas", "matplotlib") if name in sys.modules]
        if done.code or heavy:
            sys.exit(f"{name}: exit status {done.code}, imports {heavy}")
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[1], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_reader_that_has_seen_enough():
    code = "from tinyllava_switchkd.cli import show; show('a line\\n' * 100_000)"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as command:
        assert command.stdout.readline() == b"a line\n"
        command.stdout.close()
        assert command.stderr.read() == b"" and command.wait() == 0
