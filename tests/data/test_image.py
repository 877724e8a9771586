"""Images: v1's pixel values bit for bit, any mode, padding, backends."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    AutoImageProcessor,
    BitImageProcessor,
    CLIPImageProcessor,
    SiglipImageProcessor,
    ViTImageProcessor,
)

from tests.data.tokenizers import FIXTURES
from tinyllava_switchkd.data import ImagePreprocess

V1 = FIXTURES / "v1"


def processor(name: str):
    return AutoImageProcessor.from_pretrained(V1 / f"{name}-tiny")


@pytest.mark.parametrize("name, aspect_ratio", [("siglip", "square"), ("clip", "pad")])
def test_v1_pixel_values(name, aspect_ratio):
    preprocess = ImagePreprocess(processor(name), SimpleNamespace(image_aspect_ratio=aspect_ratio))
    pixels = preprocess(Image.open(V1 / "image.png"))
    assert torch.equal(pixels, torch.from_numpy(np.load(V1 / "pixel_values.npz")[name]))


@pytest.mark.parametrize(
    "made",
    [
        SiglipImageProcessor(size={"height": 384, "width": 384}),
        SiglipImageProcessor(size={"height": 30, "width": 50}, do_normalize=False),
        CLIPImageProcessor(size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56}),
        CLIPImageProcessor(size={"shortest_edge": 60}, crop_size={"height": 33, "width": 48}),
        CLIPImageProcessor(size={"shortest_edge": 40}, crop_size={"height": 48, "width": 48}),
        CLIPImageProcessor(do_resize=False, crop_size={"height": 20, "width": 20}),
        BitImageProcessor(size={"shortest_edge": 64}, crop_size={"height": 56, "width": 56}),
        ViTImageProcessor(size={"height": 40, "width": 40}, do_rescale=False, do_normalize=False),
    ],
    ids=lambda made: type(made).__name__,
)
def test_pixel_values_are_the_processors_bit_for_bit(made):
    preprocess = ImagePreprocess(made)
    assert (preprocess._shortcut is not None) == made.do_resize
    rng = np.random.default_rng(1)
    for height, width in ((48, 64), (64, 48), (50, 50), (33, 200), (57, 56), (301, 33), (1, 9)):
        image = Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
        try:
            expected = preprocess.image_processor(image, return_tensors="pt")["pixel_values"][0]
        except ValueError:
            continue  # an image of one row is beyond some processors
        assert torch.equal(preprocess(image), expected)


def test_backends():
    image = Image.open(V1 / "image.png")
    for cls in (SiglipImageProcessor, CLIPImageProcessor):
        pil = ImagePreprocess(cls())
        torchvision = ImagePreprocess(pil.image_processor, SimpleNamespace(image_backend="torchvision"))
        assert type(pil.image_processor).__name__ == cls.__name__ + "Pil"
        assert type(torchvision.image_processor) is cls
        levels = (pil(image) - torchvision(image)).abs().max() * max(pil.image_processor.image_std) * 255
        assert 0 < levels < 6
        assert (pil(image) - torchvision(image)).abs().mean() < 0.02
    own = SimpleNamespace(image_mean=[0, 0, 0])
    assert ImagePreprocess(own).image_processor is own


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA", "P", "CMYK", "1", "I;16"])
def test_any_mode_is_read_as_rgb(mode):
    image = Image.new(mode, (20, 10))
    assert ImagePreprocess(processor("siglip"))(image).shape == (3, 56, 56)


def test_transparency_is_dropped_and_orientation_left_alone(tmp_path):
    image = Image.open(V1 / "image.png").convert("RGB")
    preprocess = ImagePreprocess(processor("siglip"))
    transparent = image.copy()
    transparent.putalpha(0)
    assert torch.equal(preprocess(transparent), preprocess(image))
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(tmp_path / "turned.png", exif=exif)
    assert torch.equal(preprocess(Image.open(tmp_path / "turned.png")), preprocess(image))


def test_pad_centres_on_the_mean_colour():
    preprocess = ImagePreprocess(processor("siglip"), SimpleNamespace(image_aspect_ratio="pad"))
    pixels = preprocess(Image.new("RGB", (40, 20), "white"))
    mean = (int(0.5 * 255) / 255 - 0.5) / 0.5
    assert torch.allclose(pixels[:, [0, -1]], torch.tensor(mean))
    assert torch.allclose(pixels[:, 28], torch.tensor(1.0))
    square = Image.new("RGB", (9, 9))
    assert ImagePreprocess.expand2square(square, (1, 2, 3)) is square
    tall = ImagePreprocess.expand2square(Image.new("RGB", (3, 8), "white"), (1, 2, 3))
    assert tall.size == (8, 8)
    assert [tall.getpixel((x, 0)) for x in (1, 2, 4, 5)] == [(1, 2, 3), (255,) * 3, (255,) * 3, (1, 2, 3)]


def test_blank_is_zeros_of_the_processors_size():
    assert torch.equal(ImagePreprocess(processor("clip")).blank(), torch.zeros(3, 56, 56))


@pytest.mark.parametrize("name, value", [("image_aspect_ratio", "anyres"), ("image_backend", "cv2")])
def test_unknown_settings(name, value):
    with pytest.raises(ValueError, match=f"Unknown {name} '{value}'; choose one of"):
        ImagePreprocess(processor("siglip"), SimpleNamespace(**{name: value}))
