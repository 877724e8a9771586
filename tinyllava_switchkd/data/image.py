"""Images to pixel values (TinyLLaVA v1, ``data/image_preprocess.py``)."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import transformers
from PIL import Image
from torch.utils.data import get_worker_info

from .image_files import LEAST_SHARE, to_rgb

if TYPE_CHECKING:
    from transformers import BaseImageProcessor

logger = logging.getLogger(__name__)

ASPECT_RATIOS = ("square", "pad")
BACKENDS = ("pil", "torchvision")

_MOST_PIXELS = 180_000_000  # of an image on its way to the tower; about what Pillow decodes at most


class ImagePreprocess:
    """Turns an image into what the vision tower takes.

    "square" leaves everything to the image processor: SigLIP's squeezes the image into a square; CLIP's and DINOv2's
    cut out its middle, so that of a wide picture the ends are never seen, of which a warning tells once. "pad" first
    fills the image up to a square with the processor's mean colour.

    Transparency is dropped and EXIF orientation is not applied, both as in v1: its checkpoints and benchmark scores
    were made so. Photographs from a phone are better turned upright (`PIL.ImageOps.exif_transpose`) beforehand. Grey
    values of more than 8 bits are scaled, see `to_rgb`.

    Args:
        image_processor: an image processor of transformers, or anything that takes an image and ``return_tensors``.
        data_args: where to read ``image_aspect_ratio`` ("square", "pad" or None) and ``image_backend`` from: "pil"
            (the default, bit for bit v1's resampling) or "torchvision" (faster, off by up to two grey levels).

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
            ValueError: so narrow an image that bringing it to the tower's size would take gigabytes.
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
        """Share of an image of that width and height that the tower sees: 1 unless the processor crops."""
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
                f"an image of {size[0]} x {size[1]} pixels is too narrow: on its way to the vision tower it would have "
                f"{pixels / 1e6:,.0f} million; cut it into pieces or leave it out"
            )

    def _warn_about_crop(self, size: tuple[int, int]) -> None:
        # Once a process, and not in a loader's workers: `check_data` and a training's start count the images concerned.
        if ImagePreprocess._warned_about_crop or get_worker_info() is not None:
            return
        kept = self.kept_share(size)
        if kept < LEAST_SHARE:
            ImagePreprocess._warned_about_crop = True
            logger.warning(
                "The image processor %s cuts out the middle of an image, and of one of %d x %d pixels the model sees "
                "%.0f %%; train with image_aspect_ratio 'pad' to show all of it (a trained model needs the one it was "
                "trained with).",
                *(type(self.image_processor).__name__, *size, 100 * kept),
            )

    @staticmethod
    def expand2square(pil_img: Image.Image, background_color: tuple[int, ...]) -> Image.Image:
        """The image in the middle of a square of one colour, as wide as its longer side."""
        side = max(pil_img.size)
        if min(pil_img.size) == side:
            return pil_img
        square = Image.new(pil_img.mode, (side, side), background_color)
        square.paste(pil_img, ((side - pil_img.width) // 2, (side - pil_img.height) // 2))
        return square

    def makes_same_pixels(self, other: ImagePreprocess) -> bool:
        """Whether another preprocessing makes the same of a wide, a high and a square image of noise."""
        noise = np.random.default_rng(0).integers(0, 256, (83, 61, 3), dtype=np.uint8)
        shapes = (noise, noise.transpose(1, 0, 2), noise[:61])
        pairs = [(self(image), other(image)) for image in map(Image.fromarray, shapes)]
        return all(torch.equal(ours, theirs) for ours, theirs in pairs)

    def blank(self) -> torch.Tensor:
        """The image that stands where there is none: zeros [3, H, W], of the size that the processor makes."""
        return torch.zeros_like(self(Image.new("RGB", (32, 32))))


def _sides(size: Any) -> dict[str, int]:
    """A processor's size as the sides that it names; nothing if it is not one of transformers' kind."""
    try:
        return {name: side for name, side in dict(size).items() if side}
    except (TypeError, ValueError):
        return {}


def _with_backend(image_processor: BaseImageProcessor, backend: str) -> BaseImageProcessor:
    """The processor's twin of the wanted backend, where transformers has one; otherwise the processor itself."""
    name = type(image_processor).__name__
    twin = name.removesuffix("Pil") + ("Pil" if backend == "pil" else "")
    if twin == name or type(image_processor) is not getattr(transformers, name, None):
        return image_processor
    cls = getattr(transformers, twin, None)
    if cls is None:
        return image_processor
    settings = image_processor.to_dict()
    settings.pop("image_processor_type", None)  # names the class, which is what changes
    return cls(**settings)


class _PilShortcut:
    """What a PIL processor of transformers does, without its detours: resize, crop, and look the values up.

    More than half of a processor's time goes into copies and conversions around Pillow's resize. As a pixel has 256
    values, rescaling and normalising is a table, and the processor itself fills it. The result is the processor's bit
    for bit: `of` compares the two and gives no shortcut where they differ, so no kind of processor need be known here.
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
        """The processor's shortcut, None if there is none."""
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
