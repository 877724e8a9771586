"""Write docs/flags.md, and flags.json and names.json of train/command_line, from the commands and registered parts::

python docs/_generate_flags.py            # write the files
python docs/_generate_flags.py --check    # exit status 1 if one of them is out of date
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

PAGE = Path(__file__).with_name("flags.md")
TABLE = Path(__file__).parents[1] / "tinyllava_switchkd" / "train" / "command_line" / "flags.json"
"""The table from which ``--help`` and the early check of a training's command line read the flags."""
NAMES = TABLE.with_name("names.json")
"""The table of registered names, and of the methods' and losses' settings, for the same early check."""

COMMANDS = (
    "quickstart.run",
    "train.check_data",
    "data.download",
    "eval.prepare",
    "eval.run",
    "eval.score",
    "eval.report",
    "serve.app",
    "serve.chat",
    "model.export",
    "model.card",
    "visualize.attention",
    "visualize.curves",
    "eval.mistakes",
)
"""Modules with a command line, in the page's order."""

CALLS = {
    "quickstart.run": "bash scripts/quickstart.sh",
    "data.download": "bash scripts/data/prepare_pretrain.sh` and `bash scripts/data/prepare_finetune.sh",
    "eval.prepare": "bash scripts/data/prepare_eval.sh",
}
"""The scripts that call some of these commands."""

INTRODUCTION = """\
<!-- Written by docs/_generate_flags.py; change the commands and run it again. -->
# Every flag

Each command prints its flags with `--help`.

## Training

The scripts in `scripts/train` call `python -m tinyllava_switchkd.train.train`. They set most of these flags from their
arguments and from environment variables ([table](train.md#environment-variables)), and pass on `EXTRA_ARGS`. Boolean
flags take a value: `--group_by_modality_length True`.
"""

OF_TRANSFORMERS = """\
All other flags are those of
[transformers.TrainingArguments](https://huggingface.co/docs/transformers/main_classes/trainer#transformers.TrainingArguments).
Of these, `--label_smoothing_factor`, `--neftune_noise_alpha`, `--use_liger_kernel`, `--fsdp` and
`--remove_unused_columns` are refused, because this trainer does not support them.
"""

OLD = """\
Flags of TinyLLaVA's scripts and of older versions of transformers are accepted, with one warning each.
"""


class _Built(Exception):
    """Raised when a command has built its parser."""

    def __init__(self, parser: argparse.ArgumentParser) -> None:
        super().__init__()
        self.parser = parser


def parser_of(command: str) -> argparse.ArgumentParser:
    """The parser of a command, caught when it is about to parse the command line."""

    def catch(parser: argparse.ArgumentParser, *_: Any, **__: Any) -> None:
        raise _Built(parser)

    from tinyllava_switchkd.cli import CommandParser

    name = f"tinyllava_switchkd.{command}"
    module = importlib.import_module(name)
    if hasattr(module, "__path__"):
        module = importlib.import_module(f"{name}.__main__")
    with (
        mock.patch.object(argparse.ArgumentParser, "parse_args", catch),
        mock.patch.object(CommandParser, "parse_args", catch),
        mock.patch.dict(os.environ),
    ):
        os.environ.pop("QUICKSTART_OUT", None)  # the default of a flag
        try:
            module.main([])
        except _Built as built:
            return built.parser
    raise RuntimeError(f"{name} did not read its command line.")


def table(head: tuple[str, ...], rows: Iterator[tuple[str, ...]] | list[tuple[str, ...]]) -> str:
    """A Markdown table."""
    lines = [head, tuple("---" for _ in head), *rows]
    return "".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |\n" for line in lines)


def shown(default: object) -> str:
    """A default as one would type it; empty if there is none."""
    if default is None or default == "" or default == [] or default is argparse.SUPPRESS:
        return ""
    return f"`{default.as_posix() if isinstance(default, Path) else default}`"


def plain(text: str) -> str:
    """A help text as Markdown."""
    return " ".join(text.split()).replace("<", "&lt;")


def rows_of(parser: argparse.ArgumentParser) -> Iterator[tuple[str, str]]:
    """Flag and meaning of every option of a command."""
    for action in parser._actions:
        if isinstance(action, argparse._HelpAction):
            continue
        if action.dest == "workers" and action.default == (os.cpu_count() or 1):
            action.default = "one per core"
        values = dict(vars(action), prog=parser.prog)
        meanings = [plain((action.help or "") % values)]
        if action.choices is not None:
            meanings.append(", ".join(f"`{choice}`" for choice in action.choices))
        default = "" if action.default is False else shown(action.default)
        if default and "default" not in (action.help or ""):
            meanings.append(f"default: {default}")
        names = ", ".join(f"`{name}`" for name in action.option_strings) or f"`{action.metavar or action.dest}`"
        required = " (required)" if action.required and action.option_strings else ""
        yield f"{names}{required}", "; ".join(filter(None, meanings))


