"""Questions about one picture have their beginning in common: it is computed once a picture, not once a question.

The beginning is all that stands before the question: the template's system prompt and the visual tokens, with a real
tower nine tenths of the prompt. GQA asks 32 questions about a picture, POPE 10 different ones, VQAv2 five.
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
    """The beginnings of a batch of prompts with one picture each.

    Attributes:
        head: [H] token ids up to the picture's place, which is the last of them.
        pictures: visual tokens [1, K, D] of each distinct picture.
        picture_of_row: [B] which of them each prompt has.
    """

    head: Tensor
    pictures: Sequence[Tensor]
    picture_of_row: Tensor

    @classmethod
    def of(
        cls, prompts: Sequence[Tensor], images: Sequence[Tensor | None], config: PretrainedConfig, new_tokens: int
    ) -> SharedPrefix | None:
        """The common beginnings, or None where there is nothing to gain or the model could tell the difference.

        Args:
            prompts: token ids [T] of each.
            images: visual tokens [n, K, D] of each; the same picture is the same memory.
            config: of the language model.
            new_tokens: how many are going to be generated.
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
        """Keys and values of each prompt's beginning, and its length in positions."""
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


def attends_to_all(config: PretrainedConfig, length: int) -> bool:
    """Whether every layer sees all of so many positions, wherever padding lies between them."""
    kinds = set(getattr(config, "layer_types", None) or ())
    window = getattr(config, "sliding_window", None)
    return kinds <= {"full_attention", "sliding_attention"} and (window is None or length <= window)
