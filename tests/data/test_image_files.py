"""Image files: every mode is converted correctly, and bad files and files outside the folder are refused."""

from __future__ import annotations

import base64
import io
import os
import pickle
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from torch.utils.data import DataLoader
from transformers import CLIPImageProcessor, SiglipImageProcessor

from tests.data.bad_files import BAD_IMAGES, NOISE
from tests.data.conftest import RECORDS, data_args, write
from tests.data.tokenizers import qwen2
from tinyllava_switchkd.data import (
    BadImageError,
    DataCollatorForSupervisedDataset,
    ImagePreprocess,
    LazySupervisedDataset,
    SampleError,
    check_data,
    inspection,
    make_supervised_data_module,
    read_image,
    to_rgb,
)
from tinyllava_switchkd.data.image_files import ImageFolder, look_at
from tinyllava_switchkd.eval.batches import open_image
from tinyllava_switchkd.eval.mistakes import thumbnail
from tinyllava_switchkd.model.chat import open_image as shown_image
from tinyllava_switchkd.model.export.questions import Question
from tinyllava_switchkd.serve.images import read_image as read_upload

GREY = NOISE[..., 0]
RAMP = np.linspace(0, 1, 256, dtype=np.float32).reshape(16, 16)


@pytest.mark.parametrize(
    "values, name",
    [
        (GREY.astype(np.uint16) * 257, "16.png"),
        (GREY.astype(np.uint16) * 257, "16.tif"),
        (GREY.astype(np.int32), "32.tif"),
        (GREY.astype(np.int32) * 257, "32.tif"),
        (GREY.astype(np.float32), "float.tif"),
        (GREY.astype(np.float32) / 255, "unit.tif"),
        (GREY.astype(np.float32) * 257, "wide.tif"),
        (GREY.astype(np.float32) * 2 - 255, "signed.tif"),
        (GREY, "8.png"),
    ],
)
def test_grey_values_of_any_width_look_the_same(tmp_path, values, name):
    Image.fromarray(values).save(tmp_path / name)
    seen = np.asarray(read_image(tmp_path / name))
    assert seen.shape == (48, 64, 3)
    assert np.abs(seen.astype(int) - GREY[..., None]).max() <= 1
    assert np.array_equal(seen, np.asarray(to_rgb(Image.open(tmp_path / name))))


def test_nan_pixels_are_black(tmp_path):
    values = RAMP.copy()
    values[0, :3] = np.nan, np.inf, -np.inf
    Image.fromarray(values).save(tmp_path / "a.tif")
    seen = np.asarray(read_image(tmp_path / "a.tif"))[..., 0]
    assert (seen[0, :3] == 0).all() and seen[-1, -1] == 255 and seen[8, 0] == 128


@pytest.mark.parametrize("mode", ["1", "L", "P", "LA", "RGB", "RGBA", "CMYK"])
def test_eight_bits_are_converted_as_v1_did(tmp_path, mode):
    image = Image.fromarray(NOISE).convert(mode)
    name = tmp_path / ("a.tif" if mode == "CMYK" else "a.png")
    image.save(name)
    with Image.open(name) as opened:
        expected = np.asarray(opened.convert("RGB"))
    assert np.array_equal(np.asarray(read_image(name)), expected)


