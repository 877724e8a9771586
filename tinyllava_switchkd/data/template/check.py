"""Does a conversation template fit a tokenizer? Asked before training starts."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING

from tinyllava_switchkd.data.template.base import Template, TemplateFactory, is_special

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


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
