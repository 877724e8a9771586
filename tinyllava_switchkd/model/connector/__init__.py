"""Connectors: `ConnectorFactory` and its entries."""

from __future__ import annotations

from tinyllava_switchkd.registry import Registry

ConnectorFactory = Registry("connector", fuzzy=True)
register_connector = ConnectorFactory.register

from . import mlp  # noqa: E402 (the entries need the decorator above)
from .base import Connector  # noqa: E402

__all__ = ["Connector", "ConnectorFactory", "mlp", "register_connector"]
