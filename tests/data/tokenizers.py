"""Small tokenizers of the kinds that the templates meet: a byte-level one, and two with a BOS and "▁" for a space."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer, GemmaTokenizer, LlamaTokenizer

FIXTURES = Path(__file__).parent.parent / "fixtures"

QWEN2_CHAT_TEMPLATE = (
    "{%- if messages[0]['role'] == 'system' %}{{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}"
    "{%- else %}{{- '<|im_start|>system\\nYou are Qwen, created by Alibaba Cloud.<|im_end|>\\n' }}{%- endif %}"
    "{%- for message in messages %}{%- if message['role'] != 'system' %}"
    "{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)


def qwen2(eos: str = "<|endoftext|>", chat_template: str | None = None) -> Any:
    """v1's fixture: byte-level, no BOS, padding is ``<|endoftext|>``."""
    tokenizer = AutoTokenizer.from_pretrained(FIXTURES / "tokenizers" / "qwen2-tiny")
    tokenizer.eos_token = eos
    tokenizer.chat_template = chat_template
    return tokenizer


@cache
def _pieces(special: tuple[str, ...]) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Vocabulary and merges of a BPE over "▁" pieces with bytes to fall back on, learned from the fixtures' texts."""
    cases = json.loads((FIXTURES / "v1" / "templates.json").read_text())
    texts = [turn["value"] or "" for case in cases for turn in case["messages"]]
    texts += [case["prompt"] for case in cases if "prompt" in case] * 3
    tokenizer = Tokenizer(models.BPE(byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(split=True)  # as sentencepiece: no piece spans two words
    bytes_ = [f"<0x{value:02X}>" for value in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=700, special_tokens=[*special, *bytes_], show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    model = json.loads(tokenizer.to_str())["model"]
    return model["vocab"], [tuple(merge) for merge in model["merges"]]


def _with_bos(tokenizer: Any) -> Any:
    bos = tokenizer.bos_token
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, tokenizer.bos_token_id)]
    )
    return tokenizer


def llama(legacy: bool) -> Any:
    """Llama's: BOS, every text begins with a space; `legacy` also puts one behind a special token."""
    vocab, merges = _pieces(("<unk>", "<s>", "</s>"))
    tokenizer = LlamaTokenizer(dict(vocab), list(merges), legacy=legacy, pad_token="<unk>", model_max_length=2048)
    return _with_bos(tokenizer)


def gemma() -> Any:
    """Gemma's: BOS, no space that is not in the text, a padding id of its own."""
    vocab, merges = _pieces(("<pad>", "<eos>", "<bos>", "<unk>", "<mask>"))
    return _with_bos(GemmaTokenizer(dict(vocab), list(merges), model_max_length=2048))
