"""The conversation template: messages to token ids and labels (TinyLLaVA v1, ``data/template/base.py``).

The strings, the token ids and, where v1's are right, the labels are v1's. The labels are computed differently. v1
tokenises every round a second time and counts tokens. This fails, and silently drops the sample, if an answer contains
a separator or an end-of-answer string, or if the tokenizer splits a round differently. Here the prompt is tokenised
once, and a token is learned if its first character is in an answer.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from tinyllava_switchkd.constants import DEFAULT_IMAGE_TOKEN, IGNORE_INDEX, IMAGE_TOKEN_INDEX
from tinyllava_switchkd.registry import Registry

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

    from tinyllava_switchkd.data.collator import Sample

logger = logging.getLogger(__name__)

Message = Mapping[str, str | None]
"""One turn of a conversation: ``{"from": "human" | "gpt", "value": text}``; None for an answer to be generated."""


def exchange(question: str, answer: str | None = None) -> list[Message]:
    """A question and its answer, which is None if it is to be generated."""
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


def as_text(text: str) -> str:
    """What somebody has typed, with ``< image>`` for ``<image>``, which would be a placeholder."""
    return text.replace(DEFAULT_IMAGE_TOKEN, f"< {DEFAULT_IMAGE_TOKEN[1:]}")


def mark_first(question: str, num_images: int) -> str:
    """A first question after a placeholder for each image; a caller may have written placeholders, too."""
    if not num_images:
        return as_text(question)
    return f"{DEFAULT_IMAGE_TOKEN}\n" * num_images + question.replace(DEFAULT_IMAGE_TOKEN, "").strip()


# Replaces an "<image>" that is text and not a placeholder while `prompt` is built. It contains a Unicode noncharacter,
# which does not occur in text, and has the same length, so that offsets into the prompt stay valid.
_LITERAL_IMAGE_TOKEN = "<\ufdd0mage>"

_HUMAN = ("human", "user")
_ASSISTANT = ("gpt", "assistant")


def _disguise(text: str) -> str:
    return text.replace(DEFAULT_IMAGE_TOKEN, _LITERAL_IMAGE_TOKEN)


def _reveal(text: str) -> str:
    return text.replace(_LITERAL_IMAGE_TOKEN, DEFAULT_IMAGE_TOKEN)


# eq=False keeps the identity hash, because since Python 3.11 a dataclass refuses unhashable defaults. Templates in v1's
# style have formatters as defaults (``format_user: "Formatter" = StringFormatter(...)``).
@dataclass(eq=False)
class Formatter(ABC):
    """Turns a slot into a text (or, for a separator, into a pair of texts)."""

    slot: Any = ""

    @abstractmethod
    def apply(self, **kwargs: str | None) -> Any:
        """The slot with its fields filled in."""


@dataclass(eq=False)
class EmptyFormatter(Formatter):
    """A slot without fields, which is returned unchanged."""

    def apply(self, **kwargs: str | None) -> Any:
        return self.slot


@dataclass(eq=False)
class StringFormatter(Formatter):
    """A text with one ``{{content}}`` field.

    ``apply(content=None)`` is the text before an answer to be generated. As in v1, the slot is cut after its first
    colon (``"ASSISTANT: {{content}}</s>"`` -> ``"ASSISTANT:"``). Without a colon before the field it is cut at the
    field and stripped of spaces.
    """

    def apply(self, **kwargs: str | None) -> str:
        """Fill the fields.

        Raises:
            TypeError: a value is neither a string nor None.
        """
        text = self.slot
        for name, value in kwargs.items():
            field = "{{" + name + "}}"
            if value is None:
                before = self.slot.partition(field)[0]
                return before.partition(":")[0] + ":" if ":" in before else before.rstrip(" ")
            if not isinstance(value, str):
                raise TypeError(f"A turn of a conversation must be a text, not {value!r}.")
            text = text.replace(field, value, 1)
        return text


@dataclass
class Template:
    """A conversation format.

    A subclass only needs the five formatters; ``@register_template("name")`` registers it.

    Attributes:
        format_image_token: a question with an image (``"<image>\\n{{content}}"``).
        format_user: a human turn.
        format_assistant: an answer with the text that ends it.
        system: the text before the first turn.
        separator: slot with two texts: between question and answer, and at the end of an answer.
    """

    format_image_token: Formatter
    format_user: Formatter
    format_assistant: Formatter
    system: Formatter
    separator: Formatter

    make_labels: ClassVar[Callable[..., torch.Tensor] | None] = None
    """Optional function of a subclass that makes labels [T] from token ids [T], the prompt and the tokenizer (as in
    v1)."""
    _warned_about: ClassVar[set[type]] = set()

    @property
    def eos(self) -> str:
        """The text that ends an answer; '' if there is none."""
        return self.separator.apply()[1]

    def for_tokenizer(self, tokenizer: PreTrainedTokenizerBase) -> Template:
        """The template for a tokenizer: itself, unless it is made from the tokenizer's chat template."""
        return self

    def encode(
        self,
        messages: Sequence[Message],
        tokenizer: PreTrainedTokenizerBase,
        mode: str = "train",
        num_images: int | None = None,
    ) -> Sample:
        """Encode a conversation.

        Each image is one IMAGE_TOKEN_INDEX, at the start of the question that contains its ``<image>``. An ``<image>``
        in an answer, or in a conversation without images, is text.

        Args:
            messages: alternating turns ``{"from": "human" | "gpt", "value": text}``; a first message that is not human
                is dropped, as in v1. For ``mode="eval"`` the last answer may be None.
            tokenizer: a tokenizer of transformers; for ``mode="train"`` it must report offsets.
            mode: "train" or "eval".
            num_images: number of images, which must equal the number of ``<image>``; None does not check this.

        Returns:
            ``{"input_ids": [T], "labels": [T]}`` for "train", with IGNORE_INDEX outside the answers and their ends;
            ``{"input_ids": [T], "prompt": text}`` for "eval".

        Raises:
            ValueError: turns are out of order, an answer is missing, or the number of ``<image>`` is wrong.
        """
        if mode not in ("train", "eval"):
            raise ValueError(f"The mode of a template must be 'train' or 'eval', not {mode!r}.")
        return self.for_tokenizer(tokenizer)._encode(messages, tokenizer, mode, num_images)

    def _encode(
        self, messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase, mode: str, num_images: int | None
    ) -> Sample:
        prompt, questions, answers = self._compose(messages, mode, num_images)
        import torch  # here, because checking a data file does not need it

        if mode == "eval":
            input_ids = torch.as_tensor(self.tokenizer_image_token(prompt, tokenizer, return_tensors="pt"))
            return {"input_ids": input_ids, "prompt": _reveal(prompt)}
        if self.make_labels is not None:
            input_ids = torch.as_tensor(self.tokenizer_image_token(prompt, tokenizer, return_tensors="pt"))
            return {"input_ids": input_ids, "labels": self.make_labels(input_ids, _reveal(prompt), tokenizer)}
        self._warn_about_masks()
        spans = self._answer_spans(prompt, questions, answers)
        ids, labels = _tokenize(prompt, tokenizer, spans)
        return {"input_ids": torch.tensor(ids), "labels": torch.tensor(labels)}

    def check(self, messages: Sequence[Message], num_images: int) -> None:
        """Raise the errors that `encode` would raise for a training sample; needs no tokenizer."""
        self._compose(messages, "train", num_images)

    def _compose(
        self, messages: Sequence[Message], mode: str, num_images: int | None
    ) -> tuple[str, list[str], list[str | None]]:
        """Prompt, questions and answers; an ``<image>`` in them is a placeholder, because others are disguised."""
        questions, answers = self.get_list_from_message(messages)
        if mode == "train" and any(answer is None for answer in answers):
            raise ValueError("An answer is missing; without it there is nothing to learn.")
        questions = self._mark_images(questions, num_images)
        answers = [answer and _disguise(answer) for answer in answers]
        prompt = self.prompt(questions, answers)
        if num_images == 0:
            prompt = prompt.replace(DEFAULT_IMAGE_TOKEN, "")  # `pretrain` adds a placeholder to every sample
        places = prompt.count(DEFAULT_IMAGE_TOKEN)
        if num_images is not None and places != num_images:
            raise ValueError(
                f"The sample has {num_images} image(s), but its questions have {places} {DEFAULT_IMAGE_TOKEN}; write "
                f"one {DEFAULT_IMAGE_TOKEN} per image."
            )
        return prompt, questions, answers

    def get_list_from_message(self, messages: Sequence[Message]) -> tuple[list[str], list[str | None]]:
        """Split a conversation into equally many questions and answers.

        Raises:
            ValueError: the turns do not alternate, or one is not a text.
        """
        turns = list(messages)
        for turn in turns:
            if not isinstance(turn, dict) or not {"from", "value"} <= turn.keys():
                raise ValueError(f"A turn must be an object with 'from' and 'value', not {turn!r}.")
        if turns and turns[0]["from"] not in _HUMAN:
            turns = turns[1:]
        questions: list[str] = []
        answers: list[str | None] = []
        for index, turn in enumerate(turns):
            expected = _ASSISTANT if index % 2 else _HUMAN
            if turn["from"] not in expected:
                raise ValueError(f"Turn {index + 1} is from {turn['from']!r}, but should be from {expected[0]!r}.")
            text = turn["value"]
            if text is None and index % 2 and index == len(turns) - 1:
                answers.append(None)
                continue
            if not isinstance(text, str):
                raise ValueError(f"Turn {index + 1} ({turn['from']}) is {text!r}, not a text.")
            if not _is_unicode(text):
                raise ValueError(
                    f"Turn {index + 1} ({turn['from']}) contains half a character (a lone surrogate such as \\ud83d), "
                    f"which no tokenizer can read: {text[:60]!a}."
                )
            if index % 2:
                answers.append(text)
            else:
                questions.append(text)
        if not turns or len(turns) % 2:
            raise ValueError(f"The conversation has {len(turns)} turns; questions and answers must alternate.")
        return questions, answers

    def prompt(self, question_list: str | Sequence[str], answer_list: str | Sequence[str | None] | None) -> str:
        """The conversation as one text; it ends in a generation prompt if the last answer is None."""
        questions = [question_list] if isinstance(question_list, str) else list(question_list)
        answers = [answer_list] if answer_list is None or isinstance(answer_list, str) else list(answer_list)
        return self._prompt(questions, answers)

    def _prompt(self, question_list: list[str], answer_list: list[str | None]) -> str:
        text = self.system.apply() if question_list else ""
        for question, answer in zip(question_list, answer_list, strict=True):
            images = question.count(DEFAULT_IMAGE_TOKEN)
            if images:
                question = question.replace(DEFAULT_IMAGE_TOKEN, "").strip()
                for _ in range(images):
                    question = self.format_image_token.apply(content=question).strip()
            text += self.format_user.apply(content=question) + self.format_assistant.apply(content=answer)
        return text

    @classmethod
    def tokenizer_image_token(
        cls,
        prompt: str,
        tokenizer: PreTrainedTokenizerBase,
        image_token_index: int = IMAGE_TOKEN_INDEX,
        return_tensors: str | None = None,
    ) -> list[int] | torch.Tensor:
        """Token ids of a text, with `image_token_index` for every ``<image>`` and at most one BOS token."""
        if return_tensors not in (None, "pt"):
            raise ValueError(f"return_tensors must be None or 'pt', not {return_tensors!r}.")
        input_ids, _ = _tokenize(prompt, tokenizer, None, image_token_index)
        if return_tensors is None:
            return input_ids
        import torch

        return torch.tensor(input_ids, dtype=torch.long)

    def _mark_images(self, questions: list[str], num_images: int | None) -> list[str]:
        """Keep one ``<image>`` in the questions per image, and disguise those that are text."""
        if num_images == 0:
            return [_disguise(question) for question in questions]
        holders = [index for index, question in enumerate(questions) if DEFAULT_IMAGE_TOKEN in question]
        if num_images == 1 and len(holders) == 1:
            # As in v1, a question that repeats <image> for its only image gets one placeholder.
            question = questions[holders[0]].replace(DEFAULT_IMAGE_TOKEN, "").strip()
            questions = list(questions)
            questions[holders[0]] = f"{DEFAULT_IMAGE_TOKEN}\n{question}"
        return questions

    def _answer_spans(self, prompt: str, questions: list[str], answers: list[str | None]) -> list[tuple[int, int]]:
        """Spans of the prompt that are learned: the answers and their ends.

        The end of a round is the length of the prompt up to it, which also works if a subclass overrides `_prompt`.
        """
        opening = self.format_assistant.apply(content=None)
        spans = []
        for count, answer in enumerate(answers, start=1):
            head = prompt if count == len(answers) else self.prompt(questions[:count], answers[:count])
            end = len(head if DEFAULT_IMAGE_TOKEN in prompt else head.replace(DEFAULT_IMAGE_TOKEN, ""))
            text = self.format_assistant.apply(content=answer)
            start = end - len(text) + (len(opening) if text.startswith(opening) else 0)
            tail = len(text) - text.rfind(self.eos) - len(self.eos) if self.eos and self.eos in text else 0
            spans.append((start, end - tail))
        return spans

    def _warn_about_masks(self) -> None:
        cls = type(self)
        if hasattr(cls, "_make_masks") and cls not in self._warned_about:
            self._warned_about.add(cls)
            logger.warning(
                "%s._make_masks is not called: labels are computed from the positions of the answers. Override "
                "make_labels to compute your own.",
                cls.__name__,
            )


