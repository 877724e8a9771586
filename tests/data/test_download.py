"""The training sets are downloaded from a fake server, unpacked and verified."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from tests.eval.fake_hub import FakeHub, serve
from tests.eval.hub_schemas import picture
from tinyllava_switchkd.data import download
from tinyllava_switchkd.data.download import TrainingSet, main

REPO = Path(__file__).parents[2]
CAPTIONS = {f"{number:05d}/{number:09d}.jpg": picture(number)["bytes"] for number in range(4)}
MIX = [f"coco/train2017/{number:012d}.jpg" for number in range(3)] + ["vg/VG_100K/1.jpg", "vg/VG_100K_2/1.jpg"]


def record(number: int, image: str | None) -> dict:
    turns = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "That."}]
    return {"id": str(number), **({"image": image} if image else {}), "conversations": turns}


def write_zip(path: Path, members: dict[str, bytes]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """A server with small training sets under the real names."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    with serve(tmp_path / "server") as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        pretrain = server.folder("liuhaotian/LLaVA-Pretrain")
        captions = [record(number, image) for number, image in enumerate(CAPTIONS)]
        (pretrain / "blip_laion_cc_sbu_558k.json").write_text(json.dumps(captions))
        write_zip(pretrain / "images.zip", CAPTIONS)
        mix = [record(number, image) for number, image in enumerate([*MIX, None, MIX[0]])]
        folder = server.folder("liuhaotian/LLaVA-Instruct-150K")
        (folder / "llava_v1_5_mix665k.json").write_text(json.dumps(mix))
        write_zip(
            server.root / "train2017.zip", {f"train2017/{Path(name).name}": picture(name)["bytes"] for name in MIX[:3]}
        )
        write_zip(server.root / "vg" / "images.zip", {"VG_100K/1.jpg": picture("a")["bytes"]})
        write_zip(server.root / "other" / "images.zip", {"VG_100K_2/1.jpg": picture("b")["bytes"]})
        sets = {
            "pretrain": replace(download.TRAINING_SETS["pretrain"], records=4),
            "finetune": TrainingSet(
                "LLaVA-Mix-665K",
                "liuhaotian/LLaVA-Instruct-150K/llava_v1_5_mix665k.json",
                7,
                "",
                {
                    "coco/train2017": (f"{server.url}/train2017.zip",),
                    "vg/VG_100K": (f"{server.url}/vg/images.zip",),
                    "vg/VG_100K_2": (f"{server.url}/other/images.zip",),
                },
            ),
        }
        monkeypatch.setattr(download, "TRAINING_SETS", sets)
        yield server


def run(tmp_path: Path, *arguments: str) -> int:
    return main([*arguments, "--data-dir", str(tmp_path / "data"), "--workers", "1"])


