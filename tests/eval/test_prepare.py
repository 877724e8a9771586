"""Evaluation data are built from a stand-in hub and scored: converting there and back must not change a score."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.eval.fake_hub import FakeHub, serve
from tests.eval.hub_rows import BENCHMARKS, read_json, read_jsonl, read_tsv
from tests.eval.hub_schemas import picture, write_parquet
from tests.eval.scorers import answer_rows, data_dir, write_rows
from tinyllava_switchkd.eval.benchmarks import BENCHMARKS as ORDER
from tinyllava_switchkd.eval.benchmarks import (
    BenchmarkFactory,
    gqa,
    mmbench,
    mmmu,
    pope,
    scienceqa,
    textvqa,
    vizwiz,
    vqav2,
)
from tinyllava_switchkd.eval.benchmarks.build import Build
from tinyllava_switchkd.eval.prepare import main
from tinyllava_switchkd.eval.score import score_file

QUESTIONS = {
    "mme": "llava_mme.jsonl",
    "vqav2": "llava_vqav2_mscoco_val2014.jsonl",
    "gqa": "llava_gqa_testdev_balanced.jsonl",
    "textvqa": "llava_textvqa_val_v051_ocr.jsonl",
    "vizwiz": "llava_val.jsonl",
    "pope": "llava_pope_test.jsonl",
}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """A stand-in hub, without the real one's cache or settings."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    with serve(tmp_path / "server") as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        yield server


def publish(hub: FakeHub, name: str, repo_id: str | None = None) -> None:
    """Put a benchmark's fixture on the hub, in the hub's schema."""
    _, known_id, rows_of = BENCHMARKS[name]
    for file, (schema, rows) in rows_of(data_dir(name)).items():
        write_parquet(hub.folder(repo_id or known_id) / file, schema, rows)


def prepare(tmp_path: Path, *arguments: str) -> int:
    return main([*arguments, "--eval_dir", str(tmp_path / "eval"), "--any_count"])


def assert_same_score(name: str, folder: Path, answers: Path) -> None:
    """The prepared folder scores as the fixture does, in every detail (sums may run in another order)."""
    found = score_file(name, folder, answers).to_dict()
    wanted = score_file(name, data_dir(name), data_dir(name) / "answers.jsonl").to_dict()
    found, wanted = dict(leaves(found)), dict(leaves(wanted))
    assert found.keys() == wanted.keys()
    for place, value in wanted.items():
        assert found[place] == (pytest.approx(value, abs=1e-9) if isinstance(value, float) else value), place


