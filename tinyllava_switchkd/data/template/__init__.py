"""Conversation templates: `TemplateFactory`, `register_template` and the built-in templates."""

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

from . import conversations  # noqa: F401  # registers the templates

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
