"""Perceiver resampler: learned queries read the visual tokens by cross-attention."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tinyllava_switchkd.model.connector.base import Connector, register_connector

if TYPE_CHECKING:
    from tinyllava_switchkd.model.configuration import TinyLlavaConfig

HEADS, HEAD_WIDTH = 8, 64  # fixed in v1, independent of the model's width


class PerceiverAttention(nn.Module):
    """Latents attend to the visual tokens and to themselves (v1's names and shapes)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        inner = HEADS * HEAD_WIDTH
        self.norm_media = nn.LayerNorm(width)
        self.norm_latents = nn.LayerNorm(width)
        self.to_q = nn.Linear(width, inner, bias=False)
        self.to_kv = nn.Linear(width, 2 * inner, bias=False)
        self.to_out = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor, latents: Tensor) -> Tensor:
        """x [I, N, D], latents [I, Q, D] -> [I, Q, D]."""
        latents = self.norm_latents(latents)
        query = self.to_q(latents)  # [I, Q, H*d]
        key, value = self.to_kv(torch.cat([self.norm_media(x), latents], dim=1)).chunk(2, dim=-1)  # [I, N+Q, H*d]
        query, key, value = (part.unflatten(-1, (HEADS, HEAD_WIDTH)).transpose(1, 2) for part in (query, key, value))
        attended = F.scaled_dot_product_attention(query, key, value)  # [I, H, Q, d]
        return self.to_out(attended.transpose(1, 2).flatten(2))


def feed_forward(width: int) -> nn.Sequential:
    """LayerNorm, then an MLP with four times the width."""
    return nn.Sequential(
        nn.LayerNorm(width), nn.Linear(width, 4 * width, bias=False), nn.GELU(), nn.Linear(4 * width, width, bias=False)
    )


class PerceiverResampler(nn.Module):
    """v1's resampler (``model/connector/resampler.py``); its width is the language model's."""

    def __init__(self, width_in: int, width: int, depth: int, num_queries: int) -> None:
        super().__init__()
        self.latents = nn.Parameter(torch.randn(num_queries, width))
        self.linear = nn.Linear(width_in, width)
        self.layers = nn.ModuleList(
            nn.ModuleList([PerceiverAttention(width), feed_forward(width)]) for _ in range(depth)
        )
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        """[I, N, width_in] -> [I, num_queries, width]."""
        x = self.linear(x)  # [I, N, D]
        latents = self.latents.expand(len(x), -1, -1)  # [I, Q, D]
        for layer in self.layers:
            assert isinstance(layer, nn.ModuleList)
            attention, feed = layer
            latents = attention(x, latents) + latents
            latents = feed(latents) + latents
        return self.norm(latents)


@register_connector("resampler")
class ResamplerConnector(Connector):
    """Outputs `num_queries` tokens per image; has `num_resampler_layers` layers."""

    def __init__(self, config: TinyLlavaConfig) -> None:
        super().__init__(config)
        queries, layers = config.num_queries, config.num_resampler_layers
        if not queries or not layers:
            lacking = "num_resampler_layers" if queries else "num_queries"
            raise ValueError(f"The connector 'resampler' needs {lacking} in the configuration.")
        self._num_queries = queries
        self._connector = PerceiverResampler(config.vision_hidden_size, config.hidden_size, layers, queries)

    def num_tokens(self, num_vision_tokens: int) -> int:
        return self._num_queries
