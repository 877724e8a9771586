"""Convert images to pixel values (TinyLLaVA v1, ``data/image_preprocess.py``)."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import transformers
from PIL import Image
from torch.utils.data import get_worker_info

from tinyllava_switchkd.data.image_files import LEAST_SHARE, to_rgb

if TYPE_CHECKING:
    from transformers import BaseImageProcessor

logger = logging.getLogger(__name__)

ASPECT_RATIOS = ("square", "pad")
BACKENDS = ("pil", "torchvision")

_MOST_PIXELS = 180_000_000  # of an intermediate image; about Pillow's limit for decoding


class ImagePreprocess:
    """Converts an image to the input of the vision tower.

    "square" only applies the image processor. SigLIP's squeezes the image into a square; CLIP's and DINOv2's crop its
    centre, so the model never sees the ends of a wide picture (a warning is logged once). "pad" first pads the image to
    a square with the processor's mean colour.

    Transparency is dropped and EXIF orientation is not applied, as in v1, because its checkpoints and benchmark scores
    were made this way. Turn photographs from a phone upright beforehand (`PIL.ImageOps.exif_transpose`). Grey values
    with more than 8 bits are scaled, see `to_rgb`.

    Args:
        image_processor: an image processor of transformers, or any callable with an image and ``return_tensors``.
        data_args: has ``image_aspect_ratio`` ("square", "pad" or None) and ``image_backend``: "pil" (the default, bit
            for bit v1's resampling) or "torchvision" (faster, differs by up to two grey levels).

    Raises:
        ValueError: unknown aspect ratio or backend.
    """

    _warned_about_crop = False

    def __init__(self, image_processor: BaseImageProcessor, data_args: object = None) -> None:
        self.image_aspect_ratio = getattr(data_args, "image_aspect_ratio", None) or "square"
        backend = getattr(data_args, "image_backend", None) or "pil"
        if self.image_aspect_ratio not in ASPECT_RATIOS:
            raise ValueError(
                f"Unknown image_aspect_ratio {self.image_aspect_ratio!r}; choose one of {', '.join(ASPECT_RATIOS)}."
            )
        if backend not in BACKENDS:
            raise ValueError(f"Unknown image_backend {backend!r}; choose one of {', '.join(BACKENDS)}.")
        self.image_processor = _with_backend(image_processor, backend)
        self._shortcut = _PilShortcut.of(self.image_processor)

    def __call__(self, image: Image.Image) -> torch.Tensor:
        """Preprocess one image of any mode.

        Returns:
            pixel values [3, H, W].

        Raises:
            ValueError: the image is so narrow that resizing it would take gigabytes.
        """
        image = to_rgb(image)
        self._check_size(image.size)
        self._warn_about_crop(image.size)
        if self.image_aspect_ratio == "pad":
            colour = tuple(int(mean * 255) for mean in self.image_processor.image_mean)
            image = self.expand2square(image, colour)
        if self._shortcut is not None:
            return self._shortcut(image)
        return self.image_processor(image, return_tensors="pt")["pixel_values"][0]

    def kept_share(self, size: tuple[int, int]) -> float:
        """Share of an image (width, height) that the tower sees: 1 unless the processor crops."""
        processor = self.image_processor
        if self.image_aspect_ratio == "pad" or not getattr(processor, "do_center_crop", False):
            return 1.0
        crop, scaled = _sides(processor.crop_size), _sides(processor.size)
        width, height = map(float, size)
        if not getattr(processor, "do_resize", True):
            pass
        elif "shortest_edge" in scaled:
            scale = scaled["shortest_edge"] / min(size)
            width, height = width * scale, height * scale
        elif "width" in scaled:
            width, height = scaled["width"], scaled["height"]
        kept = min(crop.get("width", width), width) * min(crop.get("height", height), height)
        return kept / (width * height)

    def _check_size(self, size: tuple[int, int]) -> None:
        scaled = _sides(getattr(self.image_processor, "size", None))
        if self.image_aspect_ratio == "pad":
            pixels: float = max(size) ** 2
        else:
            pixels = scaled.get("shortest_edge", 0) ** 2 * max(size) / max(min(size), 1)
        if min(size) < 1 or pixels > _MOST_PIXELS:
            raise ValueError(
                f"an image of {size[0]} x {size[1]} pixels is too narrow: resized for the vision tower it would have "
                f"{pixels / 1e6:,.0f} million; cut it into pieces or leave it out"
            )

    def _warn_about_crop(self, size: tuple[int, int]) -> None:
        # Once per process, and not in a loader's workers: `check_data` and the start of a training count such images.
        if ImagePreprocess._warned_about_crop or get_worker_info() is not None:
            return
        kept = self.kept_share(size)
        if kept < LEAST_SHARE:
            ImagePreprocess._warned_about_crop = True
            logger.warning(
                "The image processor %s crops the centre of an image; of one with %d x %d pixels the model sees "
                "%.0f %%. Train with image_aspect_ratio 'pad' to show all of it (a trained model needs the one it was "
                "trained with).",
                *(type(self.image_processor).__name__, *size, 100 * kept),
            )

    @staticmethod
    def expand2square(pil_img: Image.Image, background_color: tuple[int, ...]) -> Image.Image:
        """The image centred on a square of one colour, as wide as its longer side."""
        side = max(pil_img.size)
        if min(pil_img.size) == side:
            return pil_img
        square = Image.new(pil_img.mode, (side, side), background_color)
        square.paste(pil_img, ((side - pil_img.width) // 2, (side - pil_img.height) // 2))
        return square

    def makes_same_pixels(self, other: ImagePreprocess) -> bool:
        """Whether another preprocessing gives the same pixels for a wide, a high and a square image of noise."""
        noise = np.random.default_rng(0).integers(0, 256, (83, 61, 3), dtype=np.uint8)
        shapes = (noise, noise.transpose(1, 0, 2), noise[:61])
        pairs = [(self(image), other(image)) for image in map(Image.fromarray, shapes)]
        return all(torch.equal(ours, theirs) for ours, theirs in pairs)

    def blank(self) -> torch.Tensor:
        """The replacement for a missing image: zeros [3, H, W] in the processor's output size."""
        return torch.zeros_like(self(Image.new("RGB", (32, 32))))


def _sides(size: Any) -> dict[str, int]:
    """The sides that a processor's `size` names; empty if it is not in transformers' format."""
    try:
        return {name: side for name, side in dict(size).items() if side}
    except (TypeError, ValueError):
        return {}


def _with_backend(image_processor: BaseImageProcessor, backend: str) -> BaseImageProcessor:
    """The processor's variant with the given backend if transformers has one, otherwise the processor itself."""
    name = type(image_processor).__name__
    twin = name.removesuffix("Pil") + ("Pil" if backend == "pil" else "")
    if twin == name or type(image_processor) is not getattr(transformers, name, None):
        return image_processor
    cls = getattr(transformers, twin, None)
    if cls is None:
        return image_processor
    settings = image_processor.to_dict()
    settings.pop("image_processor_type", None)  # the name of the old class
    return cls(**settings)


class _PilShortcut:
    """A faster implementation of transformers' PIL processors: resize, crop, and look values up in a table.

    A processor spends more than half of its time on copies and conversions around Pillow's resize. A pixel has only 256
    values, so rescaling and normalising is a table, which the processor itself fills. The result is bit for bit the
    processor's: `of` compares the two and gives no shortcut if they differ, so any kind of processor works.
    """

    def __init__(self, processor: BaseImageProcessor) -> None:
        values = np.broadcast_to(np.arange(256, dtype=np.uint8), (3, 1, 256))
        filled = processor(values, return_tensors="np", do_resize=False, do_center_crop=False, do_pad=False)
        self._table = np.ascontiguousarray(filled["pixel_values"][0].reshape(3, 256), dtype=np.float32)
        self._size = dict(processor.size)
        self._crop = dict(processor.crop_size) if getattr(processor, "do_center_crop", False) else None
        self._resample = int(processor.resample)

    @classmethod
    def of(cls, processor: BaseImageProcessor) -> _PilShortcut | None:
        """The shortcut for a processor, or None."""
        if getattr(processor, "backend", None) != "pil":
            return None
        noise = np.random.default_rng(0).integers(0, 256, (83, 61, 3), dtype=np.uint8)
        try:
            shortcut = cls(processor)
            for image in (Image.fromarray(noise), Image.fromarray(noise.transpose(1, 0, 2))):
                if not torch.equal(shortcut(image), processor(image, return_tensors="pt")["pixel_values"][0]):
                    return None
        except (AttributeError, KeyError, TypeError, ValueError):
            return None
        return shortcut

    def __call__(self, image: Image.Image) -> torch.Tensor:
        width, height = self._size.get("width"), self._size.get("height")
        if not (width and height):
            scale = self._size["shortest_edge"], min(image.size)
            width, height = (side * scale[0] // scale[1] for side in image.size)
        image = image.resize((width, height), resample=self._resample)
        if self._crop is not None:
            left, top = (width - self._crop["width"]) // 2, (height - self._crop["height"]) // 2
            image = image.crop((left, top, left + self._crop["width"], top + self._crop["height"]))
        pixels = np.asarray(image)
        values = np.empty((3, *pixels.shape[:2]), dtype=np.float32)
        for channel, table in enumerate(self._table):
            np.take(table, pixels[..., channel], out=values[channel], mode="clip")
        return torch.from_numpy(values)
