"""The built-in templates: TinyLLaVA v1's, string for string (``data/template/*_template.py``), and chatml."""
# ruff: noqa: RUF009  # formatters never change, so templates may share them

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from tinyllava_switchkd.constants import DEFAULT_IMAGE_TOKEN
from tinyllava_switchkd.data.template.base import (
    EmptyFormatter,
    Formatter,
    StringFormatter,
    Template,
    begin_tokens,
    is_special,
    register_template,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SYSTEM_PROMPT = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions. "
)


@register_template("phi", "qwen2_base")
@dataclass
class PhiTemplate(Template):
    """``USER: … ASSISTANT: …<|endoftext|>``: Phi, StableLM, and the base models of Qwen1.5, Qwen2 and Qwen2.5."""

    format_image_token: Formatter = StringFormatter(slot=DEFAULT_IMAGE_TOKEN + "\n{{content}}")
    format_user: Formatter = StringFormatter(slot="USER: {{content}} ")
    format_assistant: Formatter = StringFormatter(slot="ASSISTANT: {{content}}<|endoftext|>")
    system: Formatter = EmptyFormatter(slot=SYSTEM_PROMPT)
    separator: Formatter = EmptyFormatter(slot=[" ASSISTANT: ", "<|endoftext|>"])


@register_template("qwen2_instruct")
@dataclass
class Qwen2InstructTemplate(PhiTemplate):
    """``USER: … ASSISTANT: …<|im_end|>``: the instruct models of Qwen2 and Qwen2.5."""

    format_assistant: Formatter = StringFormatter(slot="ASSISTANT: {{content}}<|im_end|>")
    separator: Formatter = EmptyFormatter(slot=[" ASSISTANT: ", "<|im_end|>"])


@register_template("llama")
@dataclass
class LlamaTemplate(PhiTemplate):
    """``USER: … ASSISTANT: …</s>``: Llama 2 and TinyLlama."""

    format_assistant: Formatter = StringFormatter(slot="ASSISTANT: {{content}}</s>")
    separator: Formatter = EmptyFormatter(slot=[" ASSISTANT: ", "</s>"])


@register_template("gemma")
@dataclass
class GemmaTemplate(PhiTemplate):
    """``USER: … ASSISTANT: …<eos>``: Gemma."""

    format_assistant: Formatter = StringFormatter(slot="ASSISTANT: {{content}}<eos>")
    separator: Formatter = EmptyFormatter(slot=[" ASSISTANT: ", "<eos>"])


@register_template("pretrain")
@dataclass
class PretrainTemplate(Template):
    """``<image>caption\\n``: the question is dropped, everything after the image is learned, and no end token is added.

    For a sample with several rounds, all images come first and then all answers. (v1 repeats the placeholder in every
    round, and so uses up the images of the following samples.)
    """

    format_image_token: Formatter = EmptyFormatter()
    format_user: Formatter = EmptyFormatter(slot=DEFAULT_IMAGE_TOKEN)
    format_assistant: Formatter = StringFormatter(slot="{{content}}\n")
    system: Formatter = EmptyFormatter()
    separator: Formatter = EmptyFormatter(slot=["", ""])

    def _prompt(self, question_list: list[str], answer_list: list[str | None]) -> str:
        images = sum(question.count(DEFAULT_IMAGE_TOKEN) for question in question_list)
        captions = "".join(self.format_assistant.apply(content=answer) for answer in answer_list)
        return self.format_user.apply() * max(1, images) + captions

    def _answer_spans(self, prompt: str, questions: list[str], answers: list[str | None]) -> list[tuple[int, int]]:
        start = 0
        while prompt.startswith(DEFAULT_IMAGE_TOKEN, start):
            start += len(DEFAULT_IMAGE_TOKEN)
        return [(start, len(prompt))]


# Stand for the turns while a chat template is analysed. Unicode noncharacters, which occur nowhere else.
_QUESTIONS = ("\ufdd1", "\ufdd2")
_ANSWERS = ("\ufdd3", "\ufdd4")


