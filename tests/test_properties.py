"""Properties that hold for any input, tested on inputs from hypothesis (the same in every run)."""

from __future__ import annotations

import json
import math
import unicodedata

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.data.test_template import learned, talk
from tests.data.test_tokenizer_families import decoded
from tests.data.tokenizers import llama3, qwen2, smollm2
from tests.model.test_splice import EMBEDDING, TOKENS, WIDTH, oracle
from tinyllava_switchkd.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from tinyllava_switchkd.data import DataCollatorForSupervisedDataset, Records, TextPreprocess
from tinyllava_switchkd.eval.benchmarks import mme, mmmu, pope, scienceqa, vqa
from tinyllava_switchkd.eval.benchmarks.choices import read_choice
from tinyllava_switchkd.model.splice import splice

few = settings(derandomize=True, max_examples=40, deadline=None, database=None)
texts = st.text(st.characters(exclude_categories=("Cs", "Cn")), max_size=40)
words = st.lists(st.sampled_from(["A", "(B)", "c.", "Yes", "no,", "not", "12", "1,000", "\n", "the", "猫"]), max_size=8)
answers = st.one_of(texts, words.map(" ".join))


FAMILIES = {"phi": qwen2(), "qwen2_instruct": llama3(), "chatml": smollm2()}
ENDS = {"phi": "<|endoftext|>", "qwen2_instruct": "<|im_end|>", "chatml": "<|im_end|>"}
OPTIONS = {"A": "a cat", "B": "no", "C": "12"}


def nfc(text: str) -> str:
    """Qwen2's tokenizer composes characters (NFC)."""
    return unicodedata.normalize("NFC", text)


class TestTemplates:
    @pytest.mark.parametrize("template", FAMILIES)
    @few
    @given(rounds=st.lists(st.tuples(texts, texts), min_size=1, max_size=3), images=st.integers(0, 2))
    def test_ids_are_the_prompt_and_labels_the_answers(self, template, rounds, images):
        """For any conversation, nothing is lost, and exactly the answers and their ends are learned."""
        tokenizer, end = FAMILIES[template], ENDS[template]
        turns = [text for pair in rounds for text in pair]
        turns[0] = "<image>\n" * images + turns[0].replace("<image>", "")
        encode = TextPreprocess(tokenizer, template)
        asked = encode(talk(*turns[:-1], None), mode="eval", num_images=images)
        assert nfc(decoded(asked["input_ids"].tolist(), tokenizer)) == nfc(asked["prompt"])
        trained = encode(talk(*turns), num_images=images)
        ids, labels = trained["input_ids"], trained["labels"]
        assert (
            int((ids == IMAGE_TOKEN_INDEX).sum()) == images and (labels[ids == IMAGE_TOKEN_INDEX] == IGNORE_INDEX).all()
        )
        assert torch.equal(ids[labels != IGNORE_INDEX], labels[labels != IGNORE_INDEX])
        runs = nfc("".join(learned(trained, tokenizer)))
        assert runs.count(end) == len(rounds) + sum(answer.count(end) for answer in turns[1::2])
        for answer in turns[1::2]:
            assert nfc(answer).lstrip() in runs


@few
@given(st.data())
def test_splice_is_the_loop(data):
    rows = data.draw(st.integers(1, 4))
    length = data.draw(st.integers(1, 8))
    row = st.lists(st.one_of(st.integers(0, 49), st.just(IMAGE_TOKEN_INDEX)), min_size=length, max_size=length)
    ids = torch.tensor(data.draw(st.lists(row, min_size=rows, max_size=rows)))
    kept = torch.tensor(data.draw(st.lists(st.integers(1, length), min_size=rows, max_size=rows)))
    mask = (torch.arange(length) < kept[:, None]).long()
    if data.draw(st.booleans()):
        mask = mask.flip(1)
    labels = torch.where(ids < 25, IGNORE_INDEX, ids)
    per_row = ((ids == IMAGE_TOKEN_INDEX) & mask.bool()).sum(1)
    images = int(per_row.sum()) + (int((per_row == 0).sum()) if data.draw(st.booleans()) else 0)
    features = torch.randn(images, TOKENS, WIDTH) if images else None
    side, limit = data.draw(st.sampled_from(["left", "right"])), data.draw(st.one_of(st.none(), st.integers(1, 12)))
    got = splice(ids, mask, labels, features, EMBEDDING, max_length=limit, padding_side=side)
    for name, value in oracle(ids, mask, labels, features, limit, side).items():
        assert torch.equal(getattr(got, name), value), name


