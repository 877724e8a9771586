"""The data set: samples, their images, and errors that name the sample."""

import copy
import logging
import multiprocessing
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader
from transformers import AutoImageProcessor

from tests.data.conftest import RECORDS, data_args, write
from tests.data.tokenizers import FIXTURES, qwen2
from tests.eval import forked
from tinyllava_switchkd.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from tinyllava_switchkd.data import (
    DataCollatorForSupervisedDataset,
    ImagePreprocess,
    LazySupervisedDataset,
    TextPreprocess,
    make_supervised_data_module,
)


def dataset(folder, **kwargs):
    args = data_args(folder, **kwargs)
    return LazySupervisedDataset(args.data_path, qwen2(), args)


def test_samples(folder):
    data = dataset(folder)
    assert len(data) == 3
    text, image = TextPreprocess(qwen2(), "phi"), ImagePreprocess(data_args(folder).image_processor)
    for index, names in enumerate([["a/red.png"], [], ["a/red.png", "b.jpg"]]):
        expected = text(RECORDS[index]["conversations"], num_images=len(names))
        assert torch.equal(data[index]["input_ids"], expected["input_ids"])
        assert torch.equal(data[index]["labels"], expected["labels"])
        assert int((data[index]["input_ids"] == IMAGE_TOKEN_INDEX).sum()) == len(names)
        if names:
            assert torch.equal(data[index]["images"], torch.stack([image(Image.open(folder / n)) for n in names]))
        else:
            assert "images" not in data[index]
        assert torch.equal(data.encode(index)["labels"], expected["labels"])


def test_an_image_is_decoded_once_and_prepared_for_each_model(folder, monkeypatch):
    clip = AutoImageProcessor.from_pretrained(FIXTURES / "v1" / "clip-tiny")
    args = data_args(folder, teacher_image_processor=clip, teacher_image_aspect_ratio="pad")
    module = make_supervised_data_module(qwen2(), args)
    opened = []
    monkeypatch.setattr(Image, "open", lambda path, open=Image.open, **how: opened.append(path) or open(path, **how))
    data = module["train_dataset"]
    samples = [data[index] for index in range(3)]
    assert len(opened) == 3
    teacher = ImagePreprocess(clip, SimpleNamespace(image_aspect_ratio="pad"))
    images = [Image.open(folder / name) for name in ("a/red.png", "a/red.png", "b.jpg")]
    expected = torch.stack([teacher(image) for image in images])
    batch = module["data_collator"](samples)
    assert torch.equal(batch["teacher_images"], expected)
    assert torch.equal(batch["images"], torch.stack([data.image_preprocess(image) for image in images]))
    assert batch["ids"] == ["one", "text", "two"]
    alone = module["data_collator"]([samples[1]])
    assert not alone["teacher_images"].any() and alone["teacher_images"].shape == (1, *expected.shape[1:])
    assert alone["images"].shape == (1, 3, 56, 56)
    second = (samples[2]["input_ids"] == IMAGE_TOKEN_INDEX).nonzero()[1]
    cut = DataCollatorForSupervisedDataset(qwen2(), model_max_length=int(second))([samples[2]])
    assert torch.equal(cut["images"], samples[2]["images"][:1])
    assert torch.equal(cut["teacher_images"], samples[2]["teacher_images"][:1])


def test_a_sample_that_is_kept_is_made_once(folder, monkeypatch):
    data, fresh = dataset(folder, keep_in_memory=True), dataset(folder)
    opened = []
    monkeypatch.setattr(Image, "open", lambda path, open=Image.open, **how: opened.append(path) or open(path, **how))
    first = data[2]
    first["labels"] = first.pop("images")  # changes to a returned sample do not affect the data set
    again = data[2]
    assert len(opened) == 2
    expected = fresh[2]
    assert again.keys() == expected.keys()
    assert all(torch.equal(again[key], expected[key]) for key in ("input_ids", "labels", "images"))


@pytest.mark.parametrize("aspect", [None, "square", "pad"])
def test_a_teacher_that_reads_the_students_pixels_costs_nothing(folder, aspect):
    args = data_args(folder, teacher_image_aspect_ratio=aspect)
    args.teacher_image_processor = copy.deepcopy(args.image_processor)
    data = LazySupervisedDataset(args.data_path, qwen2(), args)
    assert ("teacher_images" in data[0]) == (aspect == "pad")


