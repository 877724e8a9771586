"""Attention from answer tokens to visual tokens, as a map over the image."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from tinyllava_switchkd.model.caches import cache_of, with_cache
from tinyllava_switchkd.visualize.grid import token_grid
from tinyllava_switchkd.visualize.pieces import text_groups

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from tinyllava_switchkd.model.modeling import TinyLlavaForConditionalGeneration as TinyLlava


@dataclass(frozen=True)
class AttentionMap:
    """Attention of an answer to its images.

    Attributes:
        tokens: [A] pieces of the answer's text (one token, or the tokens of one character).
        weights: [A, I, side, side] attention to every cell of every image, averaged over heads and layers; NaN for
            cells without a visual token.
    """

    tokens: tuple[str, ...]
    weights: np.ndarray

    @property
    def share(self) -> np.ndarray:
        """[A] the fraction of each token's attention that goes to the images, in 0..1."""
        return np.nansum(self.weights, axis=(1, 2, 3))

    def of(self, token: int | None = None, image: int = 0) -> np.ndarray:
        """[side, side] map of one token over one image, or (None) of the whole answer, the mean of its tokens."""
        return self.weights[:, image].mean(axis=0) if token is None else self.weights[token, image]


@contextmanager
def eager_attention(language_model: PreTrainedModel) -> Iterator[None]:
    """Use the attention implementation that returns weights, then restore the previous one.

    This changes the model itself, so nothing else may run on the model in the meantime.
    """
    before = language_model.config._attn_implementation
    language_model.set_attn_implementation("eager")
    try:
        yield
    finally:
        language_model.set_attn_implementation(before)


@torch.no_grad()
def attention_map(
    model: TinyLlava,
    tokenizer: PreTrainedTokenizerBase,
    input_ids: Tensor,
    image_features: Tensor | None,
    answer_ids: Sequence[int],
    layers: slice | None = None,
) -> AttentionMap:
    """Attention from each token of an answer to the visual tokens of its prompt.

    A token's attention is read at the position that predicted it, the one before it. The prompt is processed once with
    the model's usual attention; only the answer's few rows are computed with weights, so memory stays small.

    Args:
        model: the model.
        tokenizer: the model's tokenizer.
        input_ids: [T] the prompt, one `IMAGE_TOKEN_INDEX` per image.
        image_features: [I, K, D], `model.encode_images` of the prompt's images; None if it has none.
        answer_ids: the generated tokens.
        layers: decoder layers to average over; None for all.

    Raises:
        ValueError: there is no image or no answer, the visual tokens have no position in the image (see `token_grid`),
            or the language model returns no attention weights.
    """
    grid = token_grid(model)
    if image_features is None or len(image_features) == 0:
        raise ValueError("The conversation has no image, so there is no attention map.")
    groups = text_groups(tokenizer, answer_ids)
    if not groups:
        raise ValueError("The answer is empty, so no token's attention can be shown.")
    language_model, device = model.language_model, image_features.device
    spliced = model.prepare_inputs(input_ids[None].to(device), image_features=image_features)
    prompt = spliced.inputs_embeds  # [1, P, D]
    answer = torch.tensor([list(answer_ids[:-1])], dtype=torch.long, device=device)  # [1, A-1]
    rows = torch.cat([prompt[:, -1:], model.get_input_embeddings()(answer).to(prompt.dtype)], dim=1)  # [1, A, D]
    cache = cache_of(language_model(inputs_embeds=prompt[:, :-1], use_cache=True, logits_to_keep=1))
    with eager_attention(language_model):
        outputs = language_model(
            inputs_embeds=rows, **with_cache(cache), use_cache=True, output_attentions=True, logits_to_keep=1
        )
    maps = [layer for layer in outputs.attentions or () if layer is not None][layers or slice(None)]
    if not maps:
        raise ValueError(
            f"{type(language_model).__name__} returned no attention weights for layers {layers}; it has "
            f"{language_model.config.num_hidden_layers} layers."
        )
    # Layer by layer [1, heads, A, P+A-1] -> [A, P-1]; the prompt's last token is text, so no visual token is lost.
    to_prompt = sum(layer[0].float().mean(dim=0)[:, : prompt.shape[1]] for layer in maps) / len(maps)
    to_images = to_prompt[:, spliced.image_mask[0]].cpu().numpy()  # [A, I*K]
    to_images = to_images.reshape(len(answer_ids), len(image_features), -1)  # [A, I, K]
    merged = np.stack([to_images[indices].mean(axis=0) for _, indices in groups])  # [groups, I, K]
    return AttentionMap(tuple(text for text, _ in groups), grid.spread(merged))


def correlation(ours: AttentionMap, reference: AttentionMap) -> float | None:
    """Pearson's correlation of two maps of whole answers over the first image, over the reference's cells.

    A map with another grid is first resampled (bilinear). Cells for which either model has no token are left out.

    Returns:
        -1 to 1, or None if a map is constant.
    """
    theirs, mine = reference.of(), ours.of()
    if mine.shape != theirs.shape:
        cells = Tensor(mine)[None, None]
        mine = torch.nn.functional.interpolate(cells, theirs.shape, mode="bilinear", antialias=True)[0, 0].numpy()
    both = np.isfinite(mine) & np.isfinite(theirs)
    mine, theirs = mine[both].astype(float), theirs[both].astype(float)
    if len(mine) < 2 or np.ptp(mine) == 0 or np.ptp(theirs) == 0:
        return None
    return float(np.corrcoef(mine, theirs)[0, 1])