@pytest.mark.parametrize("kind", BAD_IMAGES)
def test_bad_files_are_refused_with_a_reason(tmp_path, kind):
    name, content, word = BAD_IMAGES[kind]
    if callable(content):
        content(tmp_path / name)
    else:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(BadImageError) as error:
        read_image(tmp_path / name)
    assert word.lower() in str(error.value).lower() and "\n" not in str(error.value) and str(error.value)
    with pytest.raises(BadImageError, match=f"(?i){word or '.'}"):
        open_image(tmp_path / name)
    if isinstance(content, bytes):
        with pytest.raises(BadImageError, match=f"(?i){word or '.'}"):
            open_image(content)
    (tmp_path / "b").mkdir()
    write(tmp_path, [{"id": "it", "image": name, "conversations": RECORDS[0]["conversations"]}])
    report = check_data(tmp_path / "data.json", str(tmp_path))
    cases = report.problems["image(s) that cannot be read" if not callable(content) else "image(s) that do not exist"]
    assert cases.count == 1 and name in cases.examples[0]
    with pytest.raises(ValueError, match=name):
        make_supervised_data_module(qwen2(), data_args(tmp_path))
    data = LazySupervisedDataset(str(tmp_path / "data.json"), qwen2(), data_args(tmp_path))
    with pytest.raises(SampleError, match=r"id 'it'.*Set on_bad_image to 'skip'"):
        data[0]


def test_the_error_of_a_worker_is_one_sentence(folder):
    (folder / "b.jpg").write_bytes(b"")
    data = LazySupervisedDataset(str(folder / "data.json"), qwen2(), data_args(folder))
    loader = DataLoader(data, collate_fn=DataCollatorForSupervisedDataset(qwen2()), num_workers=1)
    with pytest.raises(SampleError) as error:
        list(loader)
    message = str(error.value)
    error.value.__traceback__ = None  # it keeps the loader, for whose worker a later test would wait five seconds
    del error
    assert message == (
        f"Sample 2 (id 'two') of {folder / 'data.json'}: the image {folder / 'b.jpg'} cannot be read: it is empty "
        "(0 bytes). Set on_bad_image to 'skip' to train without such samples."
    )


def test_what_is_read_otherwise_than_it_is_shown(tmp_path):
    exif = Image.Exif()
    exif[274] = 6
    Image.fromarray(NOISE).save(tmp_path / "turned.jpg", exif=exif)
    Image.fromarray(NOISE).convert("RGBA").save(tmp_path / "opaque.png")
    Image.new("RGBA", (8, 8), (0, 0, 0, 0)).save(tmp_path / "clear.png")
    assert look_at(tmp_path / "opaque.png") == ((64, 48), None)
    records = [
        {"id": name, "image": name, "conversations": RECORDS[0]["conversations"]}
        for name in ("turned.jpg", "opaque.png", "clear.png")
    ]
    report = check_data(write(tmp_path, records), str(tmp_path))
    assert report.ok
    warnings = {kind: cases.examples for kind, cases in report.warnings.items()}
    assert [examples for kind, examples in warnings.items() if "EXIF" in kind] == [[str(tmp_path / "turned.jpg")]]
    assert [examples for kind, examples in warnings.items() if "transparency" in kind] == [
        [str(tmp_path / "clear.png")]
    ]


def test_which_images_are_decoded(folder, monkeypatch):
    assert inspection._DECODED == 256
    monkeypatch.setattr(inspection, "_DECODED", 16)
    names = [f"{index:04}.png" for index in range(40)]
    for name in names:
        (folder / name).symlink_to(folder / "a" / "red.png")
    (folder / "0001.png").unlink()
    (folder / "0001.png").write_bytes(b"")
    talk = RECORDS[0]["conversations"]
    path = write(folder, [{"id": name, "image": name, "conversations": talk} for name in names])
    counts = {decode: check_data(path, str(folder), decode=decode) for decode in ("none", "sample", "all")}
    assert [report.counts.get("images decoded") for report in counts.values()] == [None, 16, 40]
    assert [report.ok for report in counts.values()] == [True, True, False]
    with pytest.raises(ValueError, match="sample, all, none, not 'some'"):
        check_data(path, str(folder), decode="some")


