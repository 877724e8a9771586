"""One forward pass of a model over a batch, and the tensors of it that a method needs.

A pathway runs once for all terms that use it, and keeps only the tensors that were asked for.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PretrainedConfig
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from tinyllava_switchkd.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from tinyllava_switchkd.model.splice import Spliced, image_of_placeholder, splice

if TYPE_CHECKING:
    from tinyllava_switchkd.data.collator import Batch, Pictures, Text
    from tinyllava_switchkd.model.modeling import TinyLlavaForConditionalGeneration as TinyLlava


class Sight(NamedTuple):
    """The tensors to keep of a pathway, besides the hidden states of its supervised positions.

    Attributes:
        visual: last hidden states of visual tokens.
        features: the vision tower's tokens.
        projected: the connector's outputs.
        attention: indices of the decoder layers whose attention of text to visual tokens is needed. Only these layers
            keep queries and keys; all layers use their fast kernels.
    """

    visual: bool = False
    features: bool = False
    projected: bool = False
    attention: tuple[int, ...] = ()

    def __or__(self, other: Sight) -> Sight:
        """The union of two."""
        attention = tuple(sorted({*self.attention, *other.attention}))
        return Sight(
            self.visual or other.visual, self.features or other.features, self.projected or other.projected, attention
        )


BLIND = Sight()
"""Keeps nothing besides the supervised positions."""


@dataclass(repr=False)
class View:
    """The tensors kept of one pathway for a batch; attributes that were not asked for are missing.

    Attributes:
        hidden: [supervised tokens, width] last hidden states that predict a supervised token; tokens of samples with
            images come first.
        visual: [visual tokens, width] last hidden states of visual tokens, sample by sample.
        sample_of_visual: [visual tokens] index of each token's sample.
        features: [images, patches, vision width]; without images it is empty but stays in the graph.
        projected: [images, visual tokens per image, width], likewise.
        attention: layer -> for each sample with images, in order, its `text_to_vision_attention`
            [heads, text tokens, visual tokens].
    """

    hidden: Tensor
    visual: Tensor = field(init=False)
    sample_of_visual: Tensor = field(init=False)
    features: Tensor = field(init=False)
    projected: Tensor = field(init=False)
    attention: Mapping[int, list[Tensor]] = field(init=False)


class Positions(NamedTuple):
    """Positions `rows`, `columns` [tokens] whose hidden states predict a supervised token, samples with images first.

    `labels` [tokens] are the predicted tokens. `order` [tokens] maps into row-by-row order. `images` is the number of
    tokens of samples with images.
    """

    rows: Tensor
    columns: Tensor
    labels: Tensor
    order: Tensor
    images: int


TEXT_KEYS: tuple[Text, ...] = ("input_ids", "labels", "attention_mask")


def placeholders(batch: Batch) -> Tensor:
    """Mask [samples, tokens] of the image placeholders, without padding."""
    found = batch["input_ids"] == IMAGE_TOKEN_INDEX
    return found & batch["attention_mask"].bool() if batch.get("attention_mask") is not None else found


def batch_images(batch: Batch, model: TinyLlava, key: Pictures = "images") -> Tensor:
    """The images of the placeholders, in order [images, 3, height, width]; one dummy image if there are none.

    The dummy keeps the vision tower in every rank's graph. Dummies of text-only samples, which TinyLLaVA v1 adds
    (`modeling_tinyllava.py`), are dropped.
    """
    images = batch.get(key)
    if images is None or len(images) == 0:
        images = torch.zeros(1, 3, model.image_size, model.image_size, device=batch["input_ids"].device)
    images = images if isinstance(images, Tensor) else torch.stack(list(images))
    chosen = image_of_placeholder(placeholders(batch), len(images))
    return images[chosen] if len(chosen) else images[:1]


def splice_batch(model: TinyLlava, batch: Batch, visual: Tensor | None) -> Spliced:
    """The spliced batch for a model's decoder, padded on the right."""
    return splice(
        batch["input_ids"],
        batch.get("attention_mask"),
        batch["labels"],
        visual,
        model.get_input_embeddings(),
        padding_side="right",
    )


def supervised_positions(input_ids: Tensor, spliced: Spliced) -> Positions:
    """Positions whose next token is supervised."""
    predicts = (spliced.labels[:, 1:] != IGNORE_INDEX) & spliced.attention_mask[:, :-1].bool()
    rows, columns = predicts.nonzero(as_tuple=True)
    text_only = ~(input_ids == IMAGE_TOKEN_INDEX).any(1)
    order = text_only[rows].long().argsort(stable=True)
    rows, columns = rows[order], columns[order]
    return Positions(rows, columns, spliced.labels[rows, columns + 1], order, int((~text_only[rows]).sum()))


class States:
    """A decoder's last hidden states, indexed by row and column of the spliced batch.

    Args:
        last: [samples, length, width], or [1, tokens of all samples, width] if samples are packed.
        starts: [samples] offset of each sample, if packed.
    """

    def __init__(self, last: Tensor, starts: Tensor | None = None) -> None:
        self._last = last
        self._starts = starts

    def at(self, rows: Tensor, columns: Tensor) -> Tensor:
        """The hidden states [positions, width] at these positions."""
        if self._starts is None:
            return self._last[rows, columns]
        return self._last[0, self._starts[rows] + columns]


