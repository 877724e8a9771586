"""VQA accuracy: the three normalisations in use, and the leave-one-out score.

The same answer gets three different scores, depending on what is normalised (sources: GT-Vision-Lab/VQA a013f00,
VizWiz API, LLaVA c121f04 `m4c_evaluator.py`):

- *official VQAv2* normalises prediction and annotators, but only if the annotators disagree; on a unanimous question
  the raw texts are compared ("Yes" against ten "yes" is wrong);
- *official VizWiz* normalises only the prediction, not the annotators ("2" against ten "two" is wrong);
- *m4c* (TextVQA, and LLaVA's converter for uploads) normalises both sides, and separates possessives.

LLaVA applies m4c to everything that it uploads, so a paper's number is the official score *on the submission form*.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache

from tinyllava_switchkd.eval.benchmarks.base import Answer, percentage, percentage_by, said
from tinyllava_switchkd.eval.benchmarks.files import require
from tinyllava_switchkd.io import JsonObject

ANNOTATORS = 10

_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_NUMBER_WITH_COMMA = re.compile(r"\d,\d")
# The official pattern should keep a period between digits, but its look-behind has a typo. This is what it matches.
_PERIOD = re.compile(r"\.(?!\d)")
_PERIODS_AT_MOST = 32  # the official call passes re.UNICODE (= 32) as `count`
_ARTICLES = frozenset({"a", "an", "the"})
_NUMBERS = {"none": "0", "zero": "0"} | {
    word: str(value)
    for value, word in enumerate(
        ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"), start=1
    )
}

# Each word is the result for every spelling that lacks exactly one of its apostrophes.
_CONTRACTED = """
    'twas I'm I've ain't aren't can't could've couldn't didn't doesn't don't hadn't hasn't haven't he'd he's how'd
    how'll how's isn't it'd it'll ma'am might've mightn't must've mustn't needn't not've o'clock oughtn't shan't
    should've shouldn't somebody'll somebody's someone'd someone'll someone's something'd something'll that's there'd
    there're there's they'd they'll they're they've wasn't we've weren't what'll what're what's what've when's where'd
    where's where've who'd who'll who's who've why'll why're why's won't would've wouldn't y'all you'd you'll you're
    you've I'd've couldn't've hadn't've he'd've it'd've mightn't've she'd've shouldn't've somebody'd've someone'd've
    something'd've there'd've they'd've we'd've who'd've wouldn't've y'all'll you'd've 'ow's'at y'all'd've
""".split()  # noqa: SIM905
# Errors of the official table, kept because the servers have them, too.
_CONTRACTION_SLIPS = {"let's": "let's", "she's": "she's", "somebody'd": "somebodyd"}

CONTRACTIONS: Mapping[str, str] = {
    word[:place] + word[place + 1 :]: word for word in _CONTRACTED for place, letter in enumerate(word) if letter == "'"
} | _CONTRACTION_SLIPS
"""Contractions of the official VQA evaluation (120 entries)."""

# In the VizWiz API's copy of the table nearly all apostrophes are typographic, as from a word processor.
_VIZWIZ_ASCII_WORDS = {"ain't", "aren't", "can't", "could've", "couldn't", "we've", "where's", "who've"}
_VIZWIZ_ASCII_SPELLINGS = {"couldn'tve", "hadn'tve"}
VIZWIZ_CONTRACTIONS: Mapping[str, str] = {
    spelling if spelling in _VIZWIZ_ASCII_SPELLINGS else spelling.replace("'", "’"): (
        word if word in _VIZWIZ_ASCII_WORDS else word.replace("'", "’")
    )
    for spelling, word in CONTRACTIONS.items()
}
"""Contractions of the VizWiz evaluation; most never match a model's text."""


def flatten(text: str) -> str:
    """The text as one stripped line: the first step of every VQA evaluation."""
    return text.replace("\n", " ").replace("\t", " ").strip()


def _normalise(text: str, contractions: Mapping[str, str]) -> str:
    number_with_comma = _NUMBER_WITH_COMMA.search(text) is not None
    result = text
    for mark in _PUNCTUATION:
        if mark in text:
            loose = number_with_comma or f"{mark} " in text or f" {mark}" in text
            result = result.replace(mark, "" if loose else " ")
    result = _PERIOD.sub("", result, count=_PERIODS_AT_MOST)
    words = (_NUMBERS.get(word, word) for word in result.lower().split())
    return " ".join(contractions.get(word, word) for word in words if word not in _ARTICLES)


