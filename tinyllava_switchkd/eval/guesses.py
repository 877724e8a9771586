"""Answers of one token without a generate loop: one pass finds "A", "Yes" or "2", and that the answer ends there.

A benchmark of letters or of yes and no has only a few answers. Greedy decoding needs two passes for each: one reads the
prompt and gives the token, the other finds that the answer ends after it. Here tokens that were answers before (the
guesses) are appended to the prompt, side by side. Each has the position after the prompt, and attends to the prompt and
itself. The pass that reads the prompt then gives its greedy token and, for each guess, whether the answer would end
after it. If a row's greedy token is not a guess, or the answer does not end there, decoding continues token by token
from the computed cache. So the answers are those of greedy decoding.
"""

from __future__ import annotations

import inspect
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from tinyllava_switchkd.model.caches import with_cache

MOST_GUESSES = 8
RECENT = 256


class Guesses:
    """The tokens that were whole answers recently; the commonest are the guesses.

    If the guesses cover only half of the recent answers or fewer, none is tried, because each guess makes the pass
    slightly longer for every row.
    """

    def __init__(self) -> None:
        self._recent: deque[int | None] = deque(maxlen=RECENT)

    def learn(self, answers: Sequence[Sequence[int]]) -> None:
        """Record answers, as token ids without the stop token."""
        self._recent.extend(answer[0] if len(answer) == 1 else None for answer in answers)

    def tokens(self) -> list[int]:
        """Token ids to try: those that cover nine tenths of the one-token answers, at most `MOST_GUESSES`."""
        recent = Counter(token for token in self._recent if token is not None)
        common, hits = [], 0
        for token, count in recent.most_common(MOST_GUESSES):
            if hits > 0.9 * recent.total():
                break
            common.append(token)
            hits += count
        return common if 2 * hits > len(self._recent) else []


@dataclass(frozen=True)
class Tried:
    """The result of one pass.

    Attributes:
        first: [B] the greedy token after each prompt.
        ends: [B] whether that token is a guess after which the answer ends.
        cache: keys and values of the prompts, without the guesses.
    """

    first: Tensor
    ends: Tensor
    cache: DynamicCache


def can_try(language_model: PreTrainedModel) -> bool:
    """Whether the language model accepts custom positions and masks; flash and flex attention accept no such mask."""
    takes = inspect.signature(language_model.forward).parameters
    attention = language_model.config._attn_implementation
    return attention in ("eager", "sdpa") and {"position_ids", "logits_to_keep"} <= takes.keys()


def try_guesses(
    language_model: PreTrainedModel,
    prompts: Tensor,
    attention_mask: Tensor,
    cache: DynamicCache,
    guesses: Sequence[int],
    stop_token_ids: Sequence[int],
) -> Tried:
    """Read the prompts and, in the same pass, predict the token after each guess.

    Args:
        language_model: a model for which `can_try` is true and whose layers attend to all positions.
        prompts: embeddings [B, T, D] of the part that the cache does not hold, padded on the left.
        attention_mask: [B, P + T], for the P cached positions and the prompts.
        cache: keys and values [B, heads, P, width] of what precedes the prompts, or empty. It is filled.
        guesses: G token ids.
        stop_token_ids: tokens that end an answer.
    """
    guessed = torch.tensor(guesses, device=prompts.device)  # [G]
    embedded = language_model.get_input_embeddings()(guessed)[None].expand(len(prompts), -1, -1)  # [B, G, D]
    positions = attention_mask.cumsum(dim=1).sub(1).clamp(min=0)  # [B, P + T]
    after = (positions[:, -1:] + 1).expand(-1, len(guesses))  # [B, G]: all guesses have the same position
    outputs = language_model(
        inputs_embeds=torch.cat([prompts, embedded], dim=1),
        attention_mask=_mask(attention_mask, prompts.shape[1], len(guesses), prompts.dtype),
        position_ids=torch.cat([positions[:, -prompts.shape[1] :], after], dim=1),
        use_cache=True,
        logits_to_keep=1 + len(guesses),
        **with_cache(cache),
    )
    cache.crop(-len(guesses))
    choices = outputs.logits.float().argmax(dim=-1)  # [B, 1 + G]
    first = choices[:, 0]
    stops = torch.isin(choices[:, 1:], torch.tensor(stop_token_ids, device=prompts.device))  # [B, G]
    return Tried(first, ((first[:, None] == guessed) & stops).any(dim=1), cache)


def _mask(attention_mask: Tensor, prompt: int, guesses: int, dtype: torch.dtype) -> Tensor:
    """The additive mask of the new positions, [B, 1, T + G, P + T + G]: 0 or the dtype's minimum.

    A prompt's position attends to everything before it except padding; a guess attends to the prompt. Each attends to
    itself, even padding, since the softmax of a fully masked row is undefined.
    """
    width = attention_mask.shape[1]  # P + T
    earlier = torch.ones(prompt + guesses, width, dtype=torch.bool, device=attention_mask.device)
    earlier[:prompt] = earlier[:prompt].tril(width - prompt)
    sees = earlier & attention_mask.bool()[:, None]  # [B, T + G, P + T]
    sees = torch.nn.functional.pad(sees, (0, guesses))
    sees.diagonal(width - prompt, dim1=1, dim2=2).fill_(True)
    return torch.zeros_like(sees, dtype=dtype).masked_fill(~sees, torch.finfo(dtype).min)[:, None]
