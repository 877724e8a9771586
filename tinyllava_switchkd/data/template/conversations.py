"""TinyLLaVA v1's templates, string for string (``data/template/*_template.py``)."""
# ruff: noqa: RUF009  # formatters never change, so that templates may share them

from __future__ import annotations

from dataclasses import dataclass

from tinyllava_switchkd.constants import DEFAULT_IMAGE_TOKEN
from tinyllava_switchkd.data.template.base import (
    EmptyFormatter,
    Formatter,
    StringFormatter,
    Template,
    register_template,
)

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
    """``<image>caption\\n``: the question is thrown away, everything after the image is learned, nothing ends it.

    A sample of several turns keeps all its answers and its images stand at the very front (v1 repeats the image's
    place at every turn, and so takes the images of the samples that follow).
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
