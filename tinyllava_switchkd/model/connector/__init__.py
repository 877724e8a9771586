"""Connectors: `ConnectorFactory` and its entries."""

from . import ldpv2, mlp, qformer, resampler
from .base import Connector, ConnectorFactory, register_connector

__all__ = ["Connector", "ConnectorFactory", "ldpv2", "mlp", "qformer", "register_connector", "resampler"]
