"""Conversations to token ids."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Protocol

from tinyllava_switchkd.constants import DEFAULT_IMAGE_TOKEN
from tinyllava_switchkd.data.template import Message, TemplateFactory, check_template
from tinyllava_switchkd.data.template.base import exchange

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

    from tinyllava_switchkd.data.collator import Sample


class DataSettings(Protocol):
    """The required data arguments; `LazySupervisedDataset` lists the optional ones."""

    @property
    def data_path(self) -> str: ...

    @property
    def template(self) -> str: ...


class TextPreprocess:
    """Encodes conversations with one template (TinyLLaVA v1, ``data/text_preprocess.py``).

    Args:
        tokenizer: the language model's tokenizer.
        template: name of a conversation template, see `TemplateFactory`.
        eos_token_ids: the ids that end generation, the tokenizer's eos if None; see `check_template`.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, template: str, eos_token_ids: int | Collection[int] | None = None
    ) -> None:
        self.tokenizer = tokenizer
        self.template_name = template
        self.eos_token_ids = eos_token_ids
        self.template = TemplateFactory(template)()
        if "num_images" not in inspect.signature(self.template.encode).parameters:
            raise ValueError(
                f"The conversation template {template!r} has TinyLLaVA v1's encode; add the argument num_images, the "
                f"number of the sample's images or None if unknown."
            )
        self._checked = False

    def __call__(self, messages: Sequence[Message], mode: str = "train", num_images: int | None = None) -> Sample:
        """Encode a conversation.

        Args:
            messages: alternating turns ``{"from": "human" | "gpt", "value": text}``.
            mode: "train" for labels; "eval" for the prompt of an answer to be generated (its value is None).
            num_images: number of images; see `Template.encode`.

        Returns:
            ``{"input_ids": [T], "labels": [T]}`` or, for "eval", ``{"input_ids": [T], "prompt": text}``.

        Raises:
            ValueError: the template does not fit the tokenizer (checked for "train" only), or the conversation does
                not fit the template.
        """
        if mode == "train" and not self._checked:
            check_template(self.tokenizer, self.template_name, self.eos_token_ids)
            self._checked = True
        return self.template.encode(messages, self.tokenizer, mode, num_images=num_images)

    def prompt_ids(self, question: str, num_images: int = 1) -> Tensor:
        """Token ids [T] of a prompt with a question and its images, each an `IMAGE_TOKEN_INDEX`."""
        messages = exchange(f"{DEFAULT_IMAGE_TOKEN}\n" * num_images + question)
        return self(messages, mode="eval", num_images=num_images)["input_ids"]
