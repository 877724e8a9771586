"""Decodes token ids one by one into the pieces of text that they add."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from tinyllava_switchkd.data.template.base import is_special

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_INCOMPLETE = "\ufffd"  # what a decoder writes for the first bytes of an incomplete character
_LONGEST = 8  # most tokens of a character; more are invalid bytes and are shown as such


class TextPieces:
    """Incremental decoder: returns the text that each token adds, '' while a character is incomplete.

    A token's text may depend on its left neighbours (SentencePiece drops the first space). So each step decodes again
    from the previous piece on; its cost does not grow with the sequence.

    Args:
        tokenizer: a transformers tokenizer; special tokens add no text.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._context = 0  # decoding starts at this token
        self._read = 0  # the text of all tokens before this one has been returned

    def push(self, token: int) -> str:
        """The text that `token` completes."""
        self._ids.append(int(token))
        return self._step(force=False)

    def flush(self) -> str:
        """The remaining text at the end: an incomplete character, if generation stopped in the middle of one."""
        return self._step(force=True)

    def _step(self, force: bool) -> str:
        before = self._decode(self._ids[self._context : self._read])
        now = self._decode(self._ids[self._context :])
        is_waiting = now.endswith(_INCOMPLETE) and len(self._ids) - self._read < _LONGEST
        if is_waiting and not force:
            return ""
        if len(now) <= len(before):
            return ""
        self._context, self._read = self._read, len(self._ids)
        return now[len(before) :]

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def text_groups(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> list[tuple[str, list[int]]]:
    """Split a sequence into the shortest groups of tokens that decode to complete characters.

    Returns:
        (text, indices of its tokens) in order, without special tokens; joined, the texts are the whole text.
    """
    pieces, groups, waiting = TextPieces(tokenizer), [], []
    for index, token in enumerate(ids):
        text = pieces.push(token)
        if not is_special(tokenizer, int(token)):
            waiting.append(index)
        if text and waiting:
            groups.append((text, waiting))
            waiting = []
    rest = pieces.flush()
    if rest and waiting:
        groups.append((rest, waiting))
    return groups
