"""Conversation templates: `TemplateFactory`, `register_template` and the built-in ones."""

from tinyllava_switchkd.data.template.base import Message, Template
from tinyllava_switchkd.data.template.chatml import ChatMLTemplate
from tinyllava_switchkd.data.template.check import check_template
from tinyllava_switchkd.data.template.conversations import (
    GemmaTemplate,
    LlamaTemplate,
    PhiTemplate,
    PretrainTemplate,
    Qwen2InstructTemplate,
)
from tinyllava_switchkd.data.template.factory import TemplateFactory, register_template
from tinyllava_switchkd.data.template.formatter import EmptyFormatter, Formatter, StringFormatter

__all__ = [
    "ChatMLTemplate",
    "EmptyFormatter",
    "Formatter",
    "GemmaTemplate",
    "LlamaTemplate",
    "Message",
    "PhiTemplate",
    "PretrainTemplate",
    "Qwen2InstructTemplate",
    "StringFormatter",
    "Template",
    "TemplateFactory",
    "check_template",
    "register_template",
]
