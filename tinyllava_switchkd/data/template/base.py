"""The conversation template: messages to token ids and labels (TinyLLaVA v1, ``data/template/base.py``).

The strings, the token ids and, wherever v1's are right, the labels are v1's. How the labels come about is not: v1
tokenises every round a second time and counts, which fails (and then silently drops the sample) on answers that
contain a separator or an end-of-answer string, and on tokenizers that count otherwise. Here the prompt is tokenised
once, and a token is learned if the character it starts at lies in an answer.
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
"""One turn of a conversation: ``{"from": "human" | "gpt", "value": text}``, None for an answer to be generated."""


def exchange(question: str, answer: str | None = None) -> list[Message]:
    """A question and its answer; None for one that is to be generated."""
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


# A literal "<image>" that is text and not an image's place is carried through `prompt` in this disguise. It holds a
# Unicode noncharacter, which no text contains, and has the same length, so that offsets into the prompt stay true.
_LITERAL_IMAGE_TOKEN = "<\ufdd0mage>"

_HUMAN = ("human", "user")
_ASSISTANT = ("gpt", "assistant")


def _disguise(text: str) -> str:
    return text.replace(DEFAULT_IMAGE_TOKEN, _LITERAL_IMAGE_TOKEN)


def _reveal(text: str) -> str:
    return text.replace(_LITERAL_IMAGE_TOKEN, DEFAULT_IMAGE_TOKEN)


# eq=False keeps the identity hash, which is what lets a template of v1's style give a formatter as a plain dataclass
# default (``format_user: "Formatter" = StringFormatter(...)``): since Python 3.11 a dataclass refuses unhashable ones.
@dataclass(eq=False)
class Formatter(ABC):
    """A slot that is turned into text (or, for a separator, into a pair of texts)."""

    slot: Any = ""

    @abstractmethod
    def apply(self, **kwargs: str | None) -> Any:
        """The slot with its fields filled in."""


@dataclass(eq=False)
class EmptyFormatter(Formatter):
    """A slot without fields: whatever it is given, it returns the slot."""

    def apply(self, **kwargs: str | None) -> Any:
        return self.slot


@dataclass(eq=False)
class StringFormatter(Formatter):
    """A text with one ``{{content}}`` field.

    ``apply(content=None)`` is the text that precedes an answer yet to be generated: v1 cuts the slot at its first
    colon (``"ASSISTANT: {{content}}</s>"`` -> ``"ASSISTANT:"``). A slot without a colon before the field is cut at
    the field, spaces stripped.
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
                raise TypeError(f"A turn of a conversation is a text, not {value!r}.")
            text = text.replace(field, value, 1)
        return text