def leaves(value: Any, place: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from leaves(inner, f"{place}/{key}")
    else:
        yield place, value


@pytest.mark.parametrize("name", ORDER)
def test_data_from_the_hub_score_as_the_original(name: str, hub: FakeHub, tmp_path: Path) -> None:
    publish(hub, name)
    assert prepare(tmp_path, name, "--source", "hf") == 0
    folder = tmp_path / "eval" / BENCHMARKS[name][0]

    answers = answer_rows(name)
    if name == "scienceqa":  # the hub has no ids: questions are numbered
        order = read_json(data_dir(name) / "pid_splits.json")["test"]
        answers = [{**row, "question_id": str(order.index(row["question_id"]) + 1)} for row in answers]
    file = write_rows(tmp_path / "answers.jsonl", answers)
    assert_same_score(name, folder, file)

    questions = list(BenchmarkFactory(name).questions(folder))
    assert questions and all(question.prompt for question in questions)
    images = [question.image for question in questions if isinstance(question.image, Path)]
    assert all(image.is_file() for image in images) and (images or name.startswith("mmbench"))
    provenance = read_json(folder / "prepared.json")
    assert provenance[BenchmarkFactory(name).prepared_splits[0]]["repo_id"] == BENCHMARKS[name][1]


@pytest.mark.parametrize("name", QUESTIONS)
def test_question_files_are_llavas(name: str, hub: FakeHub, tmp_path: Path) -> None:
    publish(hub, name)
    assert prepare(tmp_path, name, "--source", "hf") == 0
    folder = tmp_path / "eval" / BENCHMARKS[name][0]
    assert read_jsonl(folder / QUESTIONS[name]) == read_jsonl(data_dir(name) / QUESTIONS[name])


@pytest.mark.parametrize("name", ["mmbench", "mmbench_cn"])
def test_mmbench_keeps_its_table_and_the_option_none(name: str, hub: FakeHub, tmp_path: Path) -> None:
    """The hub's copies have "nan" both for the option "None" and for missing options."""
    publish(hub, name)
    assert prepare(tmp_path, name, "--source", "hf") == 0
    preparer = BenchmarkFactory(name)
    found = read_tsv(tmp_path / "eval" / name / preparer.file_name)
    wanted = read_tsv(data_dir(name) / preparer.file_name)
    assert found == wanted
    assert any(row[letter] == "None" for row in found for letter in "ABCD")


def test_scienceqa_has_the_text_of_llava_15() -> None:
    """Not that of LLaVA's converter, which costs points (LLaVA #1294)."""
    problems = read_json(data_dir("scienceqa") / "problems.json")
    for sample in read_json(data_dir("scienceqa") / "llava_test_CQM-A.json"):
        assert scienceqa.sample(sample["id"], problems[sample["id"]]) == sample


def test_mmmu_prompts() -> None:
    row = {"id": "validation_Art_1", "question": "Which <image 1>?", "answer": "B", "question_type": "multiple-choice"}
    sample = mmmu.question_of({**row, "options": "['a', \"the b's\"]"})
    assert sample["prompt"] == (
        "Which <image 1>?\n(A) a\n(B) the b's\n\nAnswer with the option's letter from the given choices directly."
    )
    assert sample["index2ans"] == {"A": "a", "B": "the b's"}
    sample = mmmu.question_of({**row, "question_type": "open", "options": "[]"})
    assert sample["prompt"] == "Which <image 1>?\nAnswer the question using a single word or phrase."
    with pytest.raises(ValueError, match="validation_Art_1: the options are not a list"):
        mmmu.question_of({**row, "options": "a, b"})


def test_mmmu_of_its_authors_has_a_folder_for_every_subject(hub: FakeHub, tmp_path: Path) -> None:
    [(_, (schema, rows))] = BENCHMARKS["mmmu"][2](data_dir("mmmu")).items()
    for subject in {row["id"].split("_")[1] for row in rows}:
        part = [row for row in rows if row["id"].split("_")[1] == subject]
        write_parquet(hub.folder("MMMU/MMMU") / subject / "validation-00000-of-00001.parquet", schema, part)
    assert prepare(tmp_path, "mmmu") == 0
    answers = read_json(tmp_path / "eval" / "MMMU" / "eval" / "answer_dict_val.json")
    assert answers == read_json(data_dir("mmmu") / "eval" / "answer_dict_val.json")


def test_textvqa_prompt_keeps_its_three_lines() -> None:
    text = textvqa.prompt_of("what\ndoes IT say?", ["a\nb", "C"])
    assert text == (
        "What does it say?\nReference OCR token: a b, C\nAnswer the question using a single word or phrase."
    )


def test_old_name_of_the_data_set_is_tried_after_the_new_one(hub: FakeHub, tmp_path: Path) -> None:
    publish(hub, "vizwiz", "lmms-lab/VizWiz-VQA")
    assert prepare(tmp_path, "vizwiz", "--source", "hf") == 0
    looked_up = [path.split("/")[3:5] for _, path, _ in hub.requests if path.startswith("/api/")]
    assert looked_up[:2] == [["lmms-lab-encoder", "VizWiz-VQA"], ["lmms-lab", "VizWiz-VQA"]]


def test_another_data_set_and_a_local_folder(hub: FakeHub, tmp_path: Path) -> None:
    publish(hub, "vizwiz", "someone/vizwiz")
    assert prepare(tmp_path, "vizwiz", "--repo-id", "someone/vizwiz") == 0
    hub.requests.clear()
    copy = shutil.copytree(hub.folder("someone/vizwiz"), tmp_path / "copy")
    shutil.rmtree(tmp_path / "eval")
    assert prepare(tmp_path, "vizwiz", "--repo-id", str(copy)) == 0
    assert not hub.requests


def test_download_continues_after_the_connection_broke(
    hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 500)  # only whole chunks are kept
    publish(hub, "pope")
    hub.cuts["test-00000-of-00002.parquet"] = 1000
    assert prepare(tmp_path, "pope", "--source", "hf") == 0
    assert hub.gets("test-00000-of-00002.parquet") == [None, "bytes=1000-"]


def test_second_run_does_nothing_and_a_lost_image_comes_back(hub: FakeHub, tmp_path: Path) -> None:
    publish(hub, "gqa")
    assert prepare(tmp_path, "gqa") == 0
    hub.requests.clear()
    assert prepare(tmp_path, "gqa") == 0 and not hub.requests

    images = sorted((tmp_path / "eval" / "gqa" / "data" / "images").iterdir())
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in images}
    images[0].unlink()
    assert prepare(tmp_path, "gqa", "--check") == 1
    assert prepare(tmp_path, "gqa") == 0
    assert images[0].read_bytes() == before[images[0]][0]
    assert all(path.stat().st_mtime_ns == before[path][1] for path in images[1:])  # the others were left alone


