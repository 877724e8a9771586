"""Conversation templates: `TemplateFactory`, `register_template` and the built-in templates."""

from tinyllava_switchkd.data.template import conversations  # noqa: F401  # registers the templates
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
