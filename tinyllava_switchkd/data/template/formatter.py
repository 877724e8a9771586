"""Formatters: the little slots a conversation template is made of (TinyLLaVA v1, ``data/template/formatter.py``)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any


# eq=False keeps the identity hash, which is what lets a template of v1's style give a formatter as a plain dataclass
# default (``format_user: "Formatter" = StringFormatter(...)``): since Python 3.11 a dataclass refuses unhashable ones.
@dataclass(eq=False)
class Formatter(ABC):
    """A slot that is turned into text (or, for a separator, into a pair of texts)."""

    slot: Any = ""

    @abstractmethod
    def apply(self, **kwargs: str | None) -> Any:
        """The slot with its fields filled in."""


@dataclass(eq=False)
class EmptyFormatter(Formatter):
    """A slot without fields: whatever it is given, it returns the slot."""

    def apply(self, **kwargs: str | None) -> Any:
        return self.slot


@dataclass(eq=False)
class StringFormatter(Formatter):
    """A text with one ``{{content}}`` field.

    ``apply(content=None)`` is the text that precedes an answer yet to be generated: v1 cuts the slot at its first
    colon (``"ASSISTANT: {{content}}</s>"`` -> ``"ASSISTANT:"``). A slot without a colon before the field is cut at
    the field, spaces stripped.
    """

    def apply(self, **kwargs: str | None) -> str:
        """Fill the fields.

        Raises:
            TypeError: a value is neither a string nor None.
        """
        text = self.slot
        for name, value in kwargs.items():
            field = "{{" + name + "}}"
            if value is None:
                before = self.slot.partition(field)[0]
                return before.partition(":")[0] + ":" if ":" in before else before.rstrip(" ")
            if not isinstance(value, str):
                raise TypeError(f"A turn of a conversation is a text, not {value!r}.")
            text = text.replace(field, value, 1)
        return text
