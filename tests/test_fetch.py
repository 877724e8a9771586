"""Downloads that resume, archives, and files that are whole or not there."""

from __future__ import annotations

import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tinyllava_switchkd.fetch import (
    HubDataset,
    SourceError,
    atomic_file,
    download,
    extract,
    image_problem,
    open_hub_dataset,
    parquet_rows,
    write_jsonl,
)

from .eval.fake_hub import FakeHub, serve

DATA = bytes(range(256)) * 40


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    (tmp_path / "server").mkdir()
    (tmp_path / "server" / "a.bin").write_bytes(DATA)
    with serve(tmp_path / "server") as hub:
        yield hub


def test_download_once(site: FakeHub, tmp_path: Path) -> None:
    target = tmp_path / "new" / "a.bin"
    assert download(f"{site.url}/a.bin", target) == target
    assert target.read_bytes() == DATA
    download(f"{site.url}/a.bin", target)
    assert site.gets("a.bin") == [None]
    assert [path.name for path in target.parent.iterdir()] == ["a.bin"]


def test_download_continues(site: FakeHub, tmp_path: Path) -> None:
    site.cuts["a.bin"] = 3000
    assert download(f"{site.url}/a.bin", tmp_path / "a.bin").read_bytes() == DATA
    assert site.gets("a.bin") == [None, "bytes=3000-"]


