"""The base class of connectors, which map the vision tower's tokens to the language model's embeddings; the factory."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor, nn

from tinyllava_switchkd.registry import Registry

if TYPE_CHECKING:
    from tinyllava_switchkd.model.configuration import TinyLlavaConfig


class Connector(nn.Module):
    """Visual tokens [I, N, vision_hidden_size] -> [I, K, hidden_size].

    A subclass builds ``self._connector``; its parameters' names are the checkpoint's keys (``connector._connector.*``).

    Args:
        config: the model's `TinyLlavaConfig`; `vision_hidden_size`, `hidden_size` and `connector_type` are read.
    """

    def __init__(self, config: TinyLlavaConfig | None = None) -> None:
        super().__init__()
        self._connector: nn.Module

    @classmethod
    def complete_config(cls, config: TinyLlavaConfig, tensors: dict[str, Tensor]) -> None:
        """Complete a checkpoint's configuration of the connector from its weights, in place.

        Args:
            config: the model's `TinyLlavaConfig`.
            tensors: the checkpoint's weights under v1's names.
        """

    def num_tokens(self, num_vision_tokens: int) -> int:
        """Number of output tokens for `num_vision_tokens` input tokens.

        Raises:
            ValueError: the connector cannot take that many.
        """
        return num_vision_tokens

    def forward(self, x: Tensor) -> Tensor:
        """[I, N, vision_hidden_size] -> [I, K, hidden_size]."""
        return self._connector(x)


ConnectorFactory: Registry[type[Connector]] = Registry("connector", fuzzy=True)
register_connector = ConnectorFactory.register
