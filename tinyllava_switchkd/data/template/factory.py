"""The registry of conversation templates."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from tinyllava_switchkd.registry import Registry

if TYPE_CHECKING:
    from .base import Template

TemplateFactory: Registry[Callable[[], Template]] = Registry("conversation template")
"""``TemplateFactory("phi")`` is a `Template` class; ``TemplateFactory("phi")()`` the template."""

register_template = TemplateFactory.register
"""``@register_template("name", override=False)`` on a `Template` class."""
