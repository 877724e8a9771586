"""The simple connectors: identity, linear, MLP, and one MLP for each tower of MoF."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from tinyllava_switchkd.model.connector.base import Connector, register_connector

if TYPE_CHECKING:
    from tinyllava_switchkd.model.configuration import TinyLlavaConfig


@register_connector("identity")
class IdentityConnector(Connector):
    """Returns the visual tokens unchanged; the tower must have the language model's width."""

    def __init__(self, config: TinyLlavaConfig | None = None) -> None:
        super().__init__(config)
        if config is not None and config.vision_hidden_size != config.hidden_size:
            raise ValueError(
                f"The connector 'identity' needs a vision tower of the language model's width, but the tower has "
                f"{config.vision_hidden_size} and the language model {config.hidden_size}; use 'linear' or "
                f"'mlp2x_gelu'."
            )
        self._connector = nn.Identity()


@register_connector("linear")
class LinearConnector(Connector):
    """One linear layer."""

    def __init__(self, config: TinyLlavaConfig) -> None:
        super().__init__(config)
        self._connector = nn.Linear(config.vision_hidden_size, config.hidden_size)


def mlp(depth: int, width_in: int, width_out: int) -> nn.Sequential:
    """`depth` linear layers with GELUs between them."""
    layers: list[nn.Module] = [nn.Linear(width_in, width_out)]
    for _ in range(depth - 1):
        layers += [nn.GELU(), nn.Linear(width_out, width_out)]
    return nn.Sequential(*layers)


@register_connector("mlp")
class MLPConnector(Connector):
    """``mlp{n}x_gelu``: n linear layers with GELU between them; v1's default is ``mlp2x_gelu``."""

    def __init__(self, config: TinyLlavaConfig) -> None:
        super().__init__(config)
        match = re.fullmatch(r"mlp(\d+)x_gelu", config.connector_type or "", re.IGNORECASE)
        if match is None or int(match[1]) < 1:
            raise ValueError(
                f"Unknown connector_type {config.connector_type!r}: an MLP is called mlp{{n}}x_gelu, for example "
                f"mlp2x_gelu."
            )
        self._connector = mlp(int(match[1]), config.vision_hidden_size, config.hidden_size)


class MoFMLP(nn.Module):
    """One MLP for CLIP's tokens and one for DINOv2's; the tower interleaves the two."""

    def __init__(self, config: TinyLlavaConfig) -> None:
        super().__init__()
        self.clip = mlp(2, config.vision_hidden_size, config.hidden_size)
        self.dinov2 = mlp(2, config.vision_hidden_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """[I, 2N, vision_hidden_size] (CLIP at even positions) -> [I, 2N, hidden_size]."""
        pairs = torch.stack([self.clip(x[:, 0::2]), self.dinov2(x[:, 1::2])], dim=2)  # [I, N, 2, D]
        return pairs.flatten(1, 2)


@register_connector("mof_mlp")
class MoFMLPConnector(Connector):
    """v1's connector for the tower ``mof``."""

    def __init__(self, config: TinyLlavaConfig) -> None:
        super().__init__(config)
        self._connector = MoFMLP(config)
