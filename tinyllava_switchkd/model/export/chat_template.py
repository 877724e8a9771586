"""Convert a conversation template to the Jinja chat template that transformers, vLLM and SGLang use."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tinyllava_switchkd.constants import DEFAULT_IMAGE_TOKEN, IMAGE_TOKEN_INDEX
from tinyllava_switchkd.data.template import Template, TemplateFactory
from tinyllava_switchkd.data.template.base import begin_tokens, exchange
from tinyllava_switchkd.io import read_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


Turns = Sequence[tuple[str, str | None]]
"""(question, answer) pairs; the last answer may be None."""

# A Unicode noncharacter, which no template contains; used to find the text around a field.
_MARK = "\ufdd5"

# Works in all Jinja implementations: transformers.js has no `string * number`.
# As in `Template.prompt`, a question's images come first, and only a question with images is stripped.
_JINJA = Path(__file__).with_suffix(".jinja")

# Conversations for which a chat template must give the same text as its conversation template.
PROBES: tuple[Turns, ...] = (
    (("<image>\nWhat is this?", None),),
    (("How many are there?\n<image>", "Two dogs, and one cat."), ("Why so?", None)),
    (("Is 7 a prime number? Say yes or no.", "Yes."), (" Which comes next? ", None)),
    (("<image>\n<image>\nWhich is larger", None),),
    (("<image>", "A cat.\nIt sleeps."), ("Est-ce sûr?", "Yes"), ("Where: left or right?", "Left")),
)


def jinja_template(template: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """The chat template that gives the same text as a conversation template, image marks included.

    If the tokenizer adds a BOS token, the chat template writes it, because rendered text is tokenised without adding
    one.

    Args:
        template: name of a conversation template.
        tokenizer: the exported tokenizer, in which ``<image>`` is one token.

    Raises:
        ValueError: the template does not write one turn after the other, or the token ids would differ.
    """
    plain = TemplateFactory(template)()
    written = plain.for_tokenizer(tokenizer)
    fitted = written is not plain
    bos = tokenizer.bos_token if begin_tokens(tokenizer)[-1:] == [tokenizer.bos_token_id] else ""
    jinja = _fill(written, bos, "", system_is_text=not fitted)
    if jinja is None or any(_render(tokenizer, jinja, probe) != bos + _text(written, probe) for probe in PROBES):
        raise ValueError(
            f"The conversation template {template!r} does not write one question and answer after the other, so no "
            f"chat template can be made from it; pass --template with a template for conversations."
        )
    # In training, the text after an image is tokenised by itself. SentencePiece tokenizers begin every text with a
    # space, but Llama's does not do so after a special token, so the chat template must write the space there.
    spaced = _fill(written, bos, " ", system_is_text=not fitted)
    expected = [_ids_in_training(written, probe, tokenizer) for probe in PROBES]
    for candidate in filter(None, (jinja, spaced)):
        texts = [_render(tokenizer, candidate, probe) for probe in PROBES]
        if [tokenizer(text, add_special_tokens=False).input_ids for text in texts] == expected:
            return candidate
    raise ValueError(
        f"The tokenizer splits the text around {DEFAULT_IMAGE_TOKEN} differently when that is a token of its own, so "
        f"no chat template gives the tokens that the model was trained on with the template {template!r}."
    )


def template_behind(jinja: str, tokenizer: PreTrainedTokenizerBase) -> str | None:
    """The conversation template that gives the same text as a checkpoint's chat template; None if there is none."""
    for template in TemplateFactory.list():
        try:
            own = jinja_template(template, tokenizer)
            if all(_render(tokenizer, jinja, probe) == _render(tokenizer, own, probe) for probe in PROBES):
                return template
        except Exception:  # a foreign chat template may fail with any error
            continue
    return None


def messages_of(turns: Turns) -> list[dict[str, str]]:
    """A conversation as transformers' list of messages; an answer that is None is left out."""
    messages = []
    for question, answer in turns:
        messages.append({"role": "user", "content": question})
        if answer is not None:
            messages.append({"role": "assistant", "content": answer})
    return messages


def _fill(template: Template, bos: str, gap: str, system_is_text: bool) -> str | None:
    """The chat template made from a template's formatters; None if a formatter drops its content.

    Args:
        bos: the BOS token, or ''.
        gap: text to write after the BOS token and after images.
        system_is_text: whether the system prompt is plain text, which another one may replace.
    """
    user = template.format_user.apply(content=_MARK).partition(_MARK)
    answer = template.format_assistant.apply(content=_MARK).partition(_MARK)
    image_line = template.format_image_token.apply(content=_MARK).partition(_MARK)
    if not (user[1] and answer[1] and image_line[1]) or image_line[2]:
        return None
    system = template.system.apply()
    values = {
        "BOS": bos + gap if bos else "",
        "SYSTEM": system,
        "SYSTEM_IS_TEXT": system_is_text,
        "SYSTEM_END": system[len(system.rstrip()) :],
        "USER_BEGIN": user[0],
        "USER_END": user[2],
        "ANSWER_BEGIN": answer[0],
        "ANSWER_END": answer[2],
        "IMAGE": DEFAULT_IMAGE_TOKEN,
        "IMAGE_LINE": image_line[0].replace(DEFAULT_IMAGE_TOKEN, DEFAULT_IMAGE_TOKEN + gap),
        "PROMPT": template.format_assistant.apply(content=None),
    }
    # Not as ASCII: json would write an emoji as two surrogates, which Jinja does not join.
    texts = {name: json.dumps(value, ensure_ascii=False) for name, value in values.items()}
    return "".join(f"{{%- set {name} = {text} -%}}\n" for name, text in texts.items()) + read_text(_JINJA)


def _render(tokenizer: PreTrainedTokenizerBase, jinja: str, turns: Turns) -> str:
    return tokenizer.apply_chat_template(
        messages_of(turns), chat_template=jinja, tokenize=False, add_generation_prompt=turns[-1][1] is None
    )


def _text(template: Template, turns: Turns) -> str:
    questions, answers = zip(*turns, strict=True)
    return template.prompt(list(questions), list(answers))


def _ids_in_training(template: Template, turns: Turns, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    messages = [message for question, answer in turns for message in exchange(question, answer)]
    ids = template.encode(messages, tokenizer, mode="eval")["input_ids"].tolist()
    image = tokenizer.convert_tokens_to_ids(DEFAULT_IMAGE_TOKEN)
    return [image if token == IMAGE_TOKEN_INDEX else token for token in ids]
