"""Conversation templates: `TemplateFactory`, `register_template` and the built-in ones."""

from tinyllava_switchkd.data.template.base import (
    EmptyFormatter,
    Formatter,
    Message,
    StringFormatter,
    Template,
    TemplateFactory,
    check_template,
    register_template,
)

from . import conversations  # noqa: F401  # they register themselves

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