@dataclass
class Template:
    """A conversation format.

    Subclasses give the five formatters and nothing else; ``@register_template("name")`` makes one known.

    Attributes:
        format_image_token: a question that comes with an image (``"<image>\\n{{content}}"``).
        format_user: a human turn.
        format_assistant: an answer, with the text that ends it.
        system: what precedes the first turn.
        separator: slot of two texts, what stands between question and answer, and what ends an answer.
    """

    format_image_token: Formatter
    format_user: Formatter
    format_assistant: Formatter
    system: Formatter
    separator: Formatter

    make_labels: ClassVar[Callable[..., torch.Tensor] | None] = None
    """A third party's own labels [T], made from token ids [T], the prompt and the tokenizer (v1's interface)."""
    _warned_about: ClassVar[set[type]] = set()

    @property
    def eos(self) -> str:
        """The text that ends an answer, '' if the template has none."""
        return self.separator.apply()[1]

    def for_tokenizer(self, tokenizer: PreTrainedTokenizerBase) -> Template:
        """The template as a tokenizer wants it written: itself, unless it is made from the tokenizer's own."""
        return self

    def encode(
        self,
        messages: Sequence[Message],
        tokenizer: PreTrainedTokenizerBase,
        mode: str = "train",
        num_images: int | None = None,
    ) -> Sample:
        """Turn a conversation into token ids.

        Every image's place is one IMAGE_TOKEN_INDEX, at the front of the question its ``<image>`` stands in. A
        ``<image>`` in an answer is text, and so is every one of a conversation without images.

        Args:
            messages: ``{"from": "human" | "gpt", "value": text}`` in turn; a first message that is not human is
                dropped, as in v1. The last answer may be None for ``mode="eval"``.
            tokenizer: a tokenizer of transformers; for ``mode="train"`` one that reports offsets.
            mode: "train" or "eval".
            num_images: how many images the conversation comes with, to be matched by as many ``<image>``; None
                takes the places as they are written.

        Returns:
            ``{"input_ids": [T], "labels": [T]}`` for "train", the labels IGNORE_INDEX outside the answers and their
            ends; ``{"input_ids": [T], "prompt": text}`` for "eval".

        Raises:
            ValueError: turns out of order, a missing answer, or not one ``<image>`` per image.
        """
        if mode not in ("train", "eval"):
            raise ValueError(f"The mode of a template is 'train' or 'eval', not {mode!r}.")
        return self.for_tokenizer(tokenizer)._encode(messages, tokenizer, mode, num_images)

    def _encode(
        self, messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase, mode: str, num_images: int | None
    ) -> Sample:
        prompt, questions, answers = self._compose(messages, mode, num_images)
        import torch  # here, so that a look at a data file need not wait for it

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
        """Raise what `encode` would raise of a training sample, without a tokenizer."""
        self._compose(messages, "train", num_images)

    def _compose(
        self, messages: Sequence[Message], mode: str, num_images: int | None
    ) -> tuple[str, list[str], list[str | None]]:
        """Prompt, questions and answers; a ``<image>`` left in them is an image's place, the others are disguised."""
        questions, answers = self.get_list_from_message(messages)
        if mode == "train" and any(answer is None for answer in answers):
            raise ValueError("An answer is missing, and without it there is nothing to learn.")
        questions = self._mark_images(questions, num_images)
        answers = [answer and _disguise(answer) for answer in answers]
        prompt = self.prompt(questions, answers)
        if num_images == 0:
            prompt = prompt.replace(DEFAULT_IMAGE_TOKEN, "")  # `pretrain` gives a place to every sample
        places = prompt.count(DEFAULT_IMAGE_TOKEN)
        if num_images is not None and places != num_images:
            raise ValueError(
                f"The sample has {num_images} image(s), but its questions have {places} {DEFAULT_IMAGE_TOKEN} to put "
                f"them at; write one {DEFAULT_IMAGE_TOKEN} per image."
            )
        return prompt, questions, answers

    def get_list_from_message(self, messages: Sequence[Message]) -> tuple[list[str], list[str | None]]:
        """Split a conversation into its questions and its answers, equally many.

        Raises:
            ValueError: the turns do not alternate, or one is not a text.
        """
        turns = list(messages)
        for turn in turns:
            if not isinstance(turn, dict) or not {"from", "value"} <= turn.keys():
                raise ValueError(f"A turn is an object with 'from' and 'value', not {turn!r}.")
        if turns and turns[0]["from"] not in _HUMAN:
            turns = turns[1:]
        questions: list[str] = []
        answers: list[str | None] = []
        for index, turn in enumerate(turns):
            expected = _ASSISTANT if index % 2 else _HUMAN
            if turn["from"] not in expected:
                raise ValueError(f"Turn {index + 1} is from {turn['from']!r} where {expected[0]!r} should speak.")
            text = turn["value"]
            if text is None and index % 2 and index == len(turns) - 1:
                answers.append(None)
                continue
            if not isinstance(text, str):
                raise ValueError(f"Turn {index + 1} ({turn['from']}) is {text!r} and not a text.")
            if not _is_unicode(text):
                raise ValueError(
                    f"Turn {index + 1} ({turn['from']}) holds half a character (a lone surrogate, as in "
                    f"\\ud83d), which no tokenizer reads: {text[:60]!a}."
                )
            if index % 2:
                answers.append(text)
            else:
                questions.append(text)
        if not turns or len(turns) % 2:
            raise ValueError(f"The conversation has {len(turns)} turns; it takes a question and an answer in turn.")
        return questions, answers

    def prompt(self, question_list: str | Sequence[str], answer_list: str | Sequence[str | None] | None) -> str:
        """The conversation as one text; an answer that is None leaves the text open for generation."""
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
        """Token ids of a text in which every ``<image>`` becomes `image_token_index`; at most one BOS."""
        if return_tensors not in (None, "pt"):
            raise ValueError(f"return_tensors is None or 'pt', not {return_tensors!r}.")
        input_ids, _ = _tokenize(prompt, tokenizer, None, image_token_index)
        if return_tensors is None:
            return input_ids
        import torch

        return torch.tensor(input_ids, dtype=torch.long)

    def _mark_images(self, questions: list[str], num_images: int | None) -> list[str]:
        """Leave a ``<image>`` in the questions for every image, and disguise those that are mere text."""
        if num_images == 0:
            return [_disguise(question) for question in questions]
        holders = [index for index, question in enumerate(questions) if DEFAULT_IMAGE_TOKEN in question]
        if num_images == 1 and len(holders) == 1:
            # v1 keeps one place however often a question repeats <image>; with one image there is no other reading.
            question = questions[holders[0]].replace(DEFAULT_IMAGE_TOKEN, "").strip()
            questions = list(questions)
            questions[holders[0]] = f"{DEFAULT_IMAGE_TOKEN}\n{question}"
        return questions

    def _answer_spans(self, prompt: str, questions: list[str], answers: list[str | None]) -> list[tuple[int, int]]:
        """Where in the prompt the texts stand that are learned: answers and the text that ends them.

        A round's end is the length of the prompt up to it, which holds for subclasses with a `_prompt` of their own.
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
                "%s._make_masks is not called: labels come from the places of the answers. Override make_labels to "
                "make your own.",
                cls.__name__,
            )


TemplateFactory: Registry[Callable[[], Template]] = Registry("conversation template")
"""``TemplateFactory("phi")`` is a `Template` class; ``TemplateFactory("phi")()`` the template."""

register_template = TemplateFactory.register
"""``@register_template("name", override=False)`` on a `Template` class."""


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def is_special(tokenizer: PreTrainedTokenizerBase, token: int) -> bool:
    """Whether an id is a special token, also one that has no role (bos, eos, …) in the tokenizer."""
    added = tokenizer.added_tokens_decoder.get(token)
    return token in tokenizer.all_special_ids or (added is not None and added.special)


def _tokenize(
    prompt: str,
    tokenizer: PreTrainedTokenizerBase,
    spans: list[tuple[int, int]] | None,
    image_token_index: int = IMAGE_TOKEN_INDEX,
) -> tuple[list[int], list[int]]:
    """Tokenise the pieces between the ``<image>``s and label the tokens that start inside `spans`.

    As in v1 every piece is tokenised by itself. What the tokenizer puts in front of a text by itself (a BOS) stands
    once, at the very front. What it puts behind a text (an EOS) would end the conversation in its middle, and is left
    out.

    Returns:
        ids and labels, equally long; no labels if `spans` is None.
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
    """The ids that a tokenizer puts in front of every text by itself: its BOS, if it adds one, or nothing.

    That a tokenizer has a `bos_token` says nothing: SmolLM2's is ``<|im_start|>``, which only its chat template writes.
    """
    plain = tokenizer("a", add_special_tokens=False).input_ids
    whole = tokenizer("a").input_ids
    for start in range(len(whole) - len(plain) + 1):
        if whole[start : start + len(plain)] == plain:
            return whole[:start]
    return []


