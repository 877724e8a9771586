"""Checking a data file, by the function, by the command, and before training."""

import json
import subprocess
import sys

import pytest
from PIL import Image

from tests.data.conftest import RECORDS, data_args, write
from tests.data.tokenizers import FIXTURES, qwen2
from tinyllava_switchkd.data import (
    check_data,
    make_supervised_data_module,
)
from tinyllava_switchkd.train.check_data import main


def talk(*texts):
    return [{"from": ("human", "gpt")[index % 2], "value": text} for index, text in enumerate(texts)]


def test_good_data(folder):
    report = check_data(folder / "data.json", str(folder), tokenizer=qwen2(), num_image_tokens=15, decode="all")
    assert report.ok
    assert not report.warnings
    assert report.counts["samples"] == 3
    assert report.counts["of them text-only"] == 1
    assert report.counts["images named"] == 3
    assert report.counts["different images"] == 2
    assert report.counts["samples encoded"] == 3
    assert report.counts["of them cut"] == 0
    assert "ready" in str(report)
    report.raise_problems("data.json")


def test_every_kind_of_problem_is_found(folder):
    (folder / "b.jpg").write_bytes((folder / "b.jpg").read_bytes()[:-100])
    records = [
        *RECORDS,
        {"id": "gone", "image": "a/gone.png", "conversations": talk("<image>", "x")},
        {"id": "order", "conversations": talk("a", "b")[::-1] + talk("a")},
        {"id": "place", "image": "a/red.png", "conversations": talk("no place", "x")},
        {"id": "literal", "conversations": talk("<image> is a tag", "yes")},
        {"id": "eos", "conversations": talk("a", "b<|endoftext|>c")},
    ]
    report = check_data(write(folder, records), str(folder), decode="all")
    problems = {kind: (cases.count, cases.examples[0]) for kind, cases in report.problems.items()}
    assert problems["image(s) that do not exist"] == (1, str(folder / "a" / "gone.png"))
    assert problems["image(s) that cannot be read"][0] == 1
    count, example = problems["sample(s) that cannot be encoded"]
    assert count == 2
    assert example.startswith("sample 4 (id 'order')")
    assert len(problems) == 3
    warnings = {kind: cases.examples for kind, cases in report.warnings.items()}
    assert ["sample 6 (id 'literal')"] in warnings.values()
    assert ["sample 7 (id 'eos')"] in warnings.values()
    with pytest.raises(ValueError, match=r"data\.json cannot be used for training. It has 2 sample\(s\).*gone\.png"):
        report.raise_problems("data.json")


def test_many_files_of_a_folder(folder):
    names = [f"many/{index}.png" for index in range(100)]
    (folder / "many").mkdir()
    for name in names[5:]:
        (folder / name).touch()
    path = write(folder, [{"id": name, "image": name, "conversations": talk("<image>", "x")} for name in names])
    for root, missing in ((folder, 5), (folder / "a", 100)):
        cases = check_data(path, str(root)).problems["image(s) that do not exist"]
        assert cases.count == missing
        assert len(cases.examples) == min(10, missing)


def test_unreadable_file_is_a_problem_and_a_misfit_too(folder):
    assert "holds no record" in str(check_data(write(folder, [])))
    (folder / "data.json").write_text("[")
    report = check_data(folder / "data.json")
    assert "cut off" in str(report)
    assert not report.ok
    write(folder, RECORDS)
    report = check_data(folder / "data.json", str(folder), tokenizer=qwen2(), template="llama")
    assert list(report.problems) == ["template that does not fit"]
    with pytest.raises(ValueError, match="Unknown conversation template"):
        check_data(folder / "data.json", template="unknown")


def test_cut_answers_are_counted(folder):
    report = check_data(
        folder / "data.json", str(folder), tokenizer=qwen2(), num_image_tokens=500, model_max_length=300
    )
    assert report.ok
    assert report.counts["of them cut"] == 2
    assert [cases.count for cases in report.warnings.values()] == [2]


def test_command(folder, capsys):
    arguments = [str(folder / "data.json"), "--image-folder", str(folder)]
    tokenizer = str(FIXTURES / "tokenizers" / "qwen2-tiny")
    assert main([*arguments, "--tokenizer", tokenizer, "--decode"]) == 0
    assert "The data is ready." in capsys.readouterr().out
    assert main([*arguments, "--conv-version", "nothing"]) == 1
    assert "Unknown conversation template" in capsys.readouterr().err
    assert main([str(folder / "nowhere.json")]) == 1
    assert "nowhere.json" in capsys.readouterr().out


@pytest.mark.parametrize(
    "model, tokens",
    [
        (["--vision_tower", "clip-tiny", "--num_queries", "7", "--connector_type", "resampler"], 7),
        (["--vision_tower", "siglip-tiny"], 15),
        (["--vision-tower", "siglip-tiny", "--mm-vision-select-feature", "cls_patch"], 16),
        (["--vision_tower", "clip-tiny", "--image_aspect_ratio", "pad"], 16),
        (["--model_path", "ckpt_clip_patch"], 16),
        (["--model_path", "ckpt_siglip_patch"], 15),
    ],
)
def test_visual_tokens_of_the_model_named(folder, capsys, model, tokens):
    model = [str(FIXTURES / "upstream" / word) if "tiny" in word or "ckpt" in word else word for word in model]
    assert main([str(folder / "data.json"), "--image_folder", str(folder), *model]) == 0
    out = capsys.readouterr().out
    assert f" {tokens}  visual tokens per image" in out
    assert ("samples encoded" in out) == ("--model_path" in model)


