"""The collator: padding, masks, order of images, and truncation that counts image tokens."""

import pytest
import torch

from tests.data.tokenizers import qwen2
from tinyllava_switchkd.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from tinyllava_switchkd.data import DataCollatorForSupervisedDataset

EOS = 1200  # padding and end of answer in one


def sample(ids, learned=0, images=None):
    ids = torch.tensor(ids)
    labels = torch.full_like(ids, IGNORE_INDEX)
    if learned:
        labels[-learned:] = ids[-learned:]
    made = {"input_ids": ids, "labels": labels}
    if images is not None:
        made["images"] = torch.stack([torch.full((3, 2, 2), float(value)) for value in images])
    return made


def test_batch():
    collator = DataCollatorForSupervisedDataset(qwen2(), num_image_tokens=4, image_shape=(3, 2, 2))
    batch = collator(
        [
            sample([5, IMAGE_TOKEN_INDEX, IMAGE_TOKEN_INDEX, 6, EOS], 2, images=[1, 2]),
            sample([7, EOS], 1),
            sample([IMAGE_TOKEN_INDEX, 8, EOS], 2, images=[3]),
        ]
    )
    assert set(batch) == {"input_ids", "labels", "attention_mask", "images"}
    assert batch["input_ids"].tolist() == [
        [5, IMAGE_TOKEN_INDEX, IMAGE_TOKEN_INDEX, 6, EOS],
        [7, EOS, EOS, EOS, EOS],
        [IMAGE_TOKEN_INDEX, 8, EOS, EOS, EOS],
    ]
    assert batch["attention_mask"].long().tolist() == [[1] * 5, [1, 1, 0, 0, 0], [1, 1, 1, 0, 0]]
    ignored = IGNORE_INDEX
    assert batch["labels"].tolist() == [
        [ignored, ignored, ignored, 6, EOS],
        [ignored, EOS, ignored, ignored, ignored],
        [ignored, 8, EOS, ignored, ignored],
    ]
    assert batch["images"][:, 0, 0, 0].tolist() == [1, 2, 3]
    assert collator.report() is None


def test_a_batch_without_images_gets_one_blank():
    batch = DataCollatorForSupervisedDataset(qwen2(), image_shape=(3, 2, 2))([sample([1, 2]), sample([3])])
    assert torch.equal(batch["images"], torch.zeros(1, 3, 2, 2))
    assert "images" not in DataCollatorForSupervisedDataset(qwen2())([sample([1, 2])])


def splice(sample, num_image_tokens):
    """A sample as spliced by the model: every image becomes a run of tokens."""
    ids, labels = [], []
    for token, label in zip(sample["input_ids"].tolist(), sample["labels"].tolist(), strict=True):
        ids += [token] * (num_image_tokens if token == IMAGE_TOKEN_INDEX else 1)
        labels += [label] * (num_image_tokens if token == IMAGE_TOKEN_INDEX else 1)
    return ids, labels


@pytest.mark.parametrize("limit", range(1, 20))
def test_cut_is_the_longest_that_fits(limit):
    whole = sample([1, IMAGE_TOKEN_INDEX, 2, 3, IMAGE_TOKEN_INDEX, 4, 5, 6, EOS], 4, images=[1, 2])
    collator = DataCollatorForSupervisedDataset(qwen2(), num_image_tokens=4, model_max_length=limit)
    cut = collator.truncate(whole)
    ids, labels = splice(cut, 4)
    assert len(ids) <= limit
    all_ids, all_labels = splice(whole, 4)
    assert (ids, labels) == (all_ids[: len(ids)], all_labels[: len(ids)])
    places = (cut["input_ids"] == IMAGE_TOKEN_INDEX).sum()
    assert len(cut.get("images", ())) == places
    if len(ids) < min(limit, len(all_ids)):  # an image that does not fit whole is left out
        assert all_ids[len(ids)] == IMAGE_TOKEN_INDEX
    learned = [label for label in labels if label != IGNORE_INDEX]
    assert collator.counts.tolist() == [1, int(limit < len(all_ids)), int(limit < len(all_ids) and not learned)]


def test_report():
    collator = DataCollatorForSupervisedDataset(qwen2(), model_max_length=2)
    collator([sample([1, 2, 3], 1), sample([1, 2, 3], 2), sample([1, 2], 1), sample([1, 2, 3])])
    assert collator.report() == (
        "Of 4 samples 3 (75.0%) were cut to 2 tokens, and 1 (25.0%) of them have no answer left to learn from."
    )


def test_tokenizer_without_a_limit_or_padding():
    tokenizer = qwen2()
    tokenizer.model_max_length = int(1e30)
    tokenizer.pad_token = None
    batch = DataCollatorForSupervisedDataset(tokenizer)([sample([1, 2, 3]), sample([4])])
    assert batch["attention_mask"].sum(1).tolist() == [3, 1]


@pytest.mark.parametrize("ids, images", [([1, 2], [1]), ([IMAGE_TOKEN_INDEX], None), ([IMAGE_TOKEN_INDEX], [1, 2])])
def test_images_and_places_must_match(ids, images):
    with pytest.raises(ValueError, match=r"image\(s\), but . placeholder"):
        DataCollatorForSupervisedDataset(qwen2())([sample(ids, images=images)])


def test_images_of_two_sizes():
    one, other = sample([IMAGE_TOKEN_INDEX], images=[1]), sample([IMAGE_TOKEN_INDEX], images=[1])
    other["images"] = torch.zeros(1, 3, 4, 4)
    with pytest.raises(ValueError, match="differ in size"):
        DataCollatorForSupervisedDataset(qwen2())([one, other])
