"""The flags of the training command, read without importing torch or transformers, which takes seconds.

Our own flags come from ``flags.json``, and the registered names with the methods' settings from ``names.json``. Both
are written by docs/_generate_flags.py. The flags of transformers come from the source of the installed version. The
full parser checks the rest, such as a plugin's settings.
"""

from __future__ import annotations

import ast
import difflib
import functools
import importlib.metadata
import importlib.util
import re
import types
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tinyllava_switchkd.io import read_json
from tinyllava_switchkd.registry import ENTRY_POINT_GROUP
from tinyllava_switchkd.train.command_line.settings import ALLOWED, OneOf, check_teacher_cache, check_tuning, weightless

OWN = Path(__file__).with_name("flags.json")
NAMES = Path(__file__).with_name("names.json")

TRUE = ("yes", "true", "t", "y", "1")
BOOLEANS = (*TRUE, "no", "false", "f", "n", "0")


@dataclass(frozen=True)
class Flag:
    """One flag.

    Attributes:
        name: without the dashes.
        type: int, float, bool, str, or "" if only the full parser knows.
        group: its heading in the help; "" for transformers' flags.
        default: as text.
        help: one sentence.
    """

    name: str
    type: str
    group: str = ""
    default: str = ""
    help: str = ""


@functools.cache
def own_flags() -> dict[str, Flag]:
    """This package's flags by name, in the help's order."""
    rows = read_json(OWN)
    return {name: Flag(name, type_, group, *rest) for group, own in rows.items() for name, type_, *rest in own}


@functools.cache
def transformers_flags() -> dict[str, Flag]:
    """The flags of the installed transformers' training arguments by name."""
    spec = importlib.util.find_spec("transformers")
    if spec is None or spec.origin is None:
        return {}
    source = Path(spec.origin).with_name("training_args.py").read_text(encoding="utf-8")
    return {name: Flag(name, _plain_type(annotation)) for name, annotation in fields_of_source(source)}


def fields_of_source(source: str) -> Iterator[tuple[str, str]]:
    """Name and annotation of every field of the dataclasses in a module's source."""
    for node in ast.parse(source).body:
        if isinstance(node, ast.ClassDef) and any("dataclass" in ast.unparse(one) for one in node.decorator_list):
            for field in node.body:
                if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
                    annotation = ast.unparse(field.annotation)
                    if "ClassVar" not in annotation:
                        yield field.target.id, annotation


def _plain_type(annotation: str) -> str:
    """int, float, bool or str if the annotation is this type or optionally this type; "" otherwise."""
    names = set(re.findall(r"\w+", annotation)) - {"None", "Optional", "Union"}
    return names.pop() if len(names) == 1 and names <= {"int", "float", "bool", "str"} else ""


def pairs(argv: Sequence[str]) -> list[tuple[str, list[str]]]:
    """Split ``["--a", "1", "2", "--b=3"]`` into ``[("a", ["1", "2"]), ("b", ["3"])]``.

    Raises:
        ValueError: the command line begins with a value.
    """
    split: list[tuple[str, list[str]]] = []
    for token in argv:
        if token.startswith("--"):
            name, equals, value = token[2:].partition("=")
            split.append((name, [value] if equals else []))
        elif split:
            split[-1][1].append(token)
        else:
            raise ValueError(f"The command line begins with {token!r}; every value follows its --argument.")
    return split


def check_flags(argv: Sequence[str]) -> None:
    """Refuse unknown flags, names and values, settings that contradict each other, and missing required flags.

    Raises:
        ValueError: the first mistake found, in one sentence.
    """
    theirs = transformers_flags()  # none where transformers is not installed, as for a dry run elsewhere
    known = theirs | own_flags()
    plugins = bool(importlib.metadata.entry_points(group=ENTRY_POINT_GROUP))  # their settings are flags, too
    given = pairs(argv)
    for name, values in given:
        flag = known.get(name.replace("-", "_"))
        if flag is None and theirs and not plugins:
            refuse_unknown(name, known)
        if flag is not None and len(values) == 1:
            _check_value(flag, values[0])
    words = {name.replace("-", "_"): " ".join(values) for name, values in given}
    for name, what in REQUIRED.items():
        if name not in words:
            raise ValueError(f"--{name} is missing: {what}.")
    if not plugins:
        _check_names(words)
    read = {flag.name: _value(flag, words.get(flag.name, flag.default or None)) for flag in known.values()}
    for check in (check_tuning, check_teacher_cache):
        check(types.SimpleNamespace(**read))


