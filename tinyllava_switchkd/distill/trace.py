"""One run of a model over a batch, and what of it a method asked to see.

A pathway runs once whatever the number of terms that look at it, and keeps what somebody asked for and nothing else.
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
    """What is to be seen of a pathway, beside the hidden states of its supervised positions.

    Attributes:
        visual: last hidden states at the positions of visual tokens.
        features: the vision tower's tokens.
        projected: the connector's outputs.
        attention: numbers of the decoder layers whose attention of text on visual tokens is wanted. Only these layers
            keep queries and keys; all keep their fast kernel.
    """

    visual: bool = False
    features: bool = False
    projected: bool = False
    attention: tuple[int, ...] = ()

    def __or__(self, other: Sight) -> Sight:
        """What either of two asks for."""
        attention = tuple(sorted({*self.attention, *other.attention}))
        return Sight(
            self.visual or other.visual, self.features or other.features, self.projected or other.projected, attention
        )


BLIND = Sight()
"""Nothing is to be seen beside the supervised positions."""


@dataclass(repr=False)
class View:
    """What one pathway showed of a batch; what was not asked for is not there.

    Attributes:
        hidden: [supervised tokens, width] last hidden states that predict a supervised token; the tokens of samples
            with images come first.
        visual: [visual tokens, width] last hidden states of visual tokens, sample by sample.
        sample_of_visual: [visual tokens] the sample that each belongs to.
        features: [images, patches, vision width]. A batch without images has none, but what is here stays in the
            graph.
        projected: [images, visual tokens of one, width], likewise.
        attention: layer -> for each sample with images its `text_to_vision_attention`
            [heads, text tokens, visual tokens], in order.
    """

    hidden: Tensor
    visual: Tensor = field(init=False)
    sample_of_visual: Tensor = field(init=False)
    features: Tensor = field(init=False)
    projected: Tensor = field(init=False)
    attention: Mapping[int, list[Tensor]] = field(init=False)


class Positions(NamedTuple):
    """Where hidden states predict a supervised token: `rows`, `columns` [tokens], those of samples with images first.

    `labels` [tokens] are the tokens predicted, `order` [tokens] maps into row-by-row order, `images` counts the tokens
    of samples with images.
    """

    rows: Tensor
    columns: Tensor
    labels: Tensor
    order: Tensor
    images: int


TEXT_KEYS: tuple[Text, ...] = ("input_ids", "labels", "attention_mask")


def placeholders(batch: Batch) -> Tensor:
    """Where an image belongs [samples, tokens], padding left out."""
    found = batch["input_ids"] == IMAGE_TOKEN_INDEX
    return found & batch["attention_mask"].bool() if batch.get("attention_mask") is not None else found


def batch_images(batch: Batch, model: TinyLlava, key: Pictures = "images") -> Tensor:
    """The images that placeholders stand for, in order [images, 3, height, width]; one dummy if there are none.

    A dummy keeps the vision tower in every rank's graph. TinyLLaVA v1 gives each text-only sample one of its own
    (`modeling_tinyllava.py`); of these all but the needed are dropped.
    """
    images = batch.get(key)
    if images is None or len(images) == 0:
        images = torch.zeros(1, 3, model.image_size, model.image_size, device=batch["input_ids"].device)
    images = images if isinstance(images, Tensor) else torch.stack(list(images))
    chosen = image_of_placeholder(placeholders(batch), len(images))
    return images[chosen] if len(chosen) else images[:1]


def splice_batch(model: TinyLlava, batch: Batch, visual: Tensor | None) -> Spliced:
    """A batch as a model's decoder reads it, padded on the right."""
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
    """Last hidden states of a decoder's run, before its head, readable by row and column of the spliced batch.

    Args:
        last: [samples, length, width], or [1, tokens of all samples, width] where samples are packed.
        starts: [samples] where each begins, if packed.
    """

    def __init__(self, last: Tensor, starts: Tensor | None = None) -> None:
        self._last = last
        self._starts = starts

    def at(self, rows: Tensor, columns: Tensor) -> Tensor:
        """[positions, width]."""
        if self._starts is None:
            return self._last[rows, columns]
        return self._last[0, self._starts[rows] + columns]


def decode(model: TinyLlava, spliced: Spliced, packing: bool = False) -> States:
    """Run a language model's decoder over a spliced batch.

    Padding stands on the right, so the causal mask alone keeps it out of what real tokens see, and attention takes its
    fastest path. Packed samples are told apart by positions that begin anew; the lengths spare flash attention the
    search for them.
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
    """Run a decoder once and keep what is asked for (features and projected tokens are the caller's to add)."""
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
    """`text_to_vision_attention` of every sample that has images."""
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
    """How much each text token of one sample attends to each visual token, under the causal mask.

    Args:
        query: [heads, tokens, head width], positions rotated in already.
        key: [key heads, tokens, head width]; each serves heads / key heads queries.
        is_visual: [tokens] bool.
        scaling: factor of the scores.

    Returns:
        [heads, text tokens, visual tokens], at least float32: rows of the softmax over all tokens, cut to the visual
        columns. A text token before the image sees nothing of it: its row is zero.
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
    """While inside, the chosen decoder layers keep their queries and keys; what they compute stays the same.

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
    """An attention of transformers' interface that notes queries and keys, and has the usual one do the work."""
    found, number, config = module._recording
    scaling = kwargs.get("scaling")
    if number not in found:
        found[number] = (query, key, query.shape[-1] ** -0.5 if scaling is None else scaling)
    eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    usual = ALL_ATTENTION_FUNCTIONS.get_interface(config._attn_implementation, eager)
    changed, module.config = module.config, config  # flash attention reads its own name there
    try:
        return usual(module, query, key, value, *args, **kwargs)
    finally:
        module.config = changed


AttentionInterface.register(RECORDING, _record)