TemplateFactory: Registry[Callable[[], Template]] = Registry("conversation template")
"""``TemplateFactory("phi")`` is a `Template` class, ``TemplateFactory("phi")()`` the template."""

register_template = TemplateFactory.register
"""``@register_template("name", override=False)`` on a `Template` class."""


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def is_special(tokenizer: PreTrainedTokenizerBase, token: int) -> bool:
    """Whether an id is a special token, even if it has no role such as bos or eos."""
    added = tokenizer.added_tokens_decoder.get(token)
    return token in tokenizer.all_special_ids or (added is not None and added.special)


def _tokenize(
    prompt: str,
    tokenizer: PreTrainedTokenizerBase,
    spans: list[tuple[int, int]] | None,
    image_token_index: int = IMAGE_TOKEN_INDEX,
) -> tuple[list[int], list[int]]:
    """Tokenise the pieces between ``<image>``s and label the tokens that start inside `spans`.

    As in v1, every piece is tokenised by itself. Tokens that the tokenizer adds at the start of a text (BOS) appear
    once at the very start. Tokens that it adds at the end (EOS) are left out, because they would end the conversation
    in the middle.

    Returns:
        ids and labels of equal length; no labels if `spans` is None.
    """
    input_ids = begin_tokens(tokenizer)
    labels = [] if spans is None else [IGNORE_INDEX] * len(input_ids)
    position = 0  # of the piece in the prompt
    for index, piece in enumerate(prompt.split(DEFAULT_IMAGE_TOKEN)):
        if index:
            input_ids.append(image_token_index)
        text = _reveal(piece)
        if spans is None:
            input_ids.extend(tokenizer(text, add_special_tokens=False, verbose=False).input_ids)
            continue
        if index:
            labels.append(IGNORE_INDEX)
        encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        input_ids.extend(encoded.input_ids)
        labels.extend(_labels_of(encoded.input_ids, [start for start, _ in encoded.offset_mapping], position, spans))
        position += len(piece) + len(DEFAULT_IMAGE_TOKEN)
    return input_ids, labels


