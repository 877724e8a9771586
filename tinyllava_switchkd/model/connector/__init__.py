"""Connectors: `ConnectorFactory` and its entries."""

from tinyllava_switchkd.model.connector import ldpv2, mlp, qformer, resampler
from tinyllava_switchkd.model.connector.base import Connector, ConnectorFactory, register_connector

__all__ = ["Connector", "ConnectorFactory", "ldpv2", "mlp", "qformer", "register_connector", "resampler"]
