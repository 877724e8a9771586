"""TinyLLaVA v1's computation of labels, from its specification: tokenise every round again and count.

An oracle for what is right in it, and a witness of where it is not.
"""

from __future__ import annotations

from typing import Any

from tinyllava_switchkd.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX


def _length(text: str, tokenizer: Any) -> int:
    """Number of tokens of a text; every ``<image>`` counts as one, and a BOS counts once."""
    pieces = [tokenizer(piece).input_ids for piece in text.split("<image>")]
    has_bos = bool(pieces[0]) and pieces[0][0] == tokenizer.bos_token_id
    return sum(len(piece) - has_bos for piece in pieces) + has_bos + len(pieces) - 1


def v1_labels(input_ids: list[int], prompt: str, tokenizer: Any, eos: str, style: str) -> list[int] | None:
    """Labels by v1's counting; None if its count is wrong (v1 then ignores the sample).

    Args:
        style: "plain" (phi, qwen2_*), "llama" or "gemma": what a round is corrected by.
    """
    sep = " ASSISTANT: "
    labels = list(input_ids)
    has_bos = style in ("llama", "gemma")
    cur = 1 if has_bos else 0
    labels[:cur] = [IGNORE_INDEX] * cur
    eos_length = 1 if has_bos else len(tokenizer.encode(eos))
    for index, text in enumerate(prompt.split(eos)):
        parts = text.split(sep)
        if not text or len(parts) != 2:
            break
        length = _length(text, tokenizer) + eos_length - has_bos
        instruction = _length(parts[0] + sep, tokenizer) - 1 - has_bos
        if style == "llama" and index and not tokenizer.legacy:
            length, instruction = length - 1, instruction - 1
        labels[cur : cur + instruction] = [IGNORE_INDEX] * instruction
        cur += length
    labels[cur:] = [IGNORE_INDEX] * len(labels[cur:])
    total = sum(token != tokenizer.pad_token_id for token in input_ids)
    if tokenizer.pad_token_id == tokenizer.eos_token_id:
        total += prompt.count(eos)
    assert IMAGE_TOKEN_INDEX not in labels
    return labels if cur == total else None
