"""Bad data files are refused before training, in one sentence that names the record."""

from __future__ import annotations

import json

import pytest

from tests.data.conftest import RECORDS, data_args
from tests.data.tokenizers import qwen2
from tinyllava_switchkd.data import check_data, make_supervised_data_module
from tinyllava_switchkd.train.check_data import main

GOOD = RECORDS[0]
TURNS = GOOD["conversations"]


def but(**changes: object) -> dict[str, object]:
    return {**GOOD, **changes}


def turns(*values: object) -> list[dict[str, object]]:
    return [{"from": ("human", "gpt")[index % 2], "value": value} for index, value in enumerate(values)]


RECORDS_REFUSED = {
    "not an object": (["a text"], "record 1"),
    "a number": ([3], "record 1"),
    "null": ([None], "record 1"),
    "a list": ([[GOOD]], "record 1"),
    "no conversations": ([{"id": "x"}], "conversations"),
    "conversations of another type": ([but(conversations="hello")], "conversations"),
    "conversations as an object": ([but(conversations={"from": "human", "value": "a"})], "conversations"),
    "conversations as a number": ([but(conversations=7)], "conversations"),
    "turns that are texts": ([but(conversations=["a", "b"])], "conversations"),
    "a turn without value": ([but(conversations=[{"from": "human"}, TURNS[1]])], "conversations"),
    "a value that is a number": ([but(conversations=turns("<image>", 3))], "conversations"),
    "a value that is null": ([but(conversations=turns("<image>", None))], "conversations"),
    "a value that is a list": ([but(conversations=turns("<image>", ["a"]))], "conversations"),
    "a turn without from": ([but(conversations=[{"value": "<image>"}, TURNS[1]])], "'from' and 'value'"),
    "no turn": ([but(conversations=[])], "0 turns"),
    "an unknown speaker": ([but(conversations=[TURNS[0], {"from": "bot", "value": "a"}])], "'bot'"),
    "a speaker that is a number": ([but(conversations=[TURNS[0], {"from": 1, "value": "a"}])], "from 1"),
    "two questions": ([but(conversations=[TURNS[0], TURNS[0]])], "Turn 2"),
    "a question alone": ([but(conversations=TURNS[:1])], "1 turns"),
    "an open end": ([but(conversations=[*TURNS, TURNS[0]])], "3 turns"),
    "a system turn in the middle": (
        [but(conversations=[*TURNS, {"from": "system", "value": "x"}, *TURNS])],
        "'system'",
    ),
    "roles of another format": ([{"id": 1, "conversations": [{"role": "user", "content": "a"}]}], "conversations"),
    "messages of another format": ([{"id": 1, "messages": [{"role": "user", "content": "a"}]}], "conversations"),
    "no place for the image": ([but(conversations=turns("What?", "a"))], "1 image"),
    "two places for one image": ([but(conversations=turns("<image> a", "b", "<image> c", "d"))], "2 <image>"),
    "an image that is a number": ([but(image=3)], "'image'"),
    "an image that is an object": ([but(image={"path": "a/red.png"})], "'image'"),
    "an image that is true": ([but(image=True)], "'image'"),
    "an image without a name": ([but(image="")], "'image'"),
    "a list of images with a null": ([but(image=["a/red.png", None])], "'image'"),
    "a list in a list": ([but(image=[["a/red.png"]])], "'image'"),
    "half a character in an answer": ([but(conversations=turns("<image>", "a \ud83d b"))], "surrogate"),
    "half a character in a question": ([but(conversations=turns("<image> \udc00", "a"))], "surrogate"),
    "half characters in the wrong order": ([but(conversations=turns("<image>", "\ude00\ud83d"))], "surrogate"),
}


@pytest.mark.parametrize("kind", RECORDS_REFUSED)
def test_records(folder, kind, capsys):
    records, word = RECORDS_REFUSED[kind]
    (folder / "data.json").write_text(json.dumps([GOOD, *records]))
    report = check_data(folder / "data.json", str(folder))
    assert not report.ok and word in str(report) and "1" in str(report)
    with pytest.raises(ValueError) as error:
        make_supervised_data_module(qwen2(), data_args(folder))
    message = str(error.value)
    assert word in message and "\n" not in message and str(folder / "data.json") in message
    assert main([str(folder / "data.json"), "--image_folder", str(folder)]) == 1
    assert "Traceback" not in "".join(capsys.readouterr())


LINE = json.dumps(GOOD).encode()
FILES_REFUSED = {
    "empty": (b"", "no record"),
    "white": (b" \n\n", "no record"),
    "an empty list": (b"[]", "no record"),
    "an object": (b"{}", "conversations"),
    "a text": (b"hello", "not an object"),
    "null": (b"null", "not an object"),
    "a list that is not closed": (b"[" + LINE, "cut off"),
    "a record that is cut off": (b"[" + LINE[:-5], "not JSON"),
    "a comma too many": (b"[" + LINE + b",]", "not an object"),
    "a comma missing": (b"[" + LINE + LINE + b"]", "comma"),
    "something after the end": (b"[" + LINE + b"] x", "continues"),
    "two lists": (b"[" + LINE + b"][" + LINE + b"]", "continues"),
    "single quotes": (b"[{'id': 1}]", "not JSON"),
    "a comment": (b"[" + LINE + b", // more\n" + LINE + b"]", "not an object"),
    "UTF-16": (("[" + LINE.decode() + "]").encode("utf-16"), "UTF-8"),
    "Latin-1": (b'[{"id": "\xe9"}]', "UTF-8"),
    "a control character": (b'[{"id": "a\x01b"}]', "not JSON"),
    "deep nesting": (b'[{"id": ' + b"[" * 200_000 + b"]" * 200_000 + b"}]", "nested too deeply"),
    "deep nesting of objects": (b'[{"a":' + b'{"a":' * 200_000 + b"1" + b"}" * 200_001 + b"]", "nested too deeply"),
    "a number of 5000 digits": (b'[{"id": ' + b"9" * 5000 + b"}]", "cannot be read"),
    "a picture": (b"\x89PNG\r\n\x1a\n" + b"\0" * 64, "UTF-8"),
    "a spreadsheet": (b"PK\x03\x04" + b"\0" * 64, "not an object"),
    "CSV": (b"id,image\n1,a.png\n", "not an object"),
    "a lines file with a bad line": (LINE + b"\n" + LINE[:20] + b"\n" + LINE, "record 1"),
}


@pytest.mark.parametrize("kind", FILES_REFUSED)
def test_files(folder, kind):
    content, word = FILES_REFUSED[kind]
    (folder / "data.json").write_bytes(content)
    report = check_data(folder / "data.json", str(folder))
    assert list(report.problems) == ["data file that cannot be read"] and word in str(report)
    with pytest.raises(ValueError, match=r"data\.json") as error:
        make_supervised_data_module(qwen2(), data_args(folder))
    assert word in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["nowhere.json", "a", ""])
def test_a_file_that_does_not_exist(folder, name):
    with pytest.raises(FileNotFoundError, match="There is no data file"):
        make_supervised_data_module(qwen2(), data_args(folder, data_path=str(folder / name)))