def test_pretraining_data(hub: FakeHub, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    hub.cuts["images.zip"] = 10
    assert run(tmp_path, "pretrain", "--only", "llava") == 0  # by its name below the data folder
    images = tmp_path / "data" / "llava" / "llava_pretrain" / "images"
    assert {path.relative_to(images).as_posix(): path.read_bytes() for path in images.rglob("*.jpg")} == CAPTIONS
    assert "4 records" in capsys.readouterr().out
    assert not list((tmp_path / "data" / ".downloads").rglob("*.zip"))  # unpacked, so no longer needed


def test_fine_tuning_data_in_tinyllavas_tree(hub: FakeHub, tmp_path: Path) -> None:
    assert run(tmp_path, "finetune", "--keep-archives") == 0
    for image in MIX:
        assert (tmp_path / "data" / image).is_file()
    # Two archives are called images.zip; they must not be taken for one another.
    assert (tmp_path / "data" / "vg/VG_100K/1.jpg").read_bytes() == picture("a")["bytes"]
    assert (tmp_path / "data" / "vg/VG_100K_2/1.jpg").read_bytes() == picture("b")["bytes"]
    hub.requests.clear()
    assert run(tmp_path, "finetune") == 0 and not hub.requests


def test_lost_and_broken_images_are_found_and_come_back(
    hub: FakeHub, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert run(tmp_path, "finetune") == 0
    lost, broken = tmp_path / "data" / MIX[0], tmp_path / "data" / MIX[3]
    lost.unlink()
    broken.write_bytes(broken.read_bytes()[:90])
    capsys.readouterr()
    assert run(tmp_path, "finetune", "--check") == 1
    output = capsys.readouterr()
    assert f"error: {lost} missing" in output.err and f"error: {broken} doesn't decode" in output.err
    listed = tmp_path / "data" / "text_files" / "llava_v1_5_mix665k.bad_images.txt"
    assert str(listed) in output.err and len(listed.read_text().splitlines()) == 2
    assert run(tmp_path, "finetune", "--check", "--no-decode", "--only", "vg") == 0
    broken.unlink()
    assert run(tmp_path, "finetune") == 0 and not listed.exists()


def test_archive_that_lacks_an_image_is_followed_by_the_next(hub: FakeHub, tmp_path: Path, monkeypatch) -> None:
    write_zip(hub.folder("weizhiwang/llava_v15_instruction_images") / "ocr.zip", {"ocr/1.jpg": b"one"})
    write_zip(hub.folder("qnguyen3/ocr_vqa") / "ocr_vqa.zip", {"images/1.jpg": b"other", "images/2.jpg": b"two"})
    archives = ("weizhiwang/llava_v15_instruction_images/ocr.zip", "qnguyen3/ocr_vqa/ocr_vqa.zip")
    folder, names = tmp_path / "ocr_vqa/images", ["1.jpg", "2.jpg", "3.jpg"]
    lacking = download.get_images(folder, names, archives, tmp_path / "downloads", keep=False)
    assert lacking == ["3.jpg"]
    assert [(tmp_path / "ocr_vqa/images" / name).read_bytes() for name in ("1.jpg", "2.jpg")] == [b"one", b"two"]
    assert len(list((tmp_path / "downloads").rglob("*.zip"))) == 2  # kept while something is missing


def test_one_dead_site_does_not_stop_the_others(hub: FakeHub, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (hub.root / "train2017.zip").unlink()
    assert run(tmp_path, "finetune") == 1
    assert "coco/train2017: " in capsys.readouterr().err
    assert (tmp_path / "data" / "vg/VG_100K/1.jpg").is_file()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (json.dumps([record(0, None)]), "has 1 records, not 7; delete it and run again"),
        (json.dumps([record(0, "flickr/1.jpg")]), "Record 0 of .*the image 'flickr/1.jpg' is in none of the known"),
        (json.dumps([record(0, "coco/train2017/../../x.jpg")]), "is in none of the known folders"),
        ('[{"id": "0", "conv', "is not JSON"),
    ],
)
def test_json_that_is_not_the_training_set(
    text: str, message: str, hub: FakeHub, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    path = tmp_path / "data" / "text_files" / "llava_v1_5_mix665k.json"
    path.parent.mkdir(parents=True)
    path.write_text(text)
    assert run(tmp_path, "finetune") == 1
    assert re.search(message, capsys.readouterr().err)


def test_check_without_data_and_unknown_folder(hub: FakeHub, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert run(tmp_path, "finetune", "--check") == 1
    assert "llava_v1_5_mix665k.json is missing; get it with" in capsys.readouterr().err
    assert run(tmp_path, "finetune", "--only", "flickr") == 1
    assert "There is no folder 'flickr' among coco/train2017" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("script", "command"),
    [
        ("prepare_pretrain", "-m tinyllava_switchkd.data.download pretrain --data_dir {} --check"),
        ("prepare_finetune", "-m tinyllava_switchkd.data.download finetune --data_dir {} --check"),
        ("prepare_eval", "-m tinyllava_switchkd.eval.prepare all --check --eval_dir {}"),
    ],
)
def test_scripts_call_the_commands(script: str, command: str, tmp_path: Path) -> None:
    bash = shutil.which("bash")
    if bash is None:
        pytest.skip("there is no bash")
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\necho "$PYTHONPATH" "$@"\n')
    python.chmod(0o755)
    environment = {"PYTHON": str(python), "DATA_DIR": "/my data", "EVAL_DIR": "/my data", "PATH": os.environ["PATH"]}
    arguments = [bash, str(REPO / "scripts" / "data" / f"{script}.sh"), "--check"]
    done = subprocess.run(arguments, env=environment, capture_output=True, text=True, cwd=tmp_path, check=True)
    assert done.stdout == f"{REPO} {command.format('/my data')}\n"


def test_eval_script_for_real(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHON": sys.executable, "EVAL_DIR": str(tmp_path)}
    script = str(REPO / "scripts" / "data" / "prepare_eval.sh")
    done = subprocess.run(["bash", script, "pope", "--check"], env=environment, capture_output=True, text=True)
    assert done.returncode == 1 and f"POPE (test): NOT COMPLETE, {tmp_path / 'pope'}" in done.stdout


def test_official_sets() -> None:
    assert [download.TRAINING_SETS[name].records for name in ("pretrain", "finetune")] == [558_128, 665_298]
    assert list(download.TRAINING_SETS["finetune"].images) == [
        "coco/train2017",
        "gqa/images",
        "ocr_vqa/images",
        "textvqa/train_images",
        "vg/VG_100K",
        "vg/VG_100K_2",
    ]