@dataclass(eq=False)
class OpeningFormatter(StringFormatter):
    """A text with one ``{{content}}`` field; ``apply(content=None)`` is all the text before the field."""

    def apply(self, **kwargs: str | None) -> str:
        if "content" in kwargs and kwargs["content"] is None:
            return self.slot.partition("{{content}}")[0]
        return super().apply(**kwargs)


@register_template("chatml")
@dataclass
class ChatMLTemplate(Template):
    """``<|im_start|>user … <|im_end|>``, taken from the tokenizer's chat template with its system prompt.

    The chat template need not be ChatML; any format that writes one turn after the other works.

    The formatters below are plain ChatML. `for_tokenizer`, which `encode` calls, replaces them by those of the
    tokenizer's chat template. Every answer follows the chat template's generation prompt with thinking off, so that
    training and generation see the same text.
    """

    format_image_token: Formatter = StringFormatter(slot=DEFAULT_IMAGE_TOKEN + "\n{{content}}")
    format_user: Formatter = OpeningFormatter(slot="<|im_start|>user\n{{content}}<|im_end|>\n")
    format_assistant: Formatter = OpeningFormatter(slot="<|im_start|>assistant\n{{content}}<|im_end|>\n")
    system: Formatter = EmptyFormatter()
    separator: Formatter = EmptyFormatter(slot=["<|im_start|>assistant\n", "<|im_end|>"])

    def for_tokenizer(self, tokenizer: PreTrainedTokenizerBase) -> ChatMLTemplate:
        """A copy whose formatters are those of the tokenizer's chat template.

        Raises:
            ValueError: the tokenizer has no chat template, or one that does not render turn by turn.
        """
        known, template = self.__dict__.get("_fitted", (None, None))
        if known is not tokenizer:
            template = self._fit(tokenizer)
            self._fitted = (tokenizer, template)  # cached, because rendering is slow
        return template

    def _fit(self, tokenizer: PreTrainedTokenizerBase) -> ChatMLTemplate:
        name = getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__
        if not getattr(tokenizer, "chat_template", None):
            raise ValueError(f"The tokenizer {name} has no chat template, from which the template 'chatml' is made.")
        turns = [
            {"role": role, "content": text}
            for question, answer in zip(_QUESTIONS, _ANSWERS, strict=True)
            for role, text in (("user", question), ("assistant", answer))
        ]
        first, second = _render(tokenizer, turns[:1], True), _render(tokenizer, turns, False)
        try:
            head, opening = first.split(_QUESTIONS[0])
            between = second.split(_ANSWERS[0])[1].split(_QUESTIONS[1])[0]
            tail = second.split(_ANSWERS[1])[1]
            ending = tail if between.startswith(tail) else ""
            user = between[len(ending) :]
            if not head.endswith(user) or not second.startswith(head + _QUESTIONS[0]) or not ending:
                raise ValueError
        except (ValueError, IndexError):
            raise ValueError(
                f"The chat template of the tokenizer {name} does not write one turn after the other, so the template "
                f"'chatml' cannot be made from it; choose another conversation template."
            ) from None
        system = head[: len(head) - len(user)]
        bos = tokenizer.bos_token
        if bos and system.startswith(bos) and begin_tokens(tokenizer)[-1:] == [tokenizer.bos_token_id]:
            system = system[len(bos) :]  # the tokenizer adds it
        return replace(
            self,
            format_user=OpeningFormatter(slot=user + "{{content}}"),
            format_assistant=OpeningFormatter(slot=opening + "{{content}}" + ending),
            system=EmptyFormatter(slot=system),
            separator=EmptyFormatter(slot=[opening, _end_token(tokenizer, ending)]),
        )


def _render(tokenizer: PreTrainedTokenizerBase, turns: list[dict[str, str]], add_generation_prompt: bool) -> str:
    return tokenizer.apply_chat_template(
        turns, tokenize=False, add_generation_prompt=add_generation_prompt, enable_thinking=False
    )


def _end_token(tokenizer: PreTrainedTokenizerBase, ending: str) -> str:
    """The first special token in the text after an answer, or that whole text."""
    for token in tokenizer(ending, add_special_tokens=False).input_ids:
        if is_special(tokenizer, token):
            return tokenizer.convert_ids_to_tokens(token)
    return ending
