"""Small tokenizers of all kinds that templates must work with, see `FAMILIES`."""

from __future__ import annotations

import io
import json
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import gguf
import sentencepiece
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
    """Vocabulary and merges of a BPE over "▁" pieces with byte fallback, learned from the fixtures' texts."""
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


def _with_bos(tokenizer: Any, eos: bool = False) -> Any:
    """A tokenizer that adds its BOS at the start of every text and, if asked, its EOS at the end."""
    ends = [tokenizer.bos_token, tokenizer.eos_token]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{ends[0]} $A {ends[1]}" if eos else f"{ends[0]} $A",
        special_tokens=[(token, tokenizer.convert_tokens_to_ids(token)) for token in set(ends)],
    )
    return tokenizer


def llama(legacy: bool) -> Any:
    """Llama's: BOS, every text begins with a space; `legacy` also adds one after a special token."""
    vocab, merges = _pieces(("<unk>", "<s>", "</s>"))
    tokenizer = LlamaTokenizer(dict(vocab), list(merges), legacy=legacy, pad_token="<unk>", model_max_length=2048)
    return _with_bos(tokenizer)


def gemma() -> Any:
    """Gemma's: BOS, no additional spaces, a separate padding id."""
    vocab, merges = _pieces(("<pad>", "<eos>", "<bos>", "<unk>", "<mask>"))
    return _with_bos(GemmaTokenizer(dict(vocab), list(merges), model_max_length=2048))


def smollm2() -> Any:
    """SmolLM2's: byte-level; its `bos_token` is the chat template's ``<|im_start|>``, which it does not add itself."""
    tokenizer = qwen2("<|im_end|>", QWEN2_CHAT_TEMPLATE)
    tokenizer.bos_token = "<|im_start|>"
    return tokenizer


def bos_is_eos() -> Any:
    """GPT-2's and Phi's: byte-level; BOS and EOS are both ``<|endoftext|>``, and neither is added."""
    tokenizer = qwen2()
    tokenizer.bos_token = "<|endoftext|>"
    return tokenizer


def llama3(eos: bool = False) -> Any:
    """Llama 3's: byte-level, with a BOS at the start of every text; `eos` adds an EOS at the end ("add_eos_token")."""
    tokenizer = qwen2("<|im_end|>", "{{ bos_token }}" + QWEN2_CHAT_TEMPLATE)
    tokenizer.add_special_tokens({"bos_token": "<|begin_of_text|>"})
    return _with_bos(tokenizer, eos)


def opt() -> Any:
    """OPT's: byte-level, with a BOS at the start of every text that is also its EOS."""
    return _with_bos(bos_is_eos())


@cache
def _sentencepiece_model() -> bytes:
    cases = json.loads((FIXTURES / "v1" / "templates.json").read_text())
    texts = [turn["value"] or "" for case in cases for turn in case["messages"]] * 3
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([line for text in texts for line in text.splitlines()]),
        model_writer=model,
        vocab_size=400,
        model_type="bpe",
        byte_fallback=True,
        character_coverage=1.0,
        hard_vocab_limit=False,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    return model.getvalue()


def from_sentencepiece(add_bos_token: bool) -> Any:
    """Llama 2's, read by transformers from a ``tokenizer.model``, with and without its BOS."""
    fields = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "legacy": False}
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "tokenizer.model").write_bytes(_sentencepiece_model())
        config = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": add_bos_token, **fields}
        Path(folder, "tokenizer_config.json").write_text(json.dumps(config))
        return AutoTokenizer.from_pretrained(folder)


def with_eos_alone() -> Any:
    """T5's kind: no BOS, and an EOS at the end of every text."""
    tokenizer = from_sentencepiece(False)
    eos = tokenizer.eos_token
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"$A {eos}", special_tokens=[(eos, tokenizer.eos_token_id)]
    )
    return tokenizer


def from_gguf(tokenizer: Any, model: str, architecture: str, add_bos_token: bool) -> Any:
    """A tokenizer written into a GGUF file's metadata, as llama.cpp's converter does, and read back by transformers.

    Args:
        tokenizer: what is written.
        model: llama.cpp's word for its kind, "gpt2" (byte-level) or "llama" (sentencepiece).
        architecture: llama.cpp's word for the language model.
        add_bos_token: whether the file says that a BOS is put in front.
    """
    vocab = tokenizer.get_vocab()
    pieces = sorted(vocab, key=vocab.__getitem__)
    special = {token.content for token in tokenizer.added_tokens_decoder.values()}
    with tempfile.TemporaryDirectory() as folder:
        writer = gguf.GGUFWriter(Path(folder, "tokenizer.gguf"), architecture)
        writer.add_tokenizer_model(model)
        writer.add_tokenizer_pre("qwen2" if model == "gpt2" else "default")
        writer.add_token_list(pieces)
        writer.add_token_scores([-float(index) for index in range(len(pieces))])
        writer.add_token_types([gguf.TokenType.CONTROL if p in special else gguf.TokenType.NORMAL for p in pieces])
        merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
        writer.add_token_merges([" ".join(merge) for merge in merges])
        writer.add_bos_token_id(tokenizer.bos_token_id)
        writer.add_eos_token_id(tokenizer.eos_token_id)
        writer.add_add_bos_token(add_bos_token)
        writer.add_block_count(1)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.close()
        read = AutoTokenizer.from_pretrained(folder, gguf_file="tokenizer.gguf")
    read.chat_template = tokenizer.chat_template
    return read


FAMILIES: dict[str, Callable[[], Any]] = {
    "byte-level, no BOS (Qwen2)": qwen2,
    "byte-level, <|im_start|> as a BOS that is not added (SmolLM2)": smollm2,
    "byte-level, one token for BOS and EOS, not added (Phi)": bos_is_eos,
    "byte-level, BOS (Llama 3)": llama3,
    "byte-level, BOS and EOS added": lambda: llama3(eos=True),
    "byte-level, BOS added that is the EOS (OPT)": opt,
    "pieces, BOS (Llama 2)": lambda: llama(legacy=False),
    "pieces, BOS, legacy": lambda: llama(legacy=True),
    "pieces, BOS, no space in front (Gemma)": gemma,
    "sentencepiece file, BOS": lambda: from_sentencepiece(True),
    "sentencepiece file, no BOS": lambda: from_sentencepiece(False),
    "sentencepiece file, EOS added (T5)": with_eos_alone,
    "GGUF, byte-level, one token for BOS and EOS": lambda: from_gguf(bos_is_eos(), "gpt2", "qwen2", False),
    "GGUF, byte-level, <|im_start|> as BOS (SmolLM2)": lambda: from_gguf(smollm2(), "gpt2", "qwen2", False),
    "GGUF, byte-level, BOS": lambda: from_gguf(llama3(), "gpt2", "llama", True),
    "GGUF, pieces, BOS": lambda: from_gguf(llama(legacy=False), "llama", "llama", True),
    "GGUF, pieces, no BOS": lambda: from_gguf(llama(legacy=False), "llama", "llama", False),
}
"""Kinds of tokenizers, by what they put around a text."""
