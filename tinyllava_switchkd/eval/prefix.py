"""The shared prefix of prompts about one picture, which is computed once per picture instead of once per question.

The prefix is everything before the question: the template's system prompt and the visual tokens. With a real tower it
is nine tenths of the prompt. GQA asks 32 questions per picture, POPE 10 different ones, VQAv2 five.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import DynamicCache, PretrainedConfig

from tinyllava_switchkd.constants import IMAGE_TOKEN_INDEX
from tinyllava_switchkd.model.caches import with_cache
from tinyllava_switchkd.model.modeling import TinyLlavaForConditionalGeneration


@dataclass(frozen=True)
class SharedPrefix:
    """The prefixes of a batch of prompts with one picture each.

    Attributes:
        head: [H] token ids up to and including the picture's placeholder.
        pictures: visual tokens [1, K, D] of each distinct picture.
        picture_of_row: [B] index of each prompt's picture.
    """

    head: Tensor
    pictures: Sequence[Tensor]
    picture_of_row: Tensor

    @classmethod
    def of(
        cls, prompts: Sequence[Tensor], images: Sequence[Tensor | None], config: PretrainedConfig, new_tokens: int
    ) -> SharedPrefix | None:
        """The shared prefixes, or None if nothing is gained or the result could change.

        Args:
            prompts: token ids [T] of each prompt.
            images: visual tokens [n, K, D] of each prompt; the same picture must be the same memory.
            config: of the language model.
            new_tokens: the number of tokens to generate.
        """
        visuals = [visual for visual in images if visual is not None and len(visual) == 1]
        if len(visuals) < len(images):
            return None
        numbers: dict[int, int] = {}
        picture_of_row = [numbers.setdefault(visual.data_ptr(), len(numbers)) for visual in visuals]
        if len(numbers) == len(prompts):
            return None
        head = prompts[0][: int((prompts[0] == IMAGE_TOKEN_INDEX).nonzero()[0]) + 1]
        if not all(torch.equal(prompt[: len(head)], head) for prompt in prompts):
            return None
        longest = max(map(len, prompts)) + visuals[0].shape[1] + new_tokens
        if not attends_to_all(config, longest):
            return None
        pictures = [visuals[picture_of_row.index(number)] for number in range(len(numbers))]
        return cls(head, pictures, torch.tensor(picture_of_row))

    def compute(self, model: TinyLlavaForConditionalGeneration) -> tuple[DynamicCache, int]:
        """Keys and values of each prompt's prefix, and its length in positions."""
        head = self.head.to(model.device).expand(len(self.pictures), -1)  # [I, H]
        prepared = model.prepare_inputs(head, image_features=torch.cat(list(self.pictures)))
        cache = DynamicCache(config=model.language_model.config)
        model.language_model.get_decoder()(
            inputs_embeds=prepared.inputs_embeds,
            attention_mask=prepared.attention_mask,
            position_ids=prepared.position_ids,
            use_cache=True,
            **with_cache(cache),
        )
        cache.batch_select_indices(self.picture_of_row.to(model.device))
        return cache, prepared.inputs_embeds.shape[1]


def positions_vary(config: PretrainedConfig, length: int) -> bool:
    """Whether a text's rotary positions may depend on the other texts of a batch, the longest of which has `length`.

    Of the longest text in a pass, the kinds "longrope" and "dynamic" derive the frequencies for all.
    """
    rope = getattr(config, "rope_parameters", None) or {}
    for one in (rope, *(value for value in rope.values() if isinstance(value, dict))):  # or one per kind of layer
        kind = one.get("rope_type") or "default"
        if kind == "longrope" or "dynamic" in kind:
            original = one.get("original_max_position_embeddings") or config.max_position_embeddings
            if length >= min(original, config.max_position_embeddings):
                return True
    return False


def attends_to_all(config: PretrainedConfig, length: int) -> bool:
    """Whether every layer attends to all of `length` positions, including any padding between them."""
    kinds = set(getattr(config, "layer_types", None) or ())
    window = getattr(config, "sliding_window", None)
    return kinds <= {"full_attention", "sliding_attention"} and (window is None or length <= window)
