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
    """The data arguments that every data set needs; the optional ones are told by `LazySupervisedDataset`."""

    @property
    def data_path(self) -> str: ...

    @property
    def template(self) -> str: ...


class TextPreprocess:
    """Encodes conversations with one template (TinyLLaVA v1, ``data/text_preprocess.py``).

    Args:
        tokenizer: the language model's tokenizer.
        template: name of a conversation template, see `TemplateFactory`.
        eos_token_ids: the ids that generation stops at, the tokenizer's eos if None; see `check_template`.
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
                f"The conversation template {template!r} has TinyLLaVA's encode; give it the argument num_images, the "
                f"number of a sample's images, None if they are not to be counted."
            )
        self._checked = False

    def __call__(self, messages: Sequence[Message], mode: str = "train", num_images: int | None = None) -> Sample:
        """Encode a conversation.

        Args:
            messages: ``{"from": "human" | "gpt", "value": text}`` in turn.
            mode: "train" for labels, "eval" for the text up to the answer that is to be generated (its value None).
            num_images: images the conversation comes with; see `Template.encode`.

        Returns:
            ``{"input_ids": [T], "labels": [T]}`` or, for "eval", ``{"input_ids": [T], "prompt": text}``.

        Raises:
            ValueError: the template does not fit the tokenizer ("train" only: nothing else has an end to learn), or
                the conversation does not fit the template.
        """
        if mode == "train" and not self._checked:
            check_template(self.tokenizer, self.template_name, self.eos_token_ids)
            self._checked = True
        return self.template.encode(messages, self.tokenizer, mode, num_images=num_images)

    def prompt_ids(self, question: str, num_images: int = 1) -> Tensor:
        """Token ids [T] of a question up to its answer, in front an `IMAGE_TOKEN_INDEX` for each of its images."""
        messages = exchange(f"{DEFAULT_IMAGE_TOKEN}\n" * num_images + question)
        return self(messages, mode="eval", num_images=num_images)["input_ids"]
