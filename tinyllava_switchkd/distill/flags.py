"""A table of the settings of all registered methods and losses, from which flags, help and documentation are made."""

from __future__ import annotations

import dataclasses
import inspect
import re
import types
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Literal, Union, get_args, get_origin, get_type_hints

from tinyllava_switchkd.distill.losses import LossFactory
from tinyllava_switchkd.distill.methods import Method, MethodFactory


@dataclass
class Setting:
    """One setting as a command-line flag.

    Attributes:
        flag: its name on the command line.
        type: int, float, str, bool or a `Literal` of strings, without None.
        help: one sentence.
        defaults: owner ("switch_kd", "loss bild_rkl") -> default value.
    """

    flag: str
    type: object
    help: str
    defaults: dict[str, object]

    @property
    def summary(self) -> str:
        """The help, with the methods and losses that have the setting and their defaults."""
        groups: dict[str, list[str]] = {}
        for owner, default in self.defaults.items():
            groups.setdefault(f"{default:g}" if isinstance(default, float) else str(default), []).append(owner)
        return f"{self.help} ({'; '.join(f'{value}: {_listed(owners)}' for value, owners in groups.items())})"


def settings() -> dict[str, Setting]:
    """Flag -> setting, for all registered methods and losses, methods first.

    Raises:
        TypeError: two of them have settings with the same name but different types.
    """
    found: dict[str, Setting] = {}
    for owner, flag, type_, help_, default in (*_of_methods(), *_of_losses()):
        one = found.setdefault(flag, Setting(flag, type_, help_, {}))
        if one.type != type_:
            raise TypeError(f"The setting {flag} is {one.type} in {', '.join(one.defaults)} but {type_} in {owner}.")
        one.defaults[owner] = default
    return found


def method_settings(method: type[Method], given: dict[str, object]) -> dict[str, object]:
    """The given flags under the names that `Method.create` takes.

    Raises:
        ValueError: neither the method nor its loss has a flag.
    """
    fields = method.settings()
    named = {fields[flag].name if flag in fields else flag: value for flag, value in given.items()}
    own = {one.name for one in dataclasses.fields(method)}
    loss = named.get("loss", getattr(method, "loss", None)) if "loss_settings" in own else None
    of_loss = dict(loss_parameters(LossFactory(loss))) if isinstance(loss, str) else {}
    for flag, value in given.items():
        if flag not in fields and flag not in of_loss:
            owners = settings()[flag].defaults
            raise ValueError(
                f"--{flag} {value} does nothing here: it belongs to {_listed(owners)}, and the run uses "
                f"--distill_method {method.name}" + (f" with --distill_loss {loss}." if loss else ".")
            )
    return named


def loss_parameters(loss: type) -> Iterator[tuple[str, inspect.Parameter]]:
    """The settings of a loss except the temperature: the arguments of its constructor."""
    for name, parameter in inspect.signature(loss).parameters.items():
        if name != "temperature" and parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
            yield name, parameter


def _of_methods() -> Iterator[tuple[str, str, object, str, object]]:
    for name in MethodFactory.list():
        method = MethodFactory(name)
        hints = get_type_hints(method)
        for flag, one in method.settings().items():
            yield method.name, flag, _plain(hints[one.name]), one.metadata["help"], one.default


def _of_losses() -> Iterator[tuple[str, str, object, str, object]]:
    for name in LossFactory.list():
        loss = LossFactory(name)
        hints = get_type_hints(loss.__init__)
        for flag, parameter in loss_parameters(loss):
            yield f"loss {name}", flag, _plain(hints.get(flag, str)), _described(loss, flag), parameter.default


def _plain(hint: object) -> object:
    """A type without None."""
    if get_origin(hint) in (Union, types.UnionType):
        rest = [one for one in get_args(hint) if one is not type(None)]
        return rest[0] if len(rest) == 1 else str
    return hint if hint in (int, float, str, bool) or get_origin(hint) is Literal else str


def _described(loss: type, name: str) -> str:
    """An argument's description in the ``Args:`` section of the docstring of a class or of its bases."""
    for cls in loss.__mro__:
        text = inspect.cleandoc(cls.__doc__ or "")
        match = re.search(rf"^ +{re.escape(name)}: (.+?)(?=\n +\w+: |\n\n|\n\w|\Z)", text, re.MULTILINE | re.DOTALL)
        if match and "Args:" in text:
            return " ".join(match[1].split())
    return f"Setting {name} of the loss."


def _listed(owners: Collection[str]) -> str:
    """Owners in words, with losses at the end: ``switch_kd, loss bild_fkl, bild_rkl``."""
    losses = [owner.removeprefix("loss ") for owner in owners if owner.startswith("loss ")]
    methods = [owner for owner in owners if not owner.startswith("loss ")]
    return ", ".join([*methods, *([f"loss {', '.join(losses)}"] if losses else [])])