def test_mistakes_that_v1_silently_accepts_are_counted(folder):
    image = "a/red.png"
    records = [
        {"id": 1, "conversations": [{"from": "system", "value": "Be kind."}, *talk("a", "b")]},
        {"id": 1, "image": image, "conversations": talk("<image>\na", "<image> b")},
        {"id": 2, "image": image, "conversations": talk("<image>\na", " ", "b", "")},
        {"id": {"of": 3}, "images": [image], "conversations": talk("a", "b")},
    ]
    path = write(folder, records)
    report = check_data(path, str(folder))
    assert report.ok
    assert {kind: (cases.count, cases.examples) for kind, cases in report.warnings.items()} == {
        "sample(s) whose first turn is not the human's and is dropped (as in v1)": (
            1,
            ["sample 0 (id '1'), from 'system'"],
        ),
        "sample(s) with <image> in an answer; it is read as text": (1, ["sample 1 (id '1')"]),
        "sample(s) with the id of an earlier one": (1, ["sample 1 (id '1')"]),
        "sample(s) whose answers are all empty, which teaches the model to say nothing": (1, ["sample 2 (id '2')"]),
        "sample(s) whose id is neither a string nor an integer": (1, [f"sample 3 (id {str({'of': 3})!a})"]),
        "sample(s) with 'images', which is not read: the key of images is 'image'": (
            1,
            [f"sample 3 (id {str({'of': 3})!a})"],
        ),
    }
    several = [kind for kind in check_data(path, str(folder), template="pretrain").warnings if "rounds" in kind]
    assert len(several) == 1
    report = check_data(write(folder, records[2:3]), str(folder))
    assert "(all of them)" in str(report) and not report.ok


@pytest.mark.parametrize("name", ["train.check_data", "data.check"])  # the second is its old name
def test_command_as_a_command(name, folder):
    (folder / "b.jpg").unlink()
    command = [sys.executable, "-m", f"tinyllava_switchkd.{name}", str(folder / "data.json")]
    done = subprocess.run([*command, "--image-folder", str(folder)], capture_output=True, text=True)
    assert done.returncode == 1
    assert str(folder / "b.jpg") in done.stdout
    assert "Warning" not in done.stderr


class TestModule:
    def test_what_a_trainer_gets(self, folder):
        module = make_supervised_data_module(qwen2(), data_args(folder))
        assert set(module) == {"train_dataset", "eval_dataset", "data_collator"}
        assert module["eval_dataset"] is None
        data, collator = module["train_dataset"], module["data_collator"]
        batch = collator([data[index] for index in range(3)])
        assert batch["images"].shape == (3, 3, 56, 56)
        assert collator([data[1]])["images"].shape == (1, 3, 56, 56)
        assert collator.num_image_tokens == 15
        module = make_supervised_data_module(qwen2(), data_args(folder, is_multimodal=False))
        assert "images" not in module["data_collator"]([data[1]])

    def test_refusals(self, folder, monkeypatch):
        with pytest.raises(ValueError, match="'gemma' does not fit"):
            make_supervised_data_module(qwen2(), data_args(folder, template="gemma"))
        with pytest.raises(FileNotFoundError, match="nowhere"):
            make_supervised_data_module(qwen2(), data_args(folder, data_path="nowhere.json"))
        (folder / "b.jpg").unlink()
        with pytest.raises(ValueError, match=r"1 image\(s\) that do not exist: .*b\.jpg"):
            make_supervised_data_module(qwen2(), data_args(folder))
        monkeypatch.setenv("LOCAL_RANK", "1")  # one process per machine checks
        make_supervised_data_module(qwen2(), data_args(folder))

    def test_missing_images_that_are_to_be_skipped(self, folder, caplog):
        (folder / "b.jpg").unlink()
        make_supervised_data_module(qwen2(), data_args(folder, on_bad_image="skip"))
        assert "b.jpg" in caplog.text

    def test_eos_that_generation_stops_at(self, folder):
        args = data_args(folder, template="qwen2_instruct", eos_token_ids=[1202])
        assert len(make_supervised_data_module(qwen2(), args)["train_dataset"]) == 3

    def test_too_short_a_model(self, folder):
        with pytest.raises(ValueError, match=r"2 of 3 samples.*200 tokens, 728 of them.*raise model_max_length"):
            tokenizer = qwen2()
            tokenizer.model_max_length = 200
            make_supervised_data_module(tokenizer, data_args(folder, num_image_tokens=728))

    def test_a_few_lost_answers_are_reported(self, folder, caplog):
        records = [{"id": index, "conversations": talk("a", "b")} for index in range(30)]
        records[7]["conversations"][0]["value"] = "a " * 300
        write(folder, records)
        tokenizer = qwen2()
        tokenizer.model_max_length = 200
        collator = make_supervised_data_module(tokenizer, data_args(folder))["data_collator"]
        assert "1 of 30 samples" in caplog.text
        assert collator.counts.sum() == 0


def test_json_lines(folder):
    (folder / "data.jsonl").write_text("\n".join(map(json.dumps, RECORDS)))
    assert check_data(folder / "data.jsonl", str(folder)).counts["samples"] == 3
    Image.new("RGB", (4, 4)).save(folder / "b.jpg")