def test_every_sample_has_a_name_of_its_own(folder):
    turns = RECORDS[1]["conversations"]
    records = [
        {"conversations": turns} | ({} if name is None else {"id": name}) for name in ("a", 7, "a", None, "3", "a")
    ]
    write(folder, records)
    data = dataset(folder)
    assert [data[index]["id"] for index in range(6)] == ["a", "7", "a#2", "3", "3#4", "a#5"]
    loader = DataLoader(data, batch_size=3, collate_fn=DataCollatorForSupervisedDataset(qwen2()), num_workers=1)
    assert [batch["ids"] for batch in loader] == [["a", "7", "a#2"], ["3", "3#4", "a#5"]]


def test_lengths_are_v1s(folder):
    data = dataset(folder)
    words = [4, 12, 5]
    assert data.lengths == [words[0] + 128, words[1], words[2] + 128]
    assert data.modality_lengths == [words[0], -words[1], words[2]]
    write(folder, [{"id": 0, "conversations": [{"from": "human", "value": ""}, {"from": "gpt", "value": " "}]}])
    assert dataset(folder).modality_lengths == [-1]


def test_pretrain_gives_a_sample_without_image_no_place(folder):
    data = dataset(folder, template="pretrain")
    assert [int((data[i]["input_ids"] == IMAGE_TOKEN_INDEX).sum()) for i in range(3)] == [1, 0, 2]


@pytest.mark.parametrize(
    "change, match",
    [
        ({"conversations": RECORDS[0]["conversations"][:1]}, "1 turns"),
        ({"conversations": RECORDS[0]["conversations"][::-1]}, "1 turns|Turn"),
        ({"image": ["a/red.png", "b.jpg"]}, r"2 image\(s\)"),
        ({"image": "gone.png"}, r"image .*gone.png does not exist\. Set on_bad_image"),
        ({"image": "data.json"}, r"image .*data.json cannot be read"),
    ],
)
def test_errors_name_the_sample(folder, change, match):
    write(folder, [RECORDS[1], {**RECORDS[0], **change}])
    data = dataset(folder)
    with pytest.raises(ValueError, match=r"Sample 1 \(id 'one'\) of .*data\.json: .*" + match):
        data[1]
    assert "images" not in data[0]


def test_bad_images_can_be_skipped(folder, caplog):
    (folder / "b.jpg").write_bytes((folder / "b.jpg").read_bytes()[:200])
    clip = AutoImageProcessor.from_pretrained(FIXTURES / "v1" / "clip-tiny")
    data = dataset(folder, on_bad_image="skip", teacher_image_processor=clip)
    good, bad = data[0], data[2]
    assert (good["labels"] != IGNORE_INDEX).any() and good["images"].any() and good["teacher_images"].any()
    assert bad.keys() == {"input_ids", "labels", "id"} and bad["id"] == "two"  # also methods that look at images
    assert bad["labels"].tolist() == [IGNORE_INDEX] and bad["input_ids"] != IMAGE_TOKEN_INDEX
    assert data.bad_images == 1
    assert "'two'" in caplog.text
    assert "b.jpg" in caplog.text
    with pytest.raises(ValueError, match=r"'two'.*on_bad_image"):
        dataset(folder)[2]


def test_skipping_ends_where_most_images_are_bad(folder, caplog):
    caplog.set_level(logging.ERROR)
    (folder / "a" / "red.png").unlink()
    data = dataset(folder, on_bad_image="skip")
    with pytest.raises(ValueError, match="too many bad images to skip"):
        for _ in range(20):
            data[0]


@pytest.mark.parametrize("method", ["fork", "forkserver"])
def test_workers_share_their_counts(folder, method):
    """A worker of the fork server gets the data set and the collator pickled, like a spawned one."""
    context = {"fork": multiprocessing.get_context("fork"), "forkserver": forked.CONTEXT}[method]
    (folder / "b.jpg").write_bytes(b"")
    data = dataset(folder, on_bad_image="skip")
    collator = DataCollatorForSupervisedDataset(qwen2(), model_max_length=95)
    loader = DataLoader(data, batch_size=1, collate_fn=collator, num_workers=1, multiprocessing_context=context)
    assert len(list(loader)) == 3
    assert data.bad_images == 1
    assert collator.counts[0] == 3
    assert collator.counts[1] >= 1


def test_settings(folder):
    with pytest.raises(ValueError, match="on_bad_image 'ignore'; choose one of raise, skip"):
        dataset(folder, on_bad_image="ignore")
    with pytest.raises(ValueError, match="no image_processor"):
        dataset(folder, image_processor=None)
    write(folder, [RECORDS[1]])
    assert "images" not in dataset(folder, image_processor=None)[0]