@lru_cache(maxsize=1 << 18)
def normalise(text: str) -> str:
    """The official VQA normalisation: punctuation, number words, articles, contractions."""
    return _normalise(flatten(text), CONTRACTIONS)


@lru_cache(maxsize=1 << 16)
def normalise_vizwiz(text: str) -> str:
    """`normalise` with the VizWiz API's own table of contractions."""
    return _normalise(flatten(text), VIZWIZ_CONTRACTIONS)


@lru_cache(maxsize=1 << 18)
def submission_form(text: str) -> str:
    """m4c's answer processor, which LLaVA also applies to everything that it uploads.

    It differs from `normalise` in its first step, which removes commas and question marks and separates a possessive
    ("lay's" -> "lay 's").
    """
    tokens = text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    return _normalise(flatten(tokens), CONTRACTIONS)


def leave_one_out(prediction: str, annotators: Sequence[str]) -> float:
    """VQA accuracy of one answer: the mean of min(1, matches among the others / 3), leaving out each annotator once."""
    matches = annotators.count(prediction)
    others = len(annotators) - matches
    return (matches * min(1.0, (matches - 1) / 3) + others * min(1.0, matches / 3)) / len(annotators)


def vqav2_accuracy(prediction: str, annotators: Sequence[str]) -> float:
    """Official VQAv2 accuracy (0-1) of one answer; see the module's docstring about unanimous questions."""
    truths = [flatten(answer) for answer in annotators]
    answer = flatten(prediction)
    if len(set(truths)) > 1:
        truths = [normalise(truth) for truth in truths]
        answer = normalise(answer)
    return leave_one_out(answer, truths)


def vizwiz_accuracy(prediction: str, annotators: Sequence[str]) -> float:
    """Official VizWiz accuracy (0-1) of one answer: annotators raw, typographic contractions."""
    return leave_one_out(normalise_vizwiz(prediction), annotators)


def vizwiz_accuracy_ascii(prediction: str, annotators: Sequence[str]) -> float:
    """`vizwiz_accuracy` with the intended contractions, with ASCII apostrophes."""
    return leave_one_out(normalise(prediction), annotators)


def m4c_accuracy(prediction: str, annotators: Sequence[str]) -> float:
    """m4c accuracy (0-1) of one answer: both sides normalised."""
    return leave_one_out(submission_form(prediction), [submission_form(answer) for answer in annotators])


def annotator_answers(row: JsonObject, where: str) -> list[str]:
    """The ten answers of an annotation, given as strings (TextVQA) or as objects (VQAv2, VizWiz).

    Raises:
        ValueError: there are not ten strings.
    """
    require(row, ("answers",), where)
    answers = row["answers"]
    if isinstance(answers, list):
        answers = [answer.get("answer") if isinstance(answer, Mapping) else answer for answer in answers]
    if not isinstance(answers, list) or len(answers) != ANNOTATORS or not all(isinstance(a, str) for a in answers):
        raise ValueError(f"{where}: VQA accuracy needs the answers of {ANNOTATORS} annotators, not {row['answers']!r}.")
    return answers


def score_row(
    question_id: object,
    answer: Answer | None,
    annotators: Sequence[str],
    scorers: Mapping[str, Callable[[str, Sequence[str]], float]],
) -> JsonObject:
    """The result row of one question under several scorers; without an answer all scores are 0.

    Args:
        question_id: as in the question file.
        answer: the model's answer, or None.
        annotators: ten strings.
        scorers: name -> function of prediction and annotators, the headline's first. A scorer with "on_submission" in
            its name gets the submission form instead of the raw text.
    """
    row: JsonObject = {"question_id": question_id, **said(answer)}
    row["truth"] = max(annotators, key=annotators.count)
    for name, scorer in scorers.items():
        if answer is None:
            row[name] = 0.0
        else:
            text = submission_form(answer.text) if "on_submission" in name else answer.text
            row[name] = scorer(text, annotators)
    row["value"] = row[next(iter(scorers))]
    return row


def summarise(rows: Sequence[JsonObject], scorers: Iterable[str], columns: Iterable[str] = ()) -> JsonObject:
    """Scores of each scorer: overall, and grouped by columns. A grouping of the headline has the column's plain name.

    Args:
        rows: from `score_row`.
        scorers: their names, the headline first.
        columns: columns to group the rows by.
    """
    headline, *others = scorers
    details: JsonObject = {name: percentage([row[name] for row in rows]) for name in (headline, *others)}
    for column in columns:
        details[column] = percentage_by((row[column], row[headline]) for row in rows)
        for name in others:
            details[f"{column}_{name}"] = percentage_by((row[column], row[name]) for row in rows)
    return details