def _value(flag: Flag, text: str | None) -> str | bool | None:
    return text if text is None or flag.type != "bool" else text.lower() in ("", *TRUE)


def _check_names(words: Mapping[str, str]) -> None:
    """Refuse unregistered names, and settings that neither the method nor its loss has."""
    table = read_json(NAMES)
    for name, registered in table["names"].items():
        if name in words and words[name].lower() not in registered:
            raise ValueError(f"--{name} is {words[name]!r}; it must be {OneOf(*registered)}.")
    if "teacher_path" not in words:
        return
    method = words.get("distill_method", "switch_kd").lower()
    loss = words.get("distill_loss", table["loss"].get(method, "")).lower()
    settings = table["settings"]
    weights = [name for name in settings[method] if name.endswith("_weight")]
    if weights and all(words.get(name) and not words[name].strip("0.") for name in weights):
        raise ValueError(weightless(weights, words["teacher_path"]))
    if "teacher_cache" in words and method not in table["cached"]:
        raise ValueError(
            f"--teacher_cache {words['teacher_cache']} does not store all that {method} needs of the teacher; leave it "
            f"out, or use --distill_method {' or '.join(table['cached'])}."
        )
    own = {*settings[method], *(settings[f"loss {loss}"] if method in table["loss"] else ())}
    for name in words.keys() & {flag for flags in settings.values() for flag in flags}:
        if name not in own:
            owners = ", ".join(owner for owner, flags in settings.items() if name in flags)
            raise ValueError(
                f"--{name} {words[name]} does nothing here: it belongs to {owners}, and the run uses --distill_method "
                f"{method}" + (f" with --distill_loss {loss}." if method in table["loss"] else ".")
            )


REQUIRED = {
    "data_path": "the training samples, a JSON file in LLaVA's format",
    "output_dir": "the folder for the trained model",
}
"""Required flags -> what they name."""


def refuse_unknown(name: str, known: Sequence[str] | dict[str, Flag]) -> None:
    """Raise the error for an unknown flag, with the closest known one.

    Raises:
        ValueError: always.
    """
    close = difflib.get_close_matches(name, list(known), n=1)
    hint = f"did you mean --{close[0]}?" if close else "see --help for all arguments."
    raise ValueError(f"There is no argument --{name}; {hint}")


def _check_value(flag: Flag, value: str) -> None:
    kinds = {"int": (int, "a whole number"), "float": (float, "a number")}
    try:
        read, kind = kinds.get(flag.type, (str, ""))
        read(value)
    except ValueError:
        raise ValueError(f"The command line cannot be read: --{flag.name} is {value!r}; it must be {kind}.") from None
    if flag.type == "bool" and value.lower() not in BOOLEANS:
        raise ValueError(f"The command line cannot be read: --{flag.name} is {value!r}; it must be True or False.")
    wrong = ALLOWED[flag.name].wrong(value) if flag.name in ALLOWED else None
    if wrong is not None:
        raise ValueError(f"--{flag.name} is {value!r}; it must be {wrong}.")


def help_text() -> str:
    """The help: every flag, by group."""
    lines = ["usage: python -m tinyllava_switchkd.train.train --flag value ...", ""]
    group = ""
    for flag in own_flags().values():
        if flag.group != group:
            group = flag.group
            lines += ["", f"{group}:"]
        default = f" (default: {flag.default})" if flag.default else ""
        lines.append(f"  --{flag.name}  {flag.help}{default}")
    theirs = " ".join(f"--{name}" for name in transformers_flags() if name not in own_flags())
    lines += ["", "transformers.TrainingArguments, see its documentation:", f"  {theirs}"]
    return "\n".join(lines)
