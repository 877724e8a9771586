"""The registry of conversation templates."""

from tinyllava_switchkd.registry import Registry

TemplateFactory = Registry("conversation template")
"""``TemplateFactory("phi")`` is a `Template` class; ``TemplateFactory("phi")()`` the template."""

register_template = TemplateFactory.register
"""``@register_template("name", override=False)`` on a `Template` class."""
