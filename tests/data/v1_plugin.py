"""A template as written for TinyLLaVA v1: plain formatters as defaults, and a hook that is not called here."""
# ruff: noqa: RUF009

from dataclasses import dataclass

from tinyllava_switchkd.data.template import EmptyFormatter, Formatter, StringFormatter, Template


@dataclass
class DialogueTemplate(Template):
    format_image_token: "Formatter" = StringFormatter(slot="<image>\n{{content}}")
    format_user: "Formatter" = StringFormatter(slot="<|im_start|>user\n{{content}}<|im_end|>\n")
    format_assistant: "Formatter" = StringFormatter(slot="<|im_start|>bot\n{{content}}<|im_end|>\n")
    system: "Formatter" = EmptyFormatter(slot="")
    separator: "Formatter" = EmptyFormatter(slot=["<|im_start|>bot\n", "<|im_end|>"])

    def _make_masks(self, labels, tokenizer, sep, eos_token_length, rounds):
        raise AssertionError("v1 called this")