def decode(model: TinyLlava, spliced: Spliced, packing: bool = False) -> States:
    """Run a language model's decoder over a spliced batch.

    Padding is on the right, so the causal mask alone hides it from real tokens, and attention takes its fastest path.
    Packed samples are separated by positions that restart at 0; flash attention uses the given lengths instead.
    """
    decoder = model.language_model.get_decoder()
    if not packing:
        return States(decoder(inputs_embeds=spliced.inputs_embeds, use_cache=False).last_hidden_state)
    is_token = spliced.attention_mask.bool()
    ends = nn.functional.pad(is_token.sum(1).cumsum(0), (1, 0))  # [samples + 1]
    longest = is_token.shape[1]
    last = decoder(
        inputs_embeds=spliced.inputs_embeds[is_token][None],
        position_ids=spliced.position_ids[is_token][None],
        use_cache=False,
        cu_seq_lens_q=ends.int(),
        cu_seq_lens_k=ends.int(),
        max_length_q=longest,
        max_length_k=longest,
    ).last_hidden_state
    return States(last, ends[:-1])


def look(
    model: TinyLlava, spliced: Spliced, positions: Positions, sight: Sight = BLIND, *, packing: bool = False
) -> View:
    """Run a decoder once and keep what `sight` asks for; the caller adds features and projected tokens."""
    with recording(model, sight.attention) as recorded:
        states = decode(model, spliced, packing)
    view = View(states.at(positions.rows, positions.columns))
    if sight.visual:
        rows, columns = spliced.image_mask.nonzero(as_tuple=True)
        view.visual, view.sample_of_visual = states.at(rows, columns), rows
    if sight.attention:
        view.attention = {layer: _of_samples(*recorded[layer], spliced, packing) for layer in sight.attention}
    return view


def _of_samples(query: Tensor, key: Tensor, scaling: float, spliced: Spliced, packing: bool) -> list[Tensor]:
    """`text_to_vision_attention` of every sample with images."""
    mask = spliced.attention_mask.bool()
    lengths = mask.sum(1).tolist()
    starts = torch.tensor([0, *lengths]).cumsum(0).tolist()
    found = []
    for row, length in enumerate(lengths):
        is_visual = spliced.image_mask[row, :length]
        if not bool(is_visual.any()):
            continue
        sample = (
            (0, slice(None), slice(starts[row], starts[row] + length)) if packing else (row, slice(None), slice(length))
        )
        found.append(text_to_vision_attention(query[sample], key[sample], is_visual, scaling))
    return found


def text_to_vision_attention(query: Tensor, key: Tensor, is_visual: Tensor, scaling: float) -> Tensor:
    """Attention of each text token of one sample to each visual token, with the causal mask.

    Args:
        query: [heads, tokens, head width], after rotary positions.
        key: [key heads, tokens, head width]; each is shared by heads / key heads queries.
        is_visual: [tokens] bool.
        scaling: factor of the scores.

    Returns:
        [heads, text tokens, visual tokens], at least float32: the visual columns of the softmax over all tokens. The
        row of a text token before the image is zero.
    """
    dtype = torch.promote_types(query.dtype, torch.float32)
    query, key = query[:, ~is_visual].to(dtype), key.to(dtype).repeat_interleave(len(query) // len(key), dim=0)
    numbers = torch.arange(len(is_visual), device=query.device)
    with torch.autocast(query.device.type, enabled=False):
        scores = query @ key.transpose(1, 2) * scaling  # [heads, text tokens, tokens]
    scores = scores.masked_fill(numbers > numbers[~is_visual][:, None], -torch.inf)
    return scores.softmax(-1)[:, :, is_visual]


RECORDING = "tinyllava_recording"


@contextmanager
def recording(model: TinyLlava, layers: tuple[int, ...]) -> Iterator[dict[int, tuple[Tensor, Tensor, float]]]:
    """Make the given decoder layers keep their queries and keys inside the ``with`` block; their outputs are unchanged.

    Yields:
        layer -> (queries [batch, heads, tokens, head width], keys likewise, factor of the scores), filled by a run.
    """
    found: dict[int, tuple[Tensor, Tensor, float]] = {}
    replaced: list[tuple[nn.Module, PretrainedConfig]] = []
    try:
        for number in layers:
            attention = model.language_model.get_decoder().layers[number].self_attn
            replaced.append((attention, attention.config))
            config = attention.config
            attention.config = copy.copy(config)
            attention.config._attn_implementation = RECORDING
            attention._recording = (found, number, config)
        yield found
    finally:
        for attention, config in replaced:
            attention.config = config
            del attention._recording


def _record(module: Any, query: Tensor, key: Tensor, value: Tensor, *args: object, **kwargs: Any) -> Any:
    """An attention function for transformers that stores queries and keys and calls the usual function."""
    found, number, config = module._recording
    scaling = kwargs.get("scaling")
    if number not in found:
        found[number] = (query, key, query.shape[-1] ** -0.5 if scaling is None else scaling)
    eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    usual = ALL_ATTENTION_FUNCTIONS.get_interface(config._attn_implementation, eager)
    changed, module.config = module.config, config  # flash attention reads its name from the configuration
    try:
        return usual(module, query, key, value, *args, **kwargs)
    finally:
        module.config = changed


AttentionInterface.register(RECORDING, _record)
