"""Where a visual token stands in the image: token -> cell of the patch grid -> pixels."""

from __future__ import annotations

from dataclasses import dataclass
from math import isqrt
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from transformers import BaseImageProcessor

    from tinyllava_switchkd.model.modeling import TinyLlavaForConditionalGeneration as TinyLlava

MIXING_CONNECTORS = ("resampler", "qformer")
"""Connectors whose tokens are learned queries over the whole image: none of them has a place in it."""

GRID_CONNECTORS = ("ldp",)
"""Connectors that shrink the grid of patches to a smaller grid, in raster order."""

_MAX_PREFIX = 8  # class and register tokens that an encoder may put before its patches


@dataclass(frozen=True)
class TokenGrid:
    """The places of one image's visual tokens.

    Attributes:
        side: cells of the grid along each side.
        cells: [K] int, the cell of every token in raster order; -1 for a token that stands for no part of the image
            (a class token that was kept).
    """

    side: int
    cells: np.ndarray

    def spread(self, weights: np.ndarray) -> np.ndarray:
        """Lay the weights of tokens out over the image.

        Tokens that share a cell (``mof`` has two encoders) are summed. NaN marks a cell that no token stands for: the
        first patch of SigLIP under the strategy ``patch``, which v1 drops although it is no class token.

        Args:
            weights: [..., K].

        Returns:
            [..., side, side], float64.
        """
        placed = self.cells >= 0
        out = np.zeros((*weights.shape[:-1], self.side * self.side))
        np.add.at(out.T, self.cells[placed], weights[..., placed].T)  # a transposed array is the same memory
        seen = np.zeros(self.side * self.side, dtype=bool)
        seen[self.cells[placed]] = True
        out[..., ~seen] = np.nan
        return out.reshape(*out.shape[:-1], self.side, self.side)


def token_grid(model: TinyLlava) -> TokenGrid:
    """The grid of a `TinyLlavaForConditionalGeneration`'s visual tokens.

    SigLIP-so400m/384 has 27 x 27 patches; v1 drops the first, so its 728 tokens are cells 1 to 728.

    Raises:
        ValueError: the tokens have no place in the image (learned queries), or the patches form no square.
    """
    tower, config = model.vision_tower, model.config
    connector = (config.connector_type or "").lower()
    count = model.num_image_tokens
    if connector.startswith(MIXING_CONNECTORS):
        raise ValueError(
            f"The connector {connector!r} makes its {count} visual tokens of the whole image each, so there is no map "
            f"of where in the image they are."
        )
    towers = tower.num_tokens("cls_patch") // tower.total_tokens  # 2 for `mof`, whose two encoders' tokens interleave
    tokens = tower.num_tokens(config.vision_feature_select_strategy) // towers
    if connector.startswith(GRID_CONNECTORS) and isqrt(count) ** 2 == count:
        return TokenGrid(isqrt(count), np.arange(count))
    if count != tokens * towers:
        raise ValueError(
            f"The connector {connector!r} turns {tokens * towers} visual tokens into {count}, which are not known to "
            f"form a grid."
        )
    total = tower.total_tokens
    declared = getattr(tower, "class_tokens", getattr(tower.config, "num_prefix_tokens", None))
    candidates = range(_MAX_PREFIX + 1) if declared is None else [declared]
    prefix = next((n for n in candidates if total > n and isqrt(total - n) ** 2 == total - n), None)
    if prefix is None:
        raise ValueError(f"The vision tower's {total} tokens form no square grid.")
    first = total - tokens - prefix  # cell of the first token; negative for a class token that was kept
    cells = np.arange(first, first + tokens)
    return TokenGrid(isqrt(total - prefix), np.repeat(np.where(cells < 0, -1, cells), towers))


def visible_box(
    size: tuple[int, int], image_processor: BaseImageProcessor, aspect_ratio: str | None
) -> tuple[float, ...]:
    """The part of an image that the model sees, which the grid covers.

    ``square`` shows SigLIP the whole image (squeezed) and CLIP its middle (cropped); ``pad`` shows a square with
    borders, so the box reaches beyond the image.

    Args:
        size: width and height of the image in pixels.
        image_processor: the model's.
        aspect_ratio: the configuration's `image_aspect_ratio`.

    Returns:
        left, top, right, bottom in pixels of the image.
    """
    width, height = size
    box = (0.0, 0.0, float(width), float(height))
    if aspect_ratio == "pad":
        side = max(size)
        left, top = -((side - width) // 2), -((side - height) // 2)
        box = (float(left), float(top), float(left + side), float(top + side))
    if getattr(image_processor, "do_center_crop", False) and getattr(image_processor, "crop_size", None):
        wanted = dict(image_processor.size)
        shortest = wanted.get("shortest_edge")
        if shortest:
            # Shorter edge to `shortest`, then the middle crop: in pixels of the image, a square in its middle.
            scale = min(box[2] - box[0], box[3] - box[1]) / shortest
            half_width = dict(image_processor.crop_size)["width"] * scale / 2
            half_height = dict(image_processor.crop_size)["height"] * scale / 2
            middle = ((box[0] + box[2]) / 2, (box[1] + box[3]) / 2)
            box = (middle[0] - half_width, middle[1] - half_height, middle[0] + half_width, middle[1] + half_height)
    return box
