"""Downloads that resume, archives, and data sets of the hub."""

from __future__ import annotations

import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.eval.fake_hub import COMMIT, FakeHub, serve
from tinyllava_switchkd.data.image_files import image_problem
from tinyllava_switchkd.fetch import (
    SourceError,
    download,
    extract,
    hub_folder,
    parquet_rows,
    split_files,
)

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
    monkeypatch.setattr("tinyllava_switchkd.fetch.IDLE_ATTEMPTS", 0)  # the first process ends at once
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


@pytest.mark.parametrize("kind", ["zip", "tar.gz"])
def test_extract_takes_what_is_wanted(kind: str, tmp_path: Path) -> None:
    path = tmp_path / f"a.{kind}"
    members = {"images/x/1.jpg": b"x1", "images/y/1.jpg": b"y1", "images/2.jpg": b"2"}
    if kind == "zip":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("images/", "")
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


def test_parquet_files_of_a_split(tmp_path: Path) -> None:
    files = (
        "data/test-00000-of-00002.parquet",
        "data/test-00001-of-00002.parquet",
        "data/testdev-00000-of-00001.parquet",
        "cn/dev-00000-of-00001.parquet",
        "en/dev-00000-of-00001.parquet",
        "ScienceQA-FULL/test/0000.parquet",
    )
    for name in files:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()

    def found(*arguments: str) -> list[str]:
        paths = {path for pattern in split_files(*arguments) for path in tmp_path.glob(pattern)}
        return sorted(path.relative_to(tmp_path).as_posix() for path in paths)

    assert found("test") == [*files[:2]]
    assert found("testdev") == [files[2]]
    assert found("dev", "cn") == [files[3]]
    assert found("dev", "*") == [*files[3:5]]
    assert found("test", "ScienceQA-FULL") == [files[5]]
    assert found("test", "cn") == []


def test_hub_without_a_connection_gives_the_cached_copy(site: FakeHub, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_ENDPOINT", site.url)
    for name in ("data.txt", "more.txt"):
        (site.folder("a/b") / name).write_text("text")
    name, folder = hub_folder(["a/none", "a/b"], ["data.*"])
    assert (name, folder.name) == ("a/b", COMMIT)
    assert (folder / "data.txt").read_text() == "text" and not (folder / "more.txt").exists()
    _, own = hub_folder(["a/b"], ["more.txt"], to=tmp_path / "own")
    assert own == tmp_path / "own" and (own / "more.txt").read_text() == "text"

    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert hub_folder(["a/b"], ["data.*"]) == (name, folder)
    with pytest.raises(SourceError, match="the hub can't be reached"):
        hub_folder(["a/none"], ["*"])


def test_data_set_that_is_nowhere(site: FakeHub, monkeypatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_ENDPOINT", site.url)
    with pytest.raises(
        SourceError, match=r"a/none: not on the hub, or not for your account \(404\); no such folder/x/y"
    ):
        hub_folder(["a/none", "no such folder/x/y"], ["*"])


def test_damaged_parquet_file_and_image(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    with pytest.raises(ValueError, match=r"a\.parquet is not a readable parquet file"):
        list(parquet_rows([tmp_path / "a.parquet"]))
    assert "not an image that Pillow can read" in image_problem(b"GIF?")
