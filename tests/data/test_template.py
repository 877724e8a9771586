"""Templates: exactly v1's ids and labels, and conversations that v1 gets wrong."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass

import pytest
import torch

from tests.data.tokenizers import FIXTURES, QWEN2_CHAT_TEMPLATE, gemma, llama, qwen2
from tests.data.v1_masks import v1_labels
from tests.data.v1_plugin import DialogueTemplate
from tinyllava_switchkd.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from tinyllava_switchkd.data import Template, TemplateFactory, TextPreprocess, check_template, register_template

CASES = json.loads((FIXTURES / "v1" / "templates.json").read_text())
STYLES = {
    "phi": (qwen2, "<|endoftext|>", "plain"),
    "qwen2_base": (qwen2, "<|endoftext|>", "plain"),
    "qwen2_instruct": (lambda: qwen2("<|im_end|>"), "<|im_end|>", "plain"),
    "llama": (lambda: llama(legacy=False), "</s>", "llama"),
    "llama-legacy": (lambda: llama(legacy=True), "</s>", "llama"),
    "gemma": (gemma, "<eos>", "gemma"),
}


def talk(*texts: str | None) -> list[dict[str, str | None]]:
    return [{"from": ("human", "gpt")[index % 2], "value": text} for index, text in enumerate(texts)]


def learned(encoded: dict, tokenizer) -> list[str]:
    """The runs of labels, decoded."""
    runs, labels = [[]], encoded["labels"].tolist()
    for token in labels:
        if token == IGNORE_INDEX:
            runs.append([])
        else:
            runs[-1].append(token)
    return [tokenizer.decode(run) for run in runs if run]


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case['version']}-{case.get('mode', 'train')}")
def test_v1_ids_and_labels(case):
    encoded = TextPreprocess(qwen2(), case["version"])(case["messages"], case.get("mode", "train"))
    assert encoded["input_ids"].tolist() == case["input_ids"]
    assert encoded["input_ids"].dtype == torch.int64
    if "labels" in case:
        assert encoded["labels"].tolist() == case["labels"]
    else:
        assert encoded["prompt"] == case["prompt"]


WORDS = [
    "What",
    "is",
    "on the",
    "left",
    "of a",
    "red",
    "cat",
    "?",
    "Two",
    ".",
    "naïve",
    "猫",
    "🐈",
    "\n",
    "(x)",
    ":",
    "'",
]


@pytest.mark.parametrize("style", STYLES)
def test_labels_are_v1s_wherever_v1_counts_right(style):
    make, eos, rule = STYLES[style]
    tokenizer, version = make(), style.removesuffix("-legacy")
    rng = random.Random(0)
    agreed = 0
    for _ in range(60):
        texts = [" ".join(rng.choices(WORDS, k=rng.randint(1, 9))) for _ in range(2 * rng.randint(1, 3))]
        if rng.random() < 0.7:
            texts[0] = rng.choice(["<image>\n" + texts[0], texts[0] + "\n<image>"])
        encoded = TextPreprocess(tokenizer, version)(talk(*texts))
        prompt = TemplateFactory(version)().prompt(texts[::2], texts[1::2])
        assert encoded["input_ids"].tolist() == Template.tokenizer_image_token(prompt, tokenizer)
        expected = v1_labels(encoded["input_ids"].tolist(), prompt, tokenizer, eos, rule)
        if expected is not None:
            agreed += 1
            assert encoded["labels"].tolist() == expected, prompt
        runs = [f"{text}{eos}".lstrip() for text in texts[1::2]]
        assert [run.lstrip() for run in learned(encoded, tokenizer)] == runs
    # v1's correction for Llama assumes a space that this tokenizer puts before the later rounds only if it is legacy.
    assert agreed == 60 or (style.startswith("llama") and agreed > 15)


def test_one_bos_and_one_place():
    tokenizer = llama(legacy=False)
    ids = TextPreprocess(tokenizer, "llama")(talk("<image>\nWhat?", "A cat"))["input_ids"].tolist()
    assert ids[0] == tokenizer.bos_token_id
    assert ids.count(tokenizer.bos_token_id) == 1
    assert ids.count(IMAGE_TOKEN_INDEX) == 1
    caption = TextPreprocess(tokenizer, "pretrain")(talk("<image>\nWhat?", "A cat"))
    assert caption["input_ids"].tolist()[:2] == [tokenizer.bos_token_id, IMAGE_TOKEN_INDEX]
    assert caption["labels"].tolist()[:2] == [IGNORE_INDEX, IGNORE_INDEX]
    assert caption["labels"].tolist()[2:] == caption["input_ids"].tolist()[2:]


@pytest.mark.parametrize(
    "question, answer",
    [
        ("What does ' ASSISTANT: ' mean?", "A cat."),
        ("Who?", "I am the ASSISTANT: a cat."),
        ("Who?", "One. ASSISTANT: Two."),
        ("Say USER: hello ASSISTANT: there", "USER: hello ASSISTANT: there"),
        ("Who?", ""),
        ("Who?", "  spaces  "),
        ("Who?", "\n\nlines\n"),
    ],
)
@pytest.mark.parametrize("version", ["phi", "llama", "gemma"])
def test_separators_inside_turns(question, answer, version):
    make, eos, _ = STYLES[version]
    tokenizer = make()
    encoded = TextPreprocess(tokenizer, version)(talk(question, answer, "And then?", "Then"))
    # Llama's decoder strips the first space of what it is given.
    runs = [run.removeprefix(" ") if version != "llama" else run for run in learned(encoded, tokenizer)]
    assert runs == [f"{answer}{eos}", f"Then{eos}"]


def test_end_of_answer_inside_an_answer():
    tokenizer = qwen2()
    encoded = TextPreprocess(tokenizer, "phi")(talk("Who?", "A <|endoftext|> b", "Who?", "C"))
    assert learned(encoded, tokenizer) == [" A <|endoftext|> b<|endoftext|>", " C<|endoftext|>"]


def test_literal_image_is_text_in_an_answer_and_without_images():
    tokenizer = qwen2()
    text = TextPreprocess(tokenizer, "phi")
    encoded = text(talk("<image>\nWhich tag?", "The tag <image> it is"), num_images=1)
    assert encoded["input_ids"].tolist().count(IMAGE_TOKEN_INDEX) == 1
    assert learned(encoded, tokenizer) == [" The tag <image> it is<|endoftext|>"]
    encoded = text(talk("What is <image> in HTML?", "No tag <image>"), num_images=0)
    assert IMAGE_TOKEN_INDEX not in encoded["input_ids"]
    assert "USER: What is <image> in HTML? ASSISTANT: No tag <image>" in tokenizer.decode(encoded["input_ids"])
    asked = text(talk("What is <image> in HTML?", None), mode="eval", num_images=0)
    assert IMAGE_TOKEN_INDEX not in asked["input_ids"]
    assert asked["prompt"].endswith("USER: What is <image> in HTML? ASSISTANT:")


def test_several_images():
    tokenizer = qwen2()
    text = TextPreprocess(tokenizer, "phi")
    encoded = text(talk("<image>\n<image>\nSame?", "Yes"), num_images=2)
    ids = encoded["input_ids"]
    assert (ids == IMAGE_TOKEN_INDEX).sum() == 2
    first = ids.tolist().index(IMAGE_TOKEN_INDEX)
    newline = tokenizer("\n").input_ids
    assert ids[first : first + 3].tolist() == [IMAGE_TOKEN_INDEX, *newline, IMAGE_TOKEN_INDEX]
    assert learned(encoded, tokenizer) == [" Yes<|endoftext|>"]
    ids = text(talk("<image>\nThis?", "Cat", "<image>\nAnd this?", "Dog"), num_images=2)["input_ids"].tolist()
    assert ids.count(IMAGE_TOKEN_INDEX) == 2
    assert text(talk("<image> or <image>?", "x"), num_images=1)["input_ids"].tolist().count(IMAGE_TOKEN_INDEX) == 1
    caption = TextPreprocess(tokenizer, "pretrain")(talk("<image><image>", "Two", "more", "captions"), num_images=2)
    assert caption["input_ids"].tolist()[:2] == [IMAGE_TOKEN_INDEX] * 2
    assert learned(caption, tokenizer) == ["Two\ncaptions\n"]
    assert IMAGE_TOKEN_INDEX not in TextPreprocess(tokenizer, "pretrain")(talk("a", "b"), num_images=0)["input_ids"]


@pytest.mark.parametrize(
    "messages, num_images, match",
    [
        (talk("<image>\nWhat?", "x"), 2, r"2 image\(s\).*1 <image>"),
        (talk("What?", "x"), 1, r"1 image\(s\).*0 <image>"),
        (talk("<image>\n<image>\nWhat?", "x", "<image>\nb", "y"), 2, "3 <image>"),
        (talk("What?"), 0, "1 turns"),
        ([], 0, "0 turns"),
        (talk("What?", None), 0, "missing"),
        (talk("What?", 3), 0, "3, not a text"),
        ([{"from": "human", "value": "a"}, {"from": "human", "value": "b"}], 0, "Turn 2 is from 'human'"),
        ([{"from": "gpt", "value": "x"}, {"from": "gpt", "value": "a"}], 0, "Turn 1 is from 'gpt'"),
        ([{"from": "human"}, {"from": "gpt", "value": "a"}], 0, "'from' and 'value'"),
    ],
)
def test_refused_conversations(messages, num_images, match):
    with pytest.raises(ValueError, match=match):
        TextPreprocess(qwen2(), "phi")(messages, num_images=num_images)


def test_first_message_that_is_not_human_is_dropped_as_in_v1():
    text = TextPreprocess(qwen2(), "phi")
    system = [{"from": "system", "value": "Be kind."}]
    assert torch.equal(text(system + talk("a", "b"))["input_ids"], text(talk("a", "b"))["input_ids"])


def test_unknown_mode():
    with pytest.raises(ValueError, match="'test'"):
        TextPreprocess(qwen2(), "phi")(talk("a", "b"), mode="test")


def test_eval_prompts_are_v1s():
    system = TemplateFactory("phi")().system.apply()
    for version, (make, eos, _) in STYLES.items():
        text = TextPreprocess(make(), version.removesuffix("-legacy"))
        prompt = text(talk("<image>\nQ1", "A1", "Q2", None), mode="eval")["prompt"]
        assert prompt == f"{system}USER: <image>\nQ1 ASSISTANT: A1{eos}USER: Q2 ASSISTANT:"
    assert TextPreprocess(qwen2(), "pretrain")(talk("<image>\nQ", None), mode="eval")["prompt"] == "<image>"


def test_template_is_usable_as_v1s():
    tokenizer = qwen2()
    for case in CASES:
        template = TemplateFactory(case["version"])()
        questions, answers = template.get_list_from_message(case["messages"])
        prompt = template.prompt(questions, answers)
        ids = template.tokenizer_image_token(prompt, tokenizer, return_tensors="pt")
        assert ids.tolist() == case["input_ids"] == template.tokenizer_image_token(prompt, tokenizer)
    assert TemplateFactory("phi")().prompt("Q", None).endswith("USER: Q ASSISTANT:")


class TestPlugins:
    def test_v1_encode_without_num_images_is_refused(self):
        @register_template("v1-encode")
        @dataclass
        class Fixed(TemplateFactory("phi")):
            def encode(self, messages, tokenizer, mode="train"):
                return {}

        with pytest.raises(ValueError, match="'v1-encode' has TinyLLaVA v1's encode; add the argument num_images"):
            TextPreprocess(qwen2(), "v1-encode")

    @pytest.fixture(autouse=True)
    def _forget(self):
        with TemplateFactory.scope():
            yield

    def test_v1_style_class(self, caplog):
        register_template("dialogue")(DialogueTemplate)
        tokenizer = qwen2("<|im_end|>")
        text = TextPreprocess(tokenizer, "dialogue")
        encoded = text(talk("<image>\nWho?", "A\n", "And?", "B"), num_images=1)
        assert learned(encoded, tokenizer) == ["A\n<|im_end|>", "B<|im_end|>"]
        assert "_make_masks" in caplog.text
        asked = text(talk("Who?", None), mode="eval")
        assert asked["prompt"] == "<|im_start|>user\nWho?<|im_end|>\n<|im_start|>bot\n"

    def test_own_prompt_and_labels_are_used(self):
        phi = TemplateFactory("phi")

        @register_template("old")
        @dataclass
        class Shouting(phi):
            def _prompt(self, question_list, answer_list):
                return super()._prompt([question.upper() for question in question_list], answer_list)

        @register_template("own-labels")
        @dataclass
        class Everything(phi):
            def make_labels(self, input_ids, prompt, tokenizer):
                return input_ids.clone()

        tokenizer = qwen2()
        encoded = TextPreprocess(tokenizer, "old")(talk("who?", "me", "who?", "you"))
        assert learned(encoded, tokenizer) == [" me<|endoftext|>", " you<|endoftext|>"]
        assert "USER: WHO? ASSISTANT: me" in tokenizer.decode(encoded["input_ids"])
        encoded = TextPreprocess(tokenizer, "own-labels")(talk("who?", "me"))
        assert torch.equal(encoded["labels"], encoded["input_ids"])


class TestCheck:
    @pytest.mark.parametrize(
        "make, fitting",
        [
            (qwen2, ["phi", "pretrain", "qwen2_base"]),
            (lambda: qwen2("<|im_end|>"), ["pretrain", "qwen2_instruct"]),
            (lambda: qwen2("<|im_end|>", QWEN2_CHAT_TEMPLATE), ["chatml", "pretrain", "qwen2_instruct"]),
            (lambda: llama(legacy=False), ["llama", "pretrain"]),
            (gemma, ["gemma", "pretrain"]),
        ],
    )
    def test_what_fits(self, make, fitting):
        tokenizer = make()
        for version in TemplateFactory.list():
            if version in fitting:
                check_template(tokenizer, version)
            else:
                with pytest.raises(ValueError, match=f"{version!r} does not fit.*: {', '.join(fitting)}\\."):
                    check_template(tokenizer, version)

    def test_generation_may_stop_elsewhere(self):
        tokenizer = qwen2()
        check_template(tokenizer, "qwen2_instruct", eos_token_ids=[1200, 1202])
        with pytest.raises(ValueError, match=r"generation stops at '<\|im_end\|>'"):
            check_template(tokenizer, "qwen2_base", eos_token_ids=1202)

    def test_training_on_a_misfit_is_refused_and_asking_is_not(self):
        text = TextPreprocess(qwen2(), "llama")
        with pytest.raises(ValueError, match="'llama' does not fit"):
            text(talk("a", "b"))
        assert text(talk("a", None), mode="eval")["prompt"].endswith("ASSISTANT:")

    def test_unknown_template(self):
        with pytest.raises(ValueError, match=r"Unknown conversation template 'vicuna'.*chatml, gemma"):
            TextPreprocess(qwen2(), "vicuna")


class TestChatML:
    def test_follows_the_tokenizers_chat_template(self):
        tokenizer = qwen2("<|im_end|>", QWEN2_CHAT_TEMPLATE)
        text = TextPreprocess(tokenizer, "chatml")
        encoded = text(talk("Who?", "Me", "And?", "You"))
        turns = [
            {"role": role, "content": value}
            for role, value in (("user", "Who?"), ("assistant", "Me"), ("user", "And?"), ("assistant", "You"))
        ]
        assert tokenizer.decode(encoded["input_ids"]) == tokenizer.apply_chat_template(turns, tokenize=False)
        assert learned(encoded, tokenizer) == ["Me<|im_end|>", "You<|im_end|>"]
        asked = text(talk("Who?", None), mode="eval")["prompt"]
        assert asked == tokenizer.apply_chat_template(turns[:1], tokenize=False, add_generation_prompt=True)

    def test_images(self):
        tokenizer = qwen2("<|im_end|>", QWEN2_CHAT_TEMPLATE)
        encoded = TextPreprocess(tokenizer, "chatml")(talk("Who?\n<image>", "Me"), num_images=1)
        before, after = tokenizer("<|im_start|>user\n").input_ids, tokenizer("\nWho?<|im_end|>\n").input_ids
        ids = encoded["input_ids"].tolist()
        place = ids.index(IMAGE_TOKEN_INDEX)
        assert ids[place - len(before) : place] == before
        assert ids[place + 1 : place + 1 + len(after)] == after

    def test_thinking_is_off(self):
        template = QWEN2_CHAT_TEMPLATE.replace(
            "{{- '<|im_start|>assistant\\n' }}",
            "{{- '<|im_start|>assistant\\n' }}{%- if enable_thinking is defined and enable_thinking is false %}"
            "{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}",
        )
        tokenizer = qwen2("<|im_end|>", template)
        text = TextPreprocess(tokenizer, "chatml")
        encoded = text(talk("Who?", "Me"))
        opening = "<|im_start|>assistant\n<think>\n\n</think>\n\n"
        assert tokenizer.decode(encoded["input_ids"]).endswith(f"{opening}Me<|im_end|>\n")
        assert learned(encoded, tokenizer) == ["Me<|im_end|>"]
        assert text(talk("Who?", None), mode="eval")["prompt"].endswith(opening)

    def test_no_second_bos(self):
        tokenizer = llama(legacy=False)
        tokenizer.chat_template = (
            "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
            "{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
        )
        encoded = TextPreprocess(tokenizer, "chatml")(talk("Who?", "Me", "And?", "You"))
        assert encoded["input_ids"].tolist().count(tokenizer.bos_token_id) == 1
        assert [run.strip() for run in learned(encoded, tokenizer)] == ["Me</s>", "You</s>"]

    @pytest.mark.parametrize(
        "chat_template, match",
        [(None, "no chat template"), ("{{ messages | length }}", "one turn after the other")],
    )
    def test_refused(self, chat_template, match):
        tokenizer = qwen2("<|im_end|>", chat_template)
        with pytest.raises(ValueError, match="'chatml' does not fit"):
            check_template(tokenizer, "chatml")
        with pytest.raises(ValueError, match=match):
            TextPreprocess(tokenizer, "chatml")(talk("a", None), mode="eval")
