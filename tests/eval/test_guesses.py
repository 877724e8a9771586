"""Answers of one token, found in the pass that reads the prompt, equal those of greedy decoding for any guesses."""

from __future__ import annotations

import pytest
import torch

from tests.eval.test_run_batches import make_answerer, mixed_prompts, shared_pictures
from tests.tiny import tiny_llava, tiny_tokenizer
from tinyllava_switchkd.eval.generate import Answerer
from tinyllava_switchkd.eval.guesses import MOST_GUESSES, RECENT, Guesses, can_try


class Fixed(Guesses):
    """Always the same guesses."""

    def __init__(self, tokens: list[int]) -> None:
        super().__init__()
        self._fixed = tokens

    def tokens(self) -> list[int]:
        return self._fixed


def calls_of(answerer: Answerer, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The rows of each call of the language model's `generate` from now on."""
    rows = []
    generate = answerer.model.language_model.generate
    monkeypatch.setattr(
        answerer.model.language_model,
        "generate",
        lambda **kwargs: rows.append(len(kwargs["inputs_embeds"])) or generate(**kwargs),
    )
    return rows


def stop_after_the_first(answerer: Answerer, answers: list[list[int]]) -> None:
    """Make half of the tokens that occur second, and never first, stop tokens."""
    firsts = {ids[0] for ids in answers if ids}
    seconds = dict.fromkeys(ids[1] for ids in answers if len(ids) > 1 and ids[1] not in firsts)
    answerer.stop_token_ids += tuple(seconds)[::2]


@pytest.mark.parametrize(
    ("llm", "attention"),
    [*((llm, "sdpa") for llm in ("qwen2", "qwen3", "llama", "gemma", "phi", "phi3", "stablelm")), ("qwen2", "eager")],
)
def test_answers_are_those_without_guessing(llm, attention, monkeypatch):
    model = tiny_llava(llm, text={"eos_token_id": 256, "initializer_range": 0.3})
    if attention == "sdpa":  # transformers' eager attention takes its softmax in float32
        model.double()
    model.set_attn_implementation(attention)
    answerer = Answerer(model, tiny_tokenizer("qwen2"), model.vision_tower.image_processor, "qwen2_base")
    assert can_try(model.language_model)
    stops = answerer.stop_token_ids
    for prompts, images in (mixed_prompts(answerer, 8), shared_pictures(answerer, 8, 3)):
        answerer.guesses, answerer.stop_token_ids = None, stops
        stop_after_the_first(answerer, answerer.answer_ids(prompts, images, 2))
        plain = answerer.answer_ids(prompts, images, 4)
        ones = [*dict.fromkeys(ids[0] for ids in plain if len(ids) == 1)]
        longer = [*dict.fromkeys(ids[0] for ids in plain if len(ids) > 1)]
        assert ones and longer, "the model has nothing to tell apart"
        rows = calls_of(answerer, monkeypatch)
        for guesses in (ones, longer, ones[:1] + longer[:1]):
            answerer.guesses = Fixed(guesses)
            assert answerer.answer_ids(prompts, images, 4) == plain
            settled = sum(not ids or (len(ids) == 1 and ids[0] in guesses) for ids in plain)
            assert rows.pop() == len(plain) - settled  # only the others continue token by token
        answerer.guesses = Fixed(ones)
        assert answerer.answer_ids(prompts, images, 1) == [ids[:1] for ids in plain]
        assert not rows
        monkeypatch.undo()


def test_a_batch_of_answers_seen_before_takes_one_pass(monkeypatch):
    answerer = make_answerer()
    prompts, images = shared_pictures(answerer, 24, 3)
    stop_after_the_first(answerer, answerer.answer_ids(prompts, images, 2))
    plain = answerer.answer_ids(prompts, images, 16)
    letters = sorted({ids[0] for ids in plain if len(ids) == 1})[:MOST_GUESSES]
    short = [row for row, ids in enumerate(plain) if len(ids) == 1 and ids[0] in letters]
    prompts, images = [prompts[row] for row in short], [images[row] for row in short]
    answerer.guesses = Guesses()
    answerer.answer_ids(prompts, images, 16)  # from now on more than half of the recent answers have one token
    passes = []
    answerer.model.language_model.register_forward_pre_hook(lambda *_: passes.append(1))
    rows = calls_of(answerer, monkeypatch)
    assert answerer.answer_ids(prompts, images, 16) == [plain[row] for row in short]
    assert len(short) >= 4
    assert (rows, passes) == ([], [1])


@pytest.fixture
def no_trying(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tinyllava_switchkd.eval.generate.try_guesses", lambda *_: pytest.fail("guesses were tried"))


@pytest.mark.usefixtures("no_trying")
def test_other_decoding_is_left_alone():
    answerer = make_answerer()
    prompts, images = shared_pictures(answerer, 4, 2)
    answerer.guesses = Fixed([5, 6])
    for how in ({"num_beams": 2}, {"min_new_tokens": 3}, {"do_sample": True}, {"repetition_penalty": 1.2}):
        assert len(answerer.answer_ids(prompts, images, 4, **how)) == 4
    with pytest.raises(pytest.fail.Exception):  # greedy
        answerer.answer_ids(prompts, images, 4)


@pytest.mark.usefixtures("no_trying")
def test_a_window_that_is_too_small_is_left_alone():
    model = tiny_llava("phi3", text={"sliding_window": 16, "initializer_range": 0.3}).double()
    answerer = Answerer(model, tiny_tokenizer("qwen2"), model.vision_tower.image_processor, "qwen2_base")
    answerer.guesses = Fixed([5, 6])
    assert len(answerer.answer_ids(*mixed_prompts(answerer, 4), 4)) == 4


def test_a_window_without_room_for_the_guesses_is_left_alone():
    answerer = make_answerer()
    prompt = answerer.prompt_ids("what?", 0)
    for window in range(len(prompt) + 1, len(prompt) + MOST_GUESSES + 2):
        text = {"sliding_window": window, "initializer_range": 0.3}
        model = tiny_llava("phi3", text=text).double()
        answerer = Answerer(model, tiny_tokenizer("phi"), model.vision_tower.image_processor, "phi")
        plain = answerer.answer_ids([prompt], [None], 1)
        answerer.guesses = Fixed([*range(5, 5 + MOST_GUESSES)])
        assert answerer.answer_ids([prompt], [None], 1) == plain


def test_guesses_are_the_common_answers():
    guesses = Guesses()
    assert guesses.tokens() == []
    guesses.learn([[7], [7], [5], [1, 2], []])
    assert guesses.tokens() == [7, 5]
    guesses.learn([[3, 4]] * 5)  # 3 of 10
    assert guesses.tokens() == []
    guesses.learn([[7]] * (RECENT - 5) + [[5]] * 5)  # nearly all are 7
    assert guesses.tokens() == [7]
    guesses.learn([[token] for token in range(MOST_GUESSES)] * (RECENT // MOST_GUESSES))
    assert sorted(guesses.tokens()) == list(range(MOST_GUESSES))
    guesses.learn([[token] for token in range(RECENT)])  # all different
    assert guesses.tokens() == []


def test_half_precision_has_room_for_the_mask():
    answerer = make_answerer(torch.bfloat16)
    prompts, images = mixed_prompts(answerer, 8)
    plain = answerer.answer_ids(prompts, images, 4)
    answerer.guesses = Fixed([5, 6])
    found = answerer.answer_ids(prompts, images, 4)
    assert sum(ours[:1] == theirs[:1] for ours, theirs in zip(found, plain, strict=True)) >= 6  # near ties may fall
