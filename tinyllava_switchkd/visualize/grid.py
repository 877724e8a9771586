"""Position of visual tokens in the image: token -> cell of the patch grid -> pixels."""

from __future__ import annotations

from dataclasses import dataclass
from math import isqrt
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from transformers import BaseImageProcessor

    from tinyllava_switchkd.model.modeling import TinyLlavaForConditionalGeneration as TinyLlava

MIXING_CONNECTORS = ("resampler", "qformer")
"""Connectors whose tokens are learned queries over the whole image and have no position in it."""

GRID_CONNECTORS = ("ldp",)
"""Connectors that reduce the grid of patches to a smaller grid, in raster order."""

_MAX_PREFIX = 8  # class and register tokens that an encoder may put before its patches


@dataclass(frozen=True)
class TokenGrid:
    """Grid positions of one image's visual tokens.

    Attributes:
        side: number of cells along each side.
        cells: [K] int, each token's cell in raster order; -1 for a class token.
    """

    side: int
    cells: np.ndarray

    def spread(self, weights: np.ndarray) -> np.ndarray:
        """Place token weights on the grid.

        Tokens that share a cell (``mof`` has two encoders) are summed. A cell without a token is NaN, such as SigLIP's
        first patch under the strategy ``patch``, which v1 drops although it is not a class token.

        Args:
            weights: [..., K].

        Returns:
            [..., side, side], float64.
        """
        placed = self.cells >= 0
        out = np.zeros((*weights.shape[:-1], self.side * self.side))
        np.add.at(out.T, self.cells[placed], weights[..., placed].T)  # out.T is a view of out
        seen = np.zeros(self.side * self.side, dtype=bool)
        seen[self.cells[placed]] = True
        out[..., ~seen] = np.nan
        return out.reshape(*out.shape[:-1], self.side, self.side)


def token_grid(model: TinyLlava) -> TokenGrid:
    """The grid of a model's visual tokens.

    SigLIP-so400m/384 has 27 x 27 patches; v1 drops the first, so its 728 tokens are cells 1 to 728.

    Raises:
        ValueError: the tokens have no position in the image (learned queries), or the patches do not form a square.
    """
    tower, config = model.vision_tower, model.config
    connector = (config.connector_type or "").lower()
    count = model.num_image_tokens
    if connector.startswith(MIXING_CONNECTORS):
        raise ValueError(
            f"Each of the {count} visual tokens of the connector {connector!r} covers the whole image, so there is no "
            f"map of their positions."
        )
    towers = tower.num_tokens("cls_patch") // tower.total_tokens  # 2 for `mof`, whose two encoders' tokens interleave
    tokens = tower.num_tokens(config.vision_feature_select_strategy) // towers
    if connector.startswith(GRID_CONNECTORS) and isqrt(count) ** 2 == count:
        return TokenGrid(isqrt(count), np.arange(count))
    if count != tokens * towers:
        raise ValueError(
            f"The connector {connector!r} turns {tokens * towers} visual tokens into {count}, which form no known grid."
        )
    total = tower.total_tokens
    declared = getattr(tower, "class_tokens", getattr(tower.config, "num_prefix_tokens", None))
    candidates = range(_MAX_PREFIX + 1) if declared is None else [declared]
    prefix = next((n for n in candidates if total > n and isqrt(total - n) ** 2 == total - n), None)
    if prefix is None:
        raise ValueError(f"The vision tower's {total} tokens form no square grid.")
    first = total - tokens - prefix  # cell of the first token; negative for a class token
    cells = np.arange(first, first + tokens)
    return TokenGrid(isqrt(total - prefix), np.repeat(np.where(cells < 0, -1, cells), towers))


def visible_box(
    size: tuple[int, int], image_processor: BaseImageProcessor, aspect_ratio: str | None
) -> tuple[float, ...]:
    """The part of an image that the model sees and the grid covers.

    With ``square``, SigLIP sees the whole image (squeezed) and CLIP its middle (cropped). With ``pad``, the model sees
    a square with borders, so the box extends beyond the image.

    Args:
        size: width and height of the image in pixels.
        image_processor: the model's image processor.
        aspect_ratio: `image_aspect_ratio` of the configuration.

    Returns:
        left, top, right, bottom in pixels of the image.
    """
    left, top, right, bottom = 0.0, 0.0, float(size[0]), float(size[1])
    if aspect_ratio == "pad":
        side = max(size)
        left, top = (float(-((side - length) // 2)) for length in size)
        right, bottom = left + side, top + side
    if getattr(image_processor, "do_center_crop", False) and getattr(image_processor, "crop_size", None):
        shortest, crop = dict(image_processor.size).get("shortest_edge"), dict(image_processor.crop_size)
        if shortest:  # the shorter edge is resized to it, then the middle is cropped
            scale = min(right - left, bottom - top) / shortest
            x, y = (left + right) / 2, (top + bottom) / 2
            half_width, half_height = crop["width"] * scale / 2, crop["height"] * scale / 2
            return x - half_width, y - half_height, x + half_width, y + half_height
    return left, top, right, bottom