def _labels_of(ids: list[int], starts: list[int], position: int, spans: list[tuple[int, int]]) -> list[int]:
    """Labels of a piece's tokens; both the tokens and the spans are in order, so one walk does."""
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
    """Refuse a template whose answers would not end where generation stops.

    With the wrong pair (`qwen2_instruct` and a base tokenizer, say) v1 masks every label and trains on nothing.

    Args:
        eos_token_ids: the ids that generation stops at; the tokenizer's own eos if None.

    Raises:
        ValueError: the template ends its answers with something that is not one special token of the tokenizer, or
            not one that generation stops at; or the tokenizer cannot tell where its tokens stand in the text.
    """
    if eos_token_ids is None:
        eos_token_ids = tokenizer.eos_token_id
    stops = {eos_token_ids} if isinstance(eos_token_ids, int) else set(eos_token_ids or ())
    name = getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError(
            f"The tokenizer {name} is not a fast one: it cannot report where its tokens stand in the text, and the "
            f"labels are found by that."
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
    """Why the template does not fit, as half a sentence; None if it does."""
    try:
        template = template.for_tokenizer(tokenizer)
    except ValueError:
        return "the tokenizer has no chat template that can be followed turn by turn"
    eos = template.eos
    if not eos:
        return None
    plain = tokenizer("a", add_special_tokens=False).input_ids
    ids = tokenizer("a" + eos, add_special_tokens=False).input_ids[len(plain) :]
    if ids != [tokenizer.convert_tokens_to_ids(eos)]:
        return f"its end of an answer, {eos!r}, is no single token there"
    if not is_special(tokenizer, ids[0]) and ids[0] not in stops:
        return f"its end of an answer, {eos!r}, is no special token there"
    if ids[0] not in stops:
        known = ", ".join(repr(tokenizer.convert_ids_to_tokens(stop)) for stop in sorted(stops)) or "nothing"
        return f"it ends an answer with {eos!r}, and generation stops at {known}"
    return None
