"""Plugins by name: every factory of the project is an instance of `Registry`.

Factories are callables (``LLMFactory("Qwen/Qwen2.5-0.5B")``) and decorators are used as ``@register_llm("qwen2")``, as
in TinyLLaVA v1. The look-up differs from v1's: a name is matched exactly, then by the longest registered name inside
the *base name* of a path (its last component, never a parent folder). An unknown or ambiguous name is an error that
lists the candidates.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, Generic, TypeVar

ENTRY_POINT_GROUP = "tinyllava_switchkd.plugins"

Found = TypeVar("Found")
Entry = TypeVar("Entry")

_entry_points_loaded = False


def load_entry_points() -> None:
    """Import every plugin that is installed under the ``tinyllava_switchkd.plugins`` entry-point group, once.

    A plugin that fails to import is skipped with a warning: it must not stop a run that does not use it, and a run that
    does use it fails on the unknown name.
    """
    global _entry_points_loaded
    if _entry_points_loaded:
        return
    _entry_points_loaded = True
    for entry_point in importlib.metadata.entry_points(group=ENTRY_POINT_GROUP):
        try:
            entry_point.load()
        except Exception as error:
            logging.getLogger(__name__).warning(
                "The plugin %r (%s) could not be imported and is not available: %s",
                entry_point.name,
                entry_point.value,
                error,
            )


def base_name(path: str) -> str:
    """Last component of a path or hub name, lower-case: ``"Qwen/Qwen2.5-0.5B/"`` -> ``"qwen2.5-0.5b"``."""
    return path.replace("\\", "/").rstrip("/").rsplit("/", 1)[-1].lower()


def checkpoint_name(name_or_path: str | os.PathLike) -> str:
    """A checkpoint's name: its last path component; ``checkpoint-N`` gets the name of its run in front."""
    parts = [part for part in str(name_or_path).replace("\\", "/").split("/") if part not in ("", ".", "..")]
    if not parts:
        parts = [os.path.basename(os.path.realpath(name_or_path)) or "model"]
    if parts[-1].startswith("checkpoint-") and len(parts) > 1:
        return f"{parts[-2]}_{parts[-1]}"
    return parts[-1]


def display_names(paths: Sequence[str]) -> list[str]:
    """A short, distinct name for every checkpoint: its folder's name, with parent folders where needed."""
    parts = [[part for part in Path(path).parts if part not in ("/", "\\", ".", "..")] or [path] for path in paths]
    for part in parts:
        if part[-1].startswith("checkpoint-") and len(part) > 1:  # says nothing without the name of its run
            part[-2:] = [f"{part[-2]}_{part[-1]}"]
    for depth in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-depth:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    return [f"{name} ({index})" for index, name in enumerate(names, start=1)]


class Registry(Generic[Found]):
    """A table of plugins of one kind, looked up by name; a look-up returns a `Found`.

    Args:
        kind: what an entry is called in errors ("vision tower").
        fuzzy: whether an unregistered name may match by the longest registered name in its base name.
        fallback: maps a name that did not match to a registered one, or to None (the LLM registry reads the config's
            model_type).
        resolve: applied to an entry before it is returned.
    """

    def __init__(
        self,
        kind: str,
        *,
        fuzzy: bool = False,
        fallback: Callable[[str], str | None] | None = None,
        resolve: Callable[[Any], Found] | None = None,
    ) -> None:
        self.kind = kind
        self._fuzzy = fuzzy
        self._fallback = fallback
        self._resolve = resolve
        self._entries: dict[str, Any] = {}

    def register(self, *names: str, override: bool = False) -> Callable[[Entry], Entry]:
        """Decorator that registers an object under one or more names (case-insensitive).

        Raises:
            ValueError: a name is taken and `override` is not set.
        """
        if not names or not all(isinstance(name, str) and name for name in names):
            raise ValueError(f"The name of a {self.kind} must be a non-empty string, not {names!r}.")

        def decorator(entry: Entry) -> Entry:
            for name in names:
                key = name.lower()
                if key in self._entries and self._entries[key] is not entry and not override:
                    raise ValueError(
                        f"The {self.kind} {name!r} is already registered (by {_where(self._entries[key])}); "
                        f"pass override=True to replace it with {_where(entry)}."
                    )
            for name in names:
                self._entries[name.lower()] = entry
            return entry

        return decorator

    @contextlib.contextmanager
    def scope(self) -> Iterator[None]:
        """Undo at the end of the ``with`` block what was registered or replaced in it; for tests."""
        load_entry_points()
        before = dict(self._entries)
        try:
            yield
        finally:
            self._entries.clear()
            self._entries.update(before)

    @contextlib.contextmanager
    def override(self, name: str, entry: object) -> Iterator[None]:
        """Register `entry` as `name` for the ``with`` block, replacing an existing entry; for tests."""
        with self.scope():
            self.register(name, override=True)(entry)
            yield

    def list(self, pattern: str = "*") -> list[str]:
        """The sorted registered names that match a shell pattern."""
        load_entry_points()
        return sorted(name for name in self._entries if fnmatch(name, pattern.lower()))

    def name_of(self, name: str | None) -> str:
        """The registered name for `name`, which may be a name, a hub id or a path.

        Raises:
            ValueError: nothing matches, or two entries match with names of the same length.
        """
        if not isinstance(name, str):
            raise ValueError(f"The name of a {self.kind} must be a string, not {name!r}.")
        load_entry_points()
        key = name.lower()
        if key in self._entries:
            return key
        if self._fuzzy:
            matches = [entry for entry in self._entries if entry in base_name(name)]
            if matches:
                return self._longest(name, matches)
        if self._fallback is not None:
            answer = self._fallback(name)
            if answer is not None and answer.lower() in self._entries:
                return answer.lower()
        raise ValueError(
            f"Unknown {self.kind} {name!r}. Registered: {', '.join(self.list()) or 'none'}. "
            f"Register your own with the register decorator, or install a plugin that does."
        )

    def _longest(self, name: str, matches: Iterable[str]) -> str:
        longest = max(len(match) for match in matches)
        best = [match for match in matches if len(match) == longest]
        if len({id(self._entries[match]) for match in best}) > 1:
            raise ValueError(
                f"The {self.kind} {name!r} is ambiguous: it matches {', '.join(sorted(best))}. "
                f"Rename it, or register its exact name."
            )
        return best[0]

    def __call__(self, name: str | None) -> Found:
        entry = self._entries[self.name_of(name)]
        return entry if self._resolve is None else self._resolve(entry)

    def __contains__(self, name: str) -> bool:
        load_entry_points()
        return name.lower() in self._entries

    def __repr__(self) -> str:
        return f"Registry({self.kind!r}: {', '.join(sorted(self._entries))})"


def _where(entry: object) -> str:
    module, name = getattr(entry, "__module__", None), getattr(entry, "__qualname__", None)
    return f"{module}.{name}" if module and name else repr(entry)