class TestOutside:
    @pytest.fixture
    def two(self, folder):
        """An image folder, and another folder beside it that must not be read."""
        root = folder / "images"
        (root / "in").mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(root / "in" / "a.png")
        (root / "link.png").symlink_to(root / "in" / "a.png")
        (root / "out.png").symlink_to(folder / "a" / "red.png")
        (root / "out").symlink_to(folder / "a")
        (root / "circle").symlink_to(root / "circle")
        return root

    @pytest.mark.parametrize("name", ["in/a.png", "./in/a.png", "in/../in/a.png", "link.png"])
    def test_inside(self, two, name):
        path = ImageFolder(str(two)).path(name)
        assert os.path.samefile(path, two / "in" / "a.png")
        assert ImageFolder("/").path(str(two / name)) == str(two / name)
        os.symlink(two, two.parent / "by another name")
        ImageFolder(str(two.parent / "by another name")).path(name)

    @pytest.mark.parametrize(
        "name", ["../a/red.png", "in/../../a/red.png", "{}/a/red.png", "out.png", "out/red.png", "/etc/hostname"]
    )
    def test_outside(self, two, name):
        name = name.format(two.parent)
        with pytest.raises(BadImageError, match=r"outside the image folder.*allow_outside_images"):
            pickle.loads(pickle.dumps(ImageFolder(str(two)))).path(name)
        ImageFolder(str(two), allow_outside=True).path(name)
        args = data_args(two.parent, image_folder=str(two))
        write(two.parent, [{"id": "it", "image": name, "conversations": RECORDS[0]["conversations"]}])
        with pytest.raises(ValueError, match="outside the image folder"):
            make_supervised_data_module(qwen2(), args)
        with pytest.raises(SampleError, match=r"id 'it'.*outside the image folder"):
            LazySupervisedDataset(args.data_path, qwen2(), args)[0]
        if "red" in name or name == "out.png":
            args.allow_outside_images = True
            assert make_supervised_data_module(qwen2(), args)["train_dataset"][0]["images"].any()

    def test_a_link_to_itself_hides_no_other_file(self, two):
        path = write(two.parent, [{**RECORDS[2], "image": ["link.png", "circle"]}])
        report = check_data(path, str(two))
        assert [cases.examples for cases in report.problems.values()] == [[str(two / "circle")]]

    @pytest.mark.parametrize("name", ["a\0b.png", "\ud83d.png", "x" * 5000, "circle", "circle/a.png", "\n.png"])
    def test_names_that_no_image_has(self, two, name):
        write(two.parent, [{"id": "it", "image": name, "conversations": RECORDS[0]["conversations"]}])
        report = check_data(two.parent / "data.json", str(two))
        assert not report.ok
        str(report).encode()  # can be printed
        with pytest.raises(SampleError, match="id 'it'"):
            LazySupervisedDataset(str(two.parent / "data.json"), qwen2(), data_args(two.parent, image_folder=str(two)))[
                0
            ]


