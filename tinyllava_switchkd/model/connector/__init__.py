"""Connectors: `ConnectorFactory` and its entries."""

from __future__ import annotations

from tinyllava_switchkd.registry import Registry

ConnectorFactory: Registry[type[Connector]] = Registry("connector", fuzzy=True)
register_connector = ConnectorFactory.register

from . import ldpv2, mlp, qformer, resampler  # noqa: E402 (the entries need the decorator above)
from .base import Connector  # noqa: E402

__all__ = ["Connector", "ConnectorFactory", "ldpv2", "mlp", "qformer", "register_connector", "resampler"]