@few
@given(st.lists(st.tuples(st.integers(1, 9), st.integers(0, 3)), min_size=1, max_size=4), st.integers(1, 30))
def test_a_batch_is_never_longer_than_the_model_takes(samples, limit):
    """A spliced batch keeps to the maximum length, and every remaining image has its placeholder."""
    made = []
    for text, images in samples:
        ids = torch.tensor([IMAGE_TOKEN_INDEX] * images + [5] * text)
        made.append({"input_ids": ids, "labels": ids.clamp(min=0), "images": torch.zeros(images, 3, 2, 2)})
    collator = DataCollatorForSupervisedDataset(qwen2(), num_image_tokens=4, model_max_length=limit)
    batch = collator(made)
    places = batch["input_ids"] == IMAGE_TOKEN_INDEX
    assert (batch["attention_mask"].sum(1) + 3 * places.sum(1) <= limit).all()
    assert int(places.sum()) == len(batch.get("images", ()))


records = st.fixed_dictionaries(
    {"conversations": st.lists(st.fixed_dictionaries({"from": texts, "value": texts}), max_size=3)},
    optional={"id": st.one_of(texts, st.integers(), st.none()), "image": st.one_of(st.none(), st.just("a.png"))},
)


@few
@given(st.lists(records, min_size=1, max_size=5), st.booleans(), st.booleans(), st.sampled_from([None, 2]))
def test_records_are_what_json_reads(tmp_path_factory, items, lines, ascii_only, indent):
    path = tmp_path_factory.mktemp("records") / "data.json"
    if lines:
        text = "\n".join(json.dumps(item, ensure_ascii=ascii_only) for item in items)
    else:
        text = json.dumps(items, ensure_ascii=ascii_only, indent=indent)
    path.write_text(text, encoding="utf-8", newline="")
    read = Records(path)
    assert list(read) == items
    names = [read.id_of(index) for index in range(len(read))]
    assert all(isinstance(name, str) for name in names)
    assert read.words.tolist() == [sum(len(turn["value"].split()) for turn in item["conversations"]) for item in items]


class TestAnswers:
    @few
    @given(answers)
    def test_a_reading_is_one_of_the_answers_there_are(self, text):
        assert read_choice(text, OPTIONS) in (None, *OPTIONS)
        assert mmmu.read_choice(text, list(OPTIONS), OPTIONS) in (None, *OPTIONS)
        assert pope.read_yes_no(text) in ("yes", "no")
        assert mme.read_yes_no(text) in ("yes", "no", "other")
        assert isinstance(scienceqa.read_letter(text), str)
        assert all(isinstance(candidate, str | float) for candidate in mmmu.read_open(text))

    @few
    @given(st.sampled_from("ABC"), st.sampled_from(["{}", "{}.", "({})", "Answer: {}", "The answer is {}."]))
    def test_a_plain_letter_is_read(self, letter, form):
        assert read_choice(form.format(letter), {"A": "red", "B": "green", "C": "blue"}) == letter

    @few
    @given(answers, st.lists(answers, min_size=10, max_size=10))
    def test_accuracies_are_shares(self, text, annotators):
        for score in (vqa.vqav2_accuracy, vqa.m4c_accuracy, vqa.vizwiz_accuracy):
            value = score(text, annotators)
            assert 0 <= value <= 1 and math.isfinite(value)
            assert score(text, list(reversed(annotators))) == pytest.approx(value)  # no order among annotators