def test_image_that_does_not_decode_is_named(hub: FakeHub, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    [(file, (schema, rows))] = BENCHMARKS["vizwiz"][2](data_dir("vizwiz")).items()
    rows[3]["image"] = {"bytes": picture("x")["bytes"][:80], "path": None}
    rows[4]["image"] = None
    write_parquet(hub.folder("lmms-lab-encoder/VizWiz-VQA") / file, schema, rows)
    assert prepare(tmp_path, "vizwiz", "--source", "hf") == 1
    output = capsys.readouterr()
    assert f"val/{rows[3]['question_id']}.jpg cannot be decoded and is left out" in output.err
    assert f"val/{rows[4]['question_id']}.jpg cannot be decoded and is left out: no image data" in output.err
    assert "incomplete  val/" in output.out and "71 of 73 files" in output.out


def test_other_columns_are_an_error(hub: FakeHub, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    folder = hub.folder("lmms-lab-encoder/MME")
    write_parquet(folder / "data" / "test-00000-of-00001.parquet", "GQA-images", [{"id": "1", "image": picture(1)}])
    assert prepare(tmp_path, "mme", "--source", "hf") == 1
    assert "MME: lmms-lab-encoder/MME, split 'test', row 0 has no column question_id" in capsys.readouterr().err


def test_no_source_at_all(hub: FakeHub, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert prepare(tmp_path, "mmmu") == 1
    assert "MMMU: no source could be used. By hand: https://huggingface.co" in capsys.readouterr().err


# ------------------------------------------------------------------------------------- the authors' own files


def site(hub: FakeHub, monkeypatch: pytest.MonkeyPatch, module: object, *constants: str) -> Path:
    """Point the addresses of a module at the stand-in server; returns the folder that it serves."""
    for constant in constants:
        address = getattr(module, constant)
        last = address.rsplit("/", 1)[-1]
        monkeypatch.setattr(module, constant, f"{hub.url}/site/{last}")
    folder = hub.root / "site"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def archive(folder: Path, name: str, members: dict[str, bytes]) -> None:
    source = folder / f".{name}"
    for member, data in members.items():
        path = source / member
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    shutil.make_archive(str(folder / name.removesuffix(".zip")), "zip", source)


def same_score(name: str, tmp_path: Path) -> None:
    assert_same_score(name, tmp_path / "eval" / BENCHMARKS[name][0], data_dir(name) / "answers.jsonl")


def test_pope_labels_of_its_authors_with_images_of_the_hub(
    hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(hub, "pope")
    folder = site(hub, monkeypatch, pope, "POPE_URL")
    for path in (data_dir("pope") / "coco").iterdir():
        shutil.copy(path, folder / path.name)
    assert prepare(tmp_path, "pope") == 0
    same_score("pope", tmp_path)
    assert read_json(tmp_path / "eval" / "pope" / "prepared.json")["test"]["source"] == "official"


def test_pope_falls_back_on_the_hub(hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    publish(hub, "pope")
    site(hub, monkeypatch, pope, "POPE_URL")
    assert prepare(tmp_path, "pope") == 0
    assert read_json(tmp_path / "eval" / "pope" / "prepared.json")["test"]["source"] == "hf"


def test_mme_release_of_its_authors(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    release = "MME_Benchmark_release_version"
    shutil.copytree(data_dir("mme") / release, tmp_path / "eval" / "MME" / release)
    assert prepare(tmp_path, "mme", "--source", "official") == 0
    same_score("mme", tmp_path)
    text = tmp_path / "eval" / "MME" / release / "color" / "0020.txt"
    text.write_text("Is it? Please answer yes or no.\tYes\n")
    assert prepare(tmp_path, "mme", "--source", "official", "--force") == 1
    text.unlink()
    assert prepare(tmp_path, "mme", "--source", "official", "--force") == 1
    assert f"MME's release lacks {text}, the questions about an image; unpack it again." in capsys.readouterr().err


def test_mmbench_table_of_its_authors(hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = site(hub, monkeypatch, mmbench, "OFFICIAL_URL")
    table = data_dir("mmbench") / "mmbench_dev_20230712.tsv"
    shutil.copy(table, folder / table.name)
    assert prepare(tmp_path, "mmbench") == 0
    assert (tmp_path / "eval" / "mmbench" / table.name).read_bytes() == table.read_bytes()


def test_mmbench_under_its_other_name_is_found(tmp_path: Path) -> None:
    folder = tmp_path / "eval" / "mmbench"
    folder.mkdir(parents=True)
    shutil.copy(data_dir("mmbench") / "mmbench_dev_20230712.tsv", folder / "MMBench_DEV_EN_legacy.tsv")
    assert prepare(tmp_path, "mmbench", "--check") == 0


def test_scienceqa_of_its_authors_keeps_the_ids(hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = site(hub, monkeypatch, scienceqa, "SCIENCEQA_URL", "SCIENCEQA_IMAGES_URL")
    for name in ("problems.json", "pid_splits.json"):
        shutil.copy(data_dir("scienceqa") / name, folder / name)
    problems = read_json(folder / "problems.json")
    images = {f"test/{pid}/image.png": picture(pid, "PNG")["bytes"] for pid in problems if problems[pid]["image"]}
    archive(folder, "test.zip", images)
    assert prepare(tmp_path, "scienceqa") == 0
    same_score("scienceqa", tmp_path)
    samples = read_json(tmp_path / "eval" / "scienceqa" / "llava_test_CQM-A.json")
    assert samples == read_json(data_dir("scienceqa") / "llava_test_CQM-A.json")


def test_gqa_of_its_authors(hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = site(hub, monkeypatch, gqa, "GQA_URL")
    truth = data_dir("gqa") / "data" / "testdev_balanced_questions.json"
    archive(folder, "questions1.2.zip", {truth.name: truth.read_bytes(), "other.json": b"{}"})
    names = {row["imageId"] for row in read_json(truth).values()}
    archive(folder, "images.zip", {f"images/{name}.jpg": picture(name)["bytes"] for name in [*names, "n0"]})
    assert prepare(tmp_path, "gqa", "--source", "official") == 0
    same_score("gqa", tmp_path)
    assert {path.stem for path in (tmp_path / "eval" / "gqa" / "data" / "images").iterdir()} == names


def test_vqav2_of_its_authors_for_val_and_for_the_server(
    hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = site(hub, monkeypatch, vqav2, "VQA_URL", "COCO_URL")
    questions = data_dir("vqav2") / "v2_OpenEnded_mscoco_val2014_questions.json"
    annotations = data_dir("vqav2") / "v2_mscoco_val2014_annotations.json"
    archive(folder, "v2_Questions_Val_mscoco.zip", {questions.name: questions.read_bytes()})
    archive(folder, "v2_Annotations_Val_mscoco.zip", {annotations.name: annotations.read_bytes()})
    rows = read_json(questions)["questions"]
    images = {vqav2.coco_image("val2014", row["image_id"]) for row in rows}
    archive(folder, "val2014.zip", {f"val2014/{image}": picture(image)["bytes"] for image in images})
    assert prepare(tmp_path, "vqav2", "--source", "official") == 0
    same_score("vqav2", tmp_path)

    test = json.dumps({"questions": rows}).encode()
    test_dev = json.dumps({"questions": rows[:10]}).encode()
    members = {
        "v2_OpenEnded_mscoco_test2015_questions.json": test,
        "v2_OpenEnded_mscoco_test-dev2015_questions.json": test_dev,
    }
    archive(folder, "v2_Questions_Test_mscoco.zip", members)
    images = {vqav2.coco_image("test2015", row["image_id"]) for row in rows}
    archive(folder, "test2015.zip", {f"test2015/{image}": picture(image)["bytes"] for image in images})
    assert prepare(tmp_path, "vqav2", "--split", "test") == 0
    shown = read_jsonl(tmp_path / "eval" / "vqav2" / "llava_vqav2_mscoco_test-dev2015.jsonl")
    assert len(shown) == 10
    assert len(read_jsonl(tmp_path / "eval" / "vqav2" / "llava_vqav2_mscoco_test2015.jsonl")) == len(rows)
    found = {path.name for path in (tmp_path / "eval" / "vqav2" / "test2015").iterdir()}
    assert found == {row["image"] for row in shown}  # only test-dev is looked at


def test_vqav2_for_the_server_falls_back_on_the_hub(
    hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site(hub, monkeypatch, vqav2, "VQA_URL", "COCO_URL")  # which has nothing
    folder = hub.folder("lmms-lab/VQAv2") / "data"
    rows = [
        {"question_id": 10 * number, "image_id": number, "question": f"What {number}?", "image": picture(number)}
        for number in range(5)
    ]
    write_parquet(folder / "testdev-00000-of-00001.parquet", "VQAv2", rows[:2])
    write_parquet(folder / "test-00000-of-00001.parquet", "VQAv2", rows)
    assert prepare(tmp_path, "vqav2", "--split", "test") == 0
    root = tmp_path / "eval" / "vqav2"
    asked = read_jsonl(root / "llava_vqav2_mscoco_test-dev2015.jsonl")
    assert [row["question_id"] for row in asked] == [0, 10]
    assert asked[1]["text"] == "What 1?\nAnswer the question using a single word or phrase."
    assert len(read_jsonl(root / "llava_vqav2_mscoco_test2015.jsonl")) == 5
    assert {path.name for path in (root / "test2015").iterdir()} == {row["image"] for row in asked}


def test_archives_of_the_same_name_are_told_apart(hub: FakeHub, tmp_path: Path) -> None:
    for name in ("scienceqa", "vizwiz"):  # both have a test.zip
        archive(hub.root / name, "test.zip", {f"{name}.png": name.encode()})
        build = Build(tmp_path / name, "test", "official", (), tmp_path / ".downloads")
        build.extract(f"{hub.url}/{name}/test.zip", {f"{name}.png": build.root / "image.png"})
        assert (build.root / "image.png").read_text() == name


def test_vizwiz_and_textvqa_of_their_authors(hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    site(hub, monkeypatch, vizwiz, "VIZWIZ_URL")
    site(hub, monkeypatch, textvqa, "TEXTVQA_URL")
    folder = hub.root / "site"
    for name in ("vqa_data", "images", "data"):
        (folder / name).mkdir()
    truth = data_dir("vizwiz") / "val.json"
    archive(folder / "vqa_data", "Annotations.zip", {"Annotations/val.json": truth.read_bytes()})
    images = {f"val/{row['image']}": picture(row["image"])["bytes"] for row in read_json(truth)}
    archive(folder / "images", "val.zip", images)

    shutil.copy(data_dir("textvqa") / textvqa.TRUTH_FILE, folder / "data")
    document = read_json(data_dir("textvqa") / textvqa.TRUTH_FILE)
    ids = {row["image_id"] for row in document["data"]}
    ocr = {"data": [{"image_id": name, "ocr_tokens": [name, "EXIT"]} for name in ids]}
    (folder / "data" / textvqa.OCR_FILE).write_text(json.dumps(ocr))
    images = {f"train_images/{name}.jpg": picture(name)["bytes"] for name in ids}
    archive(folder / "images", "train_val_images.zip", images)

    assert prepare(tmp_path, "vizwiz", "textvqa", "--source", "official") == 0
    same_score("vizwiz", tmp_path)
    asked = read_jsonl(tmp_path / "eval" / "textvqa" / "llava_textvqa_val_v051_ocr.jsonl")
    assert asked[0]["text"].split("\n")[1] == f"Reference OCR token: {asked[0]['question_id']}, EXIT"


def test_vizwiz_test_split_has_no_answers(hub: FakeHub, tmp_path: Path) -> None:
    rows = [
        {"question_id": f"VizWiz_test_{number:08d}", "image": picture(number), "question": "What is it?"}
        for number in range(3)
    ]
    write_parquet(hub.folder("lmms-lab/VizWiz-VQA") / "data" / "test-00000-of-00001.parquet", "VizWiz-VQA", rows)
    assert prepare(tmp_path, "vizwiz", "--split", "test") == 0
    truth = read_json(tmp_path / "eval" / "vizwiz" / "test.json")
    assert truth[0] == {"image": "VizWiz_test_00000000.jpg", "question": "What is it?"}


# ------------------------------------------------------------------------------------------------------- doctor


def test_doctor_lists_what_is_missing_and_where_to_get_it(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["all", "--check", "--eval_dir", str(tmp_path)]) == 1
    text = capsys.readouterr().out
    assert text.count("NOT COMPLETE") == 10
    assert "missing     llava_gqa_testdev_balanced.jsonl      expected 12,578 rows" in text
    assert "python -m tinyllava_switchkd.eval.prepare gqa" in text
    assert "lmms-lab-encoder/GQA or lmms-lab/GQA" in text


def test_doctor_compares_counts(hub: FakeHub, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    publish(hub, "vizwiz")
    arguments = ["vizwiz", "--eval_dir", str(tmp_path / "eval")]
    assert main(arguments) == 1  # 73 questions are not VizWiz
    assert "count       llava_val.jsonl  73 rows, officially 4,319" in capsys.readouterr().out
    assert main([*arguments, "--check", "--any_count"]) == 0


def test_doctor_names_a_file_that_is_no_json(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    folder = tmp_path / "pope"
    folder.mkdir()
    (folder / "llava_pope_test.jsonl").write_text('{"question_id": 1}\noops\n')
    assert main(["pope", "--check", "--eval_dir", str(tmp_path)]) == 1
    output = capsys.readouterr().out
    assert "unreadable  llava_pope_test.jsonl" in output and "line 2: not valid JSON" in output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["popee"], "Unknown benchmark 'popee'"),
        (["pope", "mme", "--repo-id", "a/b"], "one at a time"),
        (["pope", "--split", "train"], "POPE has the split test, not 'train'"),
    ],
)
def test_wrong_arguments(arguments: list[str], message: str, capsys: pytest.CaptureFixture) -> None:
    assert main(arguments) == 2
    assert message in capsys.readouterr().err