def fields_of(cls: type) -> Iterator[tuple[str, str, str]]:
    """Flag, default and meaning of the fields declared in an argument class, without inherited ones."""
    for field in dataclasses.fields(cls):
        if field.name in cls.__annotations__:
            yield f"`--{field.name}`", shown(field.default), plain(field.metadata["help"])


def training_groups() -> dict[str, type]:
    """Heading -> argument class of training."""
    from tinyllava_switchkd.train.command_line import arguments

    return {
        "The model": arguments.ModelArguments,
        "The data": arguments.DataArguments,
        "The distillation": arguments.TeacherArguments,
        "The methods and their losses": arguments.distill_arguments(),
        "The training": arguments.TrainingArguments,
    }


def flags_table() -> str:
    """Training's own flags as JSON: group -> [name, type, default, help]."""
    groups = {}
    for title, cls in training_groups().items():
        own = [field for field in dataclasses.fields(cls) if field.name in cls.__annotations__]
        rows = [
            [field.name, type_of(cls.__annotations__[field.name]), shown(field.default)[1:-1], field.metadata["help"]]
            for field in own
        ]
        lines = ",\n".join("    " + json.dumps(row, ensure_ascii=False) for row in rows)
        groups[title] = f"  {json.dumps(title)}: [\n{lines}\n  ]"
    return "{\n" + ",\n".join(groups.values()) + "\n}\n"


def names_table() -> str:
    """As JSON: registered names by flag, settings of every method and loss, methods' default losses, and which methods
    can use a teacher cache."""
    from tinyllava_switchkd.data.template import TemplateFactory
    from tinyllava_switchkd.distill.flags import settings
    from tinyllava_switchkd.distill.losses import LossFactory
    from tinyllava_switchkd.distill.methods import MethodFactory
    from tinyllava_switchkd.distill.trace import BLIND
    from tinyllava_switchkd.train.recipes import TrainingRecipeFactory

    methods, losses = MethodFactory.list(), LossFactory.list()
    names = {"distill_method": methods, "distill_loss": losses}
    names |= {"training_recipe": TrainingRecipeFactory.list(), "template": TemplateFactory.list()}
    owned = {owner: [] for owner in (*methods, *(f"loss {loss}" for loss in losses))}
    for one in settings().values():
        for owner in one.defaults:
            owned[owner].append(one.flag)
    loss = {name: MethodFactory(name).loss for name in methods if "distill_loss" in owned[name]}
    cached = [name for name in methods if MethodFactory(name)().teacher_sight == BLIND]
    return json.dumps({"names": names, "settings": owned, "loss": loss, "cached": cached}, indent=1) + "\n"


def type_of(annotation: Any) -> str:
    """int, float, bool or str if a flag has this type, or this type or None; else an empty text."""
    names = set(re.findall(r"\w+", str(getattr(annotation, "__name__", annotation)))) - {"None", "typing", "Optional"}
    if getattr(annotation, "__args__", None):
        names = {getattr(one, "__name__", "other") for one in annotation.__args__} - {"NoneType"}
    return names.pop() if len(names) == 1 and names <= {"int", "float", "bool", "str"} else ""


def page() -> str:
    """The whole page."""
    from tinyllava_switchkd.train.command_line import argv

    head = ("flag", "default", "meaning")
    parts = [INTRODUCTION]
    for title, cls in training_groups().items():
        parts += [f"### {title}\n", table(head, fields_of(cls))]
    old = {name: f"now `--{new}`" for name, new in argv.RENAMED.items()}
    old |= {name: note.removeprefix("it is ") for name, (_, note) in argv.TRANSLATED.items()}
    old |= {name: f"ignored: {why}" for name, why in argv.IGNORED.items()}
    parts += [OF_TRANSFORMERS, "### Flags of older scripts\n", OLD]
    parts.append(table(("flag", "effect"), [(f"`--{name}`", what) for name, what in old.items()]))
    parts.append("## The other commands\n")
    for command in COMMANDS:
        parser = parser_of(command)
        script = f"; called by `{CALLS[command]}`" if command in CALLS else ""
        parts += [f"### {command}\n", f"`python -m tinyllava_switchkd.{command}`{script}\n"]
        parts.append(table(("flag", "meaning"), rows_of(parser)))
    return "\n".join(parts)


def main() -> int:
    parser = argparse.ArgumentParser(description="Write docs/flags.md, flags.json and names.json.")
    parser.add_argument("--check", action="store_true", help="only compare, write nothing")
    arguments = parser.parse_args()
    for path, text in ((PAGE, page()), (TABLE, flags_table()), (NAMES, names_table())):
        if not arguments.check:
            path.write_text(text, encoding="utf-8")
        elif path.read_text(encoding="utf-8") != text:
            print(f"{path.name} is out of date; run python docs/_generate_flags.py", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.path.insert(0, str(PAGE.parents[1]))
    sys.exit(main())
