"""LDPv2, MobileVLM V2's connector: an MLP, 2x2 pooling of the token grid, and a depth-wise convolution."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch.nn.functional as F
from torch import Tensor, nn

from tinyllava_switchkd.model.connector.base import Connector, register_connector
from tinyllava_switchkd.model.connector.mlp import mlp

if TYPE_CHECKING:
    from tinyllava_switchkd.model.configuration import TinyLlavaConfig


class LDPv2(nn.Module):
    """MobileVLM V2, mobilevlm/model/vision_projector.py: no norms, and no activation after the pooling.

    Pooling halves each side of the grid. On an odd side (SigLIP's 27) windows overlap by one token, so no row is lost.
    """

    def __init__(self, width_in: int, width_out: int) -> None:
        super().__init__()
        convolution = nn.Conv2d(width_out, width_out, 3, padding=1, groups=width_out)
        # MobileVLM's keys have one more level (``mlp.mlp.0``, ``peg.peg.0``).
        self.mlp = nn.ModuleDict({"mlp": mlp(2, width_in, width_out)})
        self.peg = nn.ModuleDict({"peg": nn.Sequential(convolution)})

    def forward(self, x: Tensor) -> Tensor:
        """[I, s*s, width_in] -> [I, (s//2)**2, width_out]."""
        x = self.mlp["mlp"](x)  # [I, s*s, D]
        side = math.isqrt(x.shape[1])
        grid = x.transpose(1, 2).unflatten(2, (side, side))  # [I, D, s, s]
        pooled = F.adaptive_avg_pool2d(grid, side // 2)  # [I, D, s/2, s/2]
        return (self.peg["peg"](pooled) + pooled).flatten(2).transpose(1, 2)


@register_connector("ldpv2", "ldpnetv2")
class LDPv2Connector(Connector):
    """Outputs a quarter of the visual tokens, which must form a square grid."""

    def __init__(self, config: TinyLlavaConfig) -> None:
        super().__init__(config)
        self._connector = LDPv2(config.vision_hidden_size, config.hidden_size)

    def num_tokens(self, num_vision_tokens: int) -> int:
        side = math.isqrt(num_vision_tokens)
        if side * side != num_vision_tokens or side < 2:
            with_first = math.isqrt(num_vision_tokens + 1) ** 2 == num_vision_tokens + 1
            remedy = (
                "keep the first one, which the strategy 'patch' drops, with --mm_vision_select_feature cls_patch"
                if with_first
                else "choose a tower whose patches form a square, with the strategy 'patch' if it has a class token"
            )
            raise ValueError(
                f"The connector 'ldpv2' pools a square grid of visual tokens, but the tower gives {num_vision_tokens}; "
                f"{remedy}."
            )
        return (side // 2) ** 2
