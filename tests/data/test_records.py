"""Records: the same as json.load, without its memory; errors name the place in a malformed file."""

import json
import pickle

import pytest

from tinyllava_switchkd.data import records as module
from tinyllava_switchkd.data.records import Records


def sample(index, words=3, image=None, text="word "):
    record = {
        "id": index,
        "conversations": [
            {"from": "human", "value": text * words},
            {"from": "gpt", "value": 'A "quoted" \\ back\nslash'},
        ],
    }
    return record | ({"image": image} if image is not None else {})


RECORDS = [
    sample(0, image="a.jpg"),
    sample(1),
    sample("zwei ä", image=["a.jpg", "b.jpg"], text="猫 "),
    sample(3, words=400, text="naïve 🐈 "),
    sample(4, words=0),
]


@pytest.mark.parametrize("ascii_only", [True, False])
@pytest.mark.parametrize("layout", ["list", "indented", "lines"])
@pytest.mark.parametrize("window", [7, 64, 1 << 20])
def test_reads_what_json_reads(tmp_path, monkeypatch, layout, ascii_only, window):
    monkeypatch.setattr(module, "_WINDOW", window)
    path = tmp_path / "data.json"
    if layout == "lines":
        text = "\n\n".join(json.dumps(record, ensure_ascii=ascii_only) for record in RECORDS) + "\n"
    else:
        text = json.dumps(RECORDS, ensure_ascii=ascii_only, indent=2 if layout == "indented" else None)
    path.write_text(text, encoding="utf-8")
    seen = {}
    records = Records(path, visit=seen.__setitem__)
    assert list(records) == RECORDS
    assert seen == dict(enumerate(RECORDS))
    assert records[-1] == RECORDS[-1]
    assert records.words.tolist() == [
        sum(len(turn["value"].split()) for turn in record["conversations"]) for record in RECORDS
    ]
    assert records.num_images.tolist() == [1, 0, 2, 0, 0]
    again = pickle.loads(pickle.dumps(records))
    assert list(again) == RECORDS
    with pytest.raises(IndexError):
        records[len(RECORDS)]


def test_byte_order_mark(tmp_path):
    path = tmp_path / "data.json"
    path.write_text(json.dumps(RECORDS, ensure_ascii=False), encoding="utf-8-sig")
    assert list(Records(path)) == RECORDS


GOOD = json.dumps(sample(0))


@pytest.mark.parametrize(
    "text, match",
    [
        ("", "holds no record"),
        ("[]", "holds no record"),
        ("   \n", "holds no record"),
        (f"[{GOOD}", "cut off"),
        (f"[{GOOD},", "cut off"),
        (f"[{GOOD}, {GOOD[:-30]}", f"record 1, at byte {len(GOOD) + 3}, is not JSON"),
        (f"[{GOOD} {GOOD}]", "a comma or the end of the list should follow record 0"),
        (f"[{GOOD}, {GOOD[:-2]}é", rf"\(at byte {2 * len(GOOD) + 1}\)"),
        (f"[{GOOD}\u00a0, {GOOD}]", rf"should follow record 0 at byte {len(GOOD) + 1}, not '\\xa0'"),
        (f"[\u3000{GOOD}]", r"record 0, at byte 1, is not an object but begins with '\\u3000'"),
        (f"[{GOOD}] x", "continues after the end"),
        (f"[{GOOD}, 3]", "record 1.*begins with '3'"),
        (f"{GOOD}\n{{'id': 1}}", "record 1.*is not JSON: Expecting property name"),
        ('"text"', "is not an object"),
        ('{"data": [' + GOOD + "]}", "Record 0 of .*'conversations' must be a list"),
        ('[{"id": 1, "conversations": [{"from": "human"}]}]', "Record 0 .*'conversations'"),
        ('[{"id": 1, "conversations": [{"from": "human", "value": null}]}]', "Record 0 .*'conversations'"),
        (json.dumps([sample(0), sample(1, image=3)]), "Record 1 .*'image' must be a file name or a list"),
        (json.dumps([sample(0, image=[""])]), "'image' must be a file name"),
    ],
)
def test_malformed(tmp_path, text, match):
    path = tmp_path / "data.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=match) as error:
        Records(path)
    assert str(path) in str(error.value)


def test_wrong_encoding(tmp_path):
    path = tmp_path / "data.json"
    path.write_bytes(json.dumps(RECORDS, ensure_ascii=False).encode("utf-16"))
    with pytest.raises(ValueError, match="UTF-8"):
        Records(path)


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"There is no data file .*nowhere.json"):
        Records(tmp_path / "nowhere.json")
