"""Conversation templates: `TemplateFactory`, `register_template` and the built-in ones."""

from tinyllava_switchkd.data.template.base import (
    EmptyFormatter,
    Formatter,
    Message,
    StringFormatter,
    Template,
    TemplateFactory,
    register_template,
)
from tinyllava_switchkd.data.template.check import check_template

from . import chatml, conversations  # noqa: F401  # they register themselves

__all__ = [
    "EmptyFormatter",
    "Formatter",
    "Message",
    "StringFormatter",
    "Template",
    "TemplateFactory",
    "check_template",
    "register_template",
]