class TestShape:
    def test_thirds_of_a_wide_picture(self, caplog, monkeypatch):
        """The picture of the issue, with red, green and blue thirds; CLIP's processor shows only the green one."""
        monkeypatch.setattr(ImagePreprocess, "_warned_about_crop", False)
        image = Image.new("RGB", (90, 30), "lime")
        image.paste("red", (0, 0, 30, 30))
        image.paste("blue", (60, 0, 90, 30))
        clip = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}, do_normalize=False)
        crop = ImagePreprocess(clip)
        assert crop.kept_share(image.size) == pytest.approx(1 / 3)
        for _ in range(2):
            assert crop(image)[:, :, 4:-4].mean((1, 2)).tolist() == pytest.approx([0, 1, 0], abs=0.01)
        assert caplog.text.count("33 %") == 1 and "'pad'" in caplog.text
        for preprocess in (
            ImagePreprocess(clip, SimpleNamespace(image_aspect_ratio="pad")),
            ImagePreprocess(SiglipImageProcessor(size={"height": 32, "width": 32})),
        ):
            assert preprocess.kept_share(image.size) == 1
        caplog.clear()
        crop(Image.new("RGB", (40, 32)))
        assert not caplog.text

    @pytest.mark.parametrize("size", [(224, 224), (336, 224), (225, 224), (100, 1000)])
    def test_share_is_what_the_processor_leaves(self, size):
        """Every column has its own colour; count how many remain."""
        clip = CLIPImageProcessor(
            size={"shortest_edge": 224}, crop_size={"height": 224, "width": 224}, do_normalize=False, resample=0
        )
        wide = (max(size), min(size))
        scale = 224 / wide[1]
        ramp = np.zeros((round(wide[1] * scale), round(wide[0] * scale), 3), dtype=np.uint8)
        columns = np.arange(ramp.shape[1])
        ramp[..., 0], ramp[..., 1] = columns % 256, columns // 256
        pixels = (ImagePreprocess(clip)(Image.fromarray(ramp)) * 255).round().long()
        arrived = len(set((pixels[0, 0] + 256 * pixels[1, 0]).tolist()))
        assert ImagePreprocess(clip).kept_share(wide) == pytest.approx(arrived / ramp.shape[1], abs=0.01)

    @pytest.mark.parametrize(
        "processor, aspect, size",
        [
            (CLIPImageProcessor(), "square", (1, 60_000)),
            (CLIPImageProcessor(), "pad", (1, 60_000)),
            (SiglipImageProcessor(), "pad", (60_000, 1)),
        ],
    )
    def test_strips_that_would_take_gigabytes_are_refused(self, processor, aspect, size):
        preprocess = ImagePreprocess(processor, SimpleNamespace(image_aspect_ratio=aspect))
        with pytest.raises(ValueError, match=r"60000.* too narrow"):
            preprocess(Image.new("RGB", size))

    def test_the_start_of_a_training_counts_what_is_cropped(self, folder, caplog):
        clip = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
        make_supervised_data_module(qwen2(), data_args(folder, image_processor=clip))
        assert "has 2 image(s) that lose more than a quarter by the processor's crop" in caplog.text
        caplog.clear()
        make_supervised_data_module(qwen2(), data_args(folder, image_processor=clip, image_aspect_ratio="pad"))
        assert "crop" not in caplog.text


DOORS = {
    "training": read_image,
    "the demo and the terminal": read_upload,
    "chat and attention": shown_image,
    "evaluation": open_image,
    "the export's questions": lambda path: Question("", path).open(),
}


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("name", ["16.png", "16.tif", "16.pgm", "dark.pgm", "float.tif"])
def test_wide_grey_values_are_scaled_everywhere(tmp_path, door, name):
    """Including dark 16-bit images, whose range follows from the file format and not from the values."""
    levels = GREY.astype(np.uint16) * (1 if name == "dark.pgm" else 257)
    if name.endswith(".pgm"):
        (tmp_path / name).write_bytes(b"P5\n64 48\n65535\n" + levels.astype(">u2").tobytes())
    else:
        Image.fromarray(GREY.astype(np.float32) / 255 if name == "float.tif" else levels).save(tmp_path / name)
    processor = SiglipImageProcessor(size={"height": 48, "width": 64}, do_normalize=False)
    seen = (ImagePreprocess(processor)(DOORS[door](tmp_path / name)) * 255).round().numpy()[0]
    assert np.abs(seen - (GREY if levels.max() > 255 else GREY / 257)).max() <= 1


def test_a_page_of_mistakes_shows_them_too(tmp_path):
    """The page must show what the model saw."""
    Image.fromarray(GREY.astype(np.uint16) * 257).save(tmp_path / "16.png")
    _, _, data = thumbnail(tmp_path / "16.png").partition("base64,")
    shown = Image.open(io.BytesIO(base64.b64decode(data))).convert("L")
    seen = np.asarray(shown.resize((64, 48), Image.Resampling.BOX)).astype(int)
    assert np.abs(seen - GREY).mean() < 20 and np.abs(255 - GREY.astype(int)).mean() > 100
