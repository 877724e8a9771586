"""Finds the choice that a free text names: VLMEvalKit's exact matching, and a more careful reading."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping

REFUSED = "Z"
"""VLMEvalKit's letter for "none of them"."""

_MARKS = str.maketrans(dict.fromkeys(".()[],:;!*#{}", " "))
_REFUSALS = (
    "Sorry, I can't help with images of people yet.",
    "I can't process this file.",
    "I'm sorry, but without the image provided",
    "Cannot determine the answer",
)
_SENTENCE = re.compile(r"(?:correct\s+)?answer\s+is\s+\**([ABCD])\**", re.IGNORECASE)
_LAST_WORDS = 4


def match_exactly(text: str, options: Mapping[str, str]) -> str | None:
    """VLMEvalKit's `can_infer` (e8e78f0, matching_util.py), as used without a judge model.

    In this order: the only letter among the words, if it is one of the last four words; "answer is X" in any case and
    with anything after X; the one option whose text is part of the answer, if the answer is at most twice as long as
    all options together.

    Args:
        text: the answer.
        options: option texts by letter.

    Returns:
        A letter, `REFUSED`, or None if nothing or more than one thing matches.
    """
    return _match_letter(text, options) or _match_text(text, options)


def _match_letter(text: str, options: Mapping[str, str]) -> str | None:
    if "Failed to obtain answer via API" in text:
        return None
    if any(refusal in text for refusal in _REFUSALS):
        return REFUSED
    words = text.translate(_MARKS).split()
    found = [letter for letter in options if letter in words]
    if len(found) == 1:
        if words.index(found[0]) >= len(words) - _LAST_WORDS:
            return found[0]
    elif not found and REFUSED in words:
        return REFUSED
    sentence = _SENTENCE.search(text)
    if sentence and sentence[1].upper() in options:
        return sentence[1].upper()
    return None


def _match_text(text: str, options: Mapping[str, str]) -> str | None:
    text = text.lower()
    if len(text) > 2 * sum(len(option) for option in options.values()):
        return None
    found = [letter for letter, option in options.items() if option.lower() in text]
    return found[0] if len(found) == 1 else None


# A capital that is not part of a word; Chinese characters may be adjacent ("选项D").
_LETTER = re.compile(r"(?<![A-Za-z0-9'’])[A-H](?![A-Za-z0-9'’])")
_SMALL_LETTER = re.compile(
    r"(?:\b(?:answer|option|choice|letter)(?:\s+is)?\s*:?\s*(?:option\s+)?\(?|^\(?)([a-h])(?:[).:,]|$)",
    re.MULTILINE | re.IGNORECASE,
)
# The text before a choice that is ruled out: "Not B", "It is not A", "isn't (C)", "cannot be D", "不是B".
_DENIED = re.compile(
    r"(?:\bnot|n['’]t|\bcannot)(?:\s+(?:be|option|choice|answer|letter|the))*[\s(\"'*]*$|不是\W*$", re.IGNORECASE
)
_BEFORE_LETTER = re.compile(r"(?:option|answer|choice|letter|is|:)\W*$", re.IGNORECASE)
_AFTER_LETTER = re.compile(r"\s+(?:is|was|are|because|since|as|for|and|or|seems|would)\b")
_EDGES = " \t\r\n.,:;!?*_`\"'()[]{}。、"


def read_choice(text: str, options: Mapping[str, str]) -> str | None:
    """The letter that a person would read, or None if a person could not tell.

    Full-width forms are read as plain ones, a single lower-case letter counts as a letter, "A" before a noun is an
    article, and a letter is found anywhere. An option's whole text takes precedence over a letter in it. A denied
    letter ("Not B") is not an answer, but another letter beside it may be.

    Args:
        text: the answer.
        options: option texts by letter, including an option "None" if there is one.
    """
    text = unicodedata.normalize("NFKC", text).strip()
    bare = text.strip(_EDGES)
    plain = {letter: _plain(option) for letter, option in options.items()}
    whole = [letter for letter, option in plain.items() if option == bare.lower()]
    if bare.upper() in options and not whole:
        return bare.upper()
    if len(whole) == 1:
        return whole[0]
    if any(refusal in text for refusal in _REFUSALS):
        return None
    found = [match for match in _LETTER.finditer(text) if match[0] in options and not _is_article(match, text)]
    letters = {match[0] for match in found if not _DENIED.search(text[: match.start()])}
    if letters:
        return letters.pop() if len(letters) == 1 else None
    if found:
        return None
    small = {letter.upper() for letter in _SMALL_LETTER.findall(text)} & set(options)
    if len(small) == 1:
        return small.pop()
    lowered = text.lower()
    named = {letter: option for letter, option in plain.items() if option and _has_words(lowered, option)} or {
        letter: option for letter, option in plain.items() if option and option in lowered
    }
    # "no parking" also contains "no"; the longer option is meant.
    longest = [a for a in named if not any(named[a] in named[b] and named[a] != named[b] for b in named)]
    return longest[0] if len(longest) == 1 else None


def _plain(option: str) -> str:
    return unicodedata.normalize("NFKC", option).strip(_EDGES).lower()


def _has_words(text: str, words: str) -> bool:
    """Whether the words are in the text and not parts of longer (English) words."""
    return re.search(rf"(?<![a-z0-9]){re.escape(words)}(?![a-z0-9])", text) is not None


def _is_article(match: re.Match[str], text: str) -> bool:
    """Whether a capital A is the word "a": a lower-case word follows, and nothing around it announces a letter."""
    if match[0] != "A" or _BEFORE_LETTER.search(text[: match.start()]):
        return False
    rest = text[match.end() :]
    return re.match(r" +[a-z]", rest) is not None and _AFTER_LETTER.match(rest) is None