def begin_tokens(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The ids that a tokenizer adds at the start of every text: its BOS token, or nothing.

    A tokenizer with a `bos_token` may not add it: SmolLM2's is ``<|im_start|>``, which only its chat template writes.
    """
    plain = tokenizer("a", add_special_tokens=False).input_ids
    whole = tokenizer("a").input_ids
    for start in range(len(whole) - len(plain) + 1):
        if whole[start : start + len(plain)] == plain:
            return whole[:start]
    return []


def _labels_of(ids: list[int], starts: list[int], position: int, spans: list[tuple[int, int]]) -> list[int]:
    """Labels of a piece's tokens, in one pass because tokens and spans are sorted."""
    labels = []
    remaining = iter(spans)
    span = next(remaining, None)
    for token, start in zip(ids, starts, strict=True):
        start += position
        while span is not None and start >= span[1]:
            span = next(remaining, None)
        labels.append(token if span is not None and start >= span[0] else IGNORE_INDEX)
    return labels


def check_template(
    tokenizer: PreTrainedTokenizerBase, template: str, eos_token_ids: int | Collection[int] | None = None
) -> None:
    """Refuse a template whose end of an answer would not stop generation.

    With a wrong pair (such as `qwen2_instruct` and a base tokenizer) v1 masks every label and trains on nothing.

    Args:
        eos_token_ids: the ids that end generation; the tokenizer's own eos if None.

    Raises:
        ValueError: the template's end of an answer is not a single special token of the tokenizer, or does not end
            generation; or the tokenizer cannot report offsets.
    """
    if eos_token_ids is None:
        eos_token_ids = tokenizer.eos_token_id
    stops = {eos_token_ids} if isinstance(eos_token_ids, int) else set(eos_token_ids or ())
    name = getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError(
            f"The tokenizer {name} is not a fast one, so it cannot report the offsets of its tokens, which labels are "
            f"computed from."
        )
    problem = _misfit(tokenizer, TemplateFactory(template)(), stops)
    if problem is None:
        return
    fitting = [other for other in TemplateFactory.list() if _misfit(tokenizer, TemplateFactory(other)(), stops) is None]
    raise ValueError(
        f"The conversation template {template!r} does not fit the tokenizer {name}: {problem}. "
        f"Templates that do: {', '.join(fitting) or 'none'}."
    )


def _misfit(tokenizer: PreTrainedTokenizerBase, template: Template, stops: set[int]) -> str | None:
    """Why the template does not fit, as a clause; None if it does."""
    try:
        template = template.for_tokenizer(tokenizer)
    except ValueError:
        return "the tokenizer has no chat template that writes one turn after the other"
    eos = template.eos
    if not eos:
        return None
    plain = tokenizer("a", add_special_tokens=False).input_ids
    ids = tokenizer("a" + eos, add_special_tokens=False).input_ids[len(plain) :]
    if ids != [tokenizer.convert_tokens_to_ids(eos)]:
        return f"its end of an answer, {eos!r}, is not a single token there"
    if not is_special(tokenizer, ids[0]) and ids[0] not in stops:
        return f"its end of an answer, {eos!r}, is not a special token there"
    if ids[0] not in stops:
        known = ", ".join(repr(tokenizer.convert_ids_to_tokens(stop)) for stop in sorted(stops)) or "nothing"
        return f"it ends an answer with {eos!r}, but generation stops at {known}"
    return None