def test_download_of_an_earlier_process_continues(site: FakeHub, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("tinyllava_switchkd.fetch.IDLE_ATTEMPTS", 0)  # the first process dies with the line
    site.cuts["a.bin"] = 3000
    with pytest.raises(SourceError, match=r"run again to continue from a\.bin\.part"):
        download(f"{site.url}/a.bin", tmp_path / "a.bin")
    assert not (tmp_path / "a.bin").exists()
    assert download(f"{site.url}/a.bin", tmp_path / "a.bin").read_bytes() == DATA
    assert site.gets("a.bin") == [None, "bytes=3000-"]


def test_parts_of_two_versions_are_never_joined(site: FakeHub, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("tinyllava_switchkd.fetch.IDLE_ATTEMPTS", 0)
    site.cuts["a.bin"] = 3000
    with pytest.raises(SourceError):
        download(f"{site.url}/a.bin", tmp_path / "a.bin")
    (site.root / "a.bin").write_bytes(DATA[::-1])
    assert download(f"{site.url}/a.bin", tmp_path / "a.bin").read_bytes() == DATA[::-1]


def test_part_that_is_longer_than_the_file_is_dropped(site: FakeHub, tmp_path: Path) -> None:
    site.cuts["a.bin"] = 3000
    download(f"{site.url}/a.bin", tmp_path / "first.bin")
    part = tmp_path / "a.bin.part"
    part.write_bytes(DATA + b"more")
    (tmp_path / "a.bin.part.tag").write_text("anything")
    assert download(f"{site.url}/a.bin", tmp_path / "a.bin").read_bytes() == DATA


def test_missing_file_and_dead_server(site: FakeHub, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="answers 404"):
        download(f"{site.url}/b.bin", tmp_path / "b.bin")
    with pytest.raises(SourceError, match="can't be downloaded"):
        download("http://127.0.0.1:9/b.bin", tmp_path / "b.bin")


def test_interrupted_write_leaves_nothing(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("old")
    with pytest.raises(RuntimeError), atomic_file(path) as file:
        file.write(b"half")
        raise RuntimeError
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_jsonl_keeps_text_readable(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", [{"text": "图"}, {"text": "a\nb"}])
    assert (tmp_path / "a.jsonl").read_text(encoding="utf-8") == '{"text": "图"}\n{"text": "a\\nb"}\n'


@pytest.mark.parametrize("kind", ["zip", "tar.gz"])
def test_extract_takes_what_is_wanted(kind: str, tmp_path: Path) -> None:
    path = tmp_path / f"a.{kind}"
    members = {"images/x/1.jpg": b"x1", "images/y/1.jpg": b"y1", "images/2.jpg": b"2"}
    if kind == "zip":
        with zipfile.ZipFile(path, "w") as archive:
            archive.mkdir("images")
            for name, data in members.items():
                archive.writestr(name, data)
    else:
        for name, data in members.items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_bytes(data)
        with tarfile.open(path, "w:gz") as archive:
            archive.add(tmp_path / "images", "images")

    out = tmp_path / "out"
    wanted = {name: out / name for name in ("x/1.jpg", "y/1.jpg", "3.jpg")}
    assert extract(path, wanted) == ["3.jpg"]
    assert (out / "x/1.jpg").read_bytes() == b"x1" and (out / "y/1.jpg").read_bytes() == b"y1"
    assert not (out / "2.jpg").exists()
    (out / "x/1.jpg").write_bytes(b"mine")
    extract(path, wanted)
    assert (out / "x/1.jpg").read_bytes() == b"mine"


def test_damaged_archives(tmp_path: Path) -> None:
    wanted = {"1.txt": tmp_path / "1.txt"}
    with pytest.raises(FileNotFoundError, match="no archive"):
        extract(tmp_path / "none.zip", wanted)
    page = tmp_path / "page.zip"
    page.write_text("<html>404</html>")
    with pytest.raises(ValueError, match=r"page\.zip is neither a zip nor a tar archive; delete it"):
        extract(page, wanted)
    torn = tmp_path / "torn.zip"
    with zipfile.ZipFile(torn, "w") as archive:
        archive.writestr("1.txt", b"0123456789" * 100)
    data = bytearray(torn.read_bytes())
    data[200] ^= 255
    torn.write_bytes(data)
    with pytest.raises(ValueError, match=r"torn\.zip is damaged"):
        extract(torn, wanted)
    assert not wanted["1.txt"].exists()


def test_parquet_files_of_a_split() -> None:
    files = (
        "README.md",
        "data/test-00000-of-00002.parquet",
        "data/test-00001-of-00002.parquet",
        "data/testdev-00000-of-00001.parquet",
        "cn/dev-00000-of-00001.parquet",
        "en/dev-00000-of-00001.parquet",
        "ScienceQA-FULL/test/0000.parquet",
    )
    dataset = HubDataset("a/b", "1", files)
    assert dataset.parquet("test") == list(files[1:3])
    assert dataset.parquet("testdev") == [files[3]]
    assert dataset.parquet("dev", "cn") == [files[4]]
    assert dataset.parquet("dev", "*") == list(files[4:6])
    assert dataset.parquet("test", "ScienceQA-FULL") == [files[6]]
    with pytest.raises(SourceError, match="a/b has no parquet files for configuration 'cn', split 'test'"):
        dataset.parquet("test", "cn")


def test_hub_without_a_connection_gives_the_cached_copy(site: FakeHub, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_ENDPOINT", site.url)
    (site.folder("a/b") / "data.txt").write_text("text")
    online = open_hub_dataset(["a/none", "a/b"])
    assert online.repo_id == "a/b" and online.fetch("data.txt").read_text() == "text"
    with pytest.raises(SourceError, match=r"other\.txt of a/b can't be downloaded"):
        online.fetch("other.txt")

    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    (tmp_path / "cache" / "datasets--a--b" / "refs").mkdir(exist_ok=True)
    (tmp_path / "cache" / "datasets--a--b" / "refs" / "main").write_text(online.revision)
    cached = open_hub_dataset(["a/b"])
    assert cached.revision == online.revision and cached.fetch("data.txt").read_text() == "text"
    with pytest.raises(SourceError, match="the hub can't be reached"):
        open_hub_dataset(["a/none"])


def test_data_set_that_is_nowhere(site: FakeHub, monkeypatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_ENDPOINT", site.url)
    with pytest.raises(
        SourceError, match=r"a/none: not on the hub, or not for your account \(404\); no such folder/x/y"
    ):
        open_hub_dataset(["a/none", "no such folder/x/y"])


def test_damaged_parquet_file_and_image(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    with pytest.raises(ValueError, match=r"a\.parquet is not a readable parquet file"):
        list(parquet_rows([tmp_path / "a.parquet"]))
    assert "cannot identify image" in image_problem(b"GIF?")
