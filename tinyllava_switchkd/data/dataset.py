"""The training data set: LLaVA records to token ids, labels and pixel values (v1, ``data/dataset.py``)."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from types import SimpleNamespace
from typing import TYPE_CHECKING, Protocol, TypedDict

import torch
from torch.utils.data import Dataset

from tinyllava_switchkd.data.collator import (
    DataCollatorForSupervisedDataset,
    Pictures,
    Sample,
    SampleError,
    without_lesson,
)
from tinyllava_switchkd.data.image import ImagePreprocess
from tinyllava_switchkd.data.image_files import ImageFolder, read_image
from tinyllava_switchkd.data.inspection import BROKEN_IMAGES, MISSING_IMAGES, DataChecker, DataReport, encode_some
from tinyllava_switchkd.data.records import Records, images_of
from tinyllava_switchkd.data.template import check_template
from tinyllava_switchkd.data.text import DataSettings, TextPreprocess
from tinyllava_switchkd.io import JsonObject

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

WORDS_PER_IMAGE = 128
"""Words that images add to a sample's length in `LazySupervisedDataset.lengths` (v1)."""

BAD_IMAGE_POLICIES = ("raise", "skip")
_TOLERATED_BAD_IMAGES = 10  # up to this many never stop a run that skips bad images
_TOLERATED_BAD_SHARE = 0.01
_PROBED_SAMPLES = 256
_TOLERATED_LOST_SHARE = 0.1


class Samples(Protocol):
    """The interface of a training data set: this one, or a part of it."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Sample: ...

    def encode(self, index: int) -> Sample: ...

    @property
    def lengths(self) -> list[int]: ...

    @property
    def modality_lengths(self) -> list[int]: ...


class LazySupervisedDataset(Dataset):
    """Samples of a LLaVA data file, encoded on access; images are decoded in the worker.

    With ``keep_in_memory`` each worker encodes every sample only once, for a small data set with many epochs.

    Args:
        data_path: a LLaVA JSON: a list of ``{"id", "image": name or names (optional), "conversations"}``, or JSON
            lines of such objects.
        tokenizer: the language model's tokenizer.
        data_args: the data arguments ``template``, ``image_folder``, ``image_processor``, ``image_aspect_ratio``,
            ``image_backend``, ``eos_token_ids`` (see `TextPreprocess`), ``keep_in_memory`` (default: no),
            ``allow_outside_images`` (see `ImageFolder`; default: no) and ``on_bad_image``, for images that cannot be
            read: "raise" (the default) or "skip", which learns nothing from the sample. Skipping becomes
            an error once more than 1 % of the images are bad. If ``teacher_image_processor`` (with
            ``teacher_image_aspect_ratio``, by default the student's) gives other pixels than the student's processor,
            samples have the teacher's pixels as well.
        visit: see `Records`.

    Attributes:
        bad_images: number of images that could not be read, over all workers.

    Raises:
        FileNotFoundError, ValueError: see `Records`; an unknown template or policy; images but no image processor.
    """

    def __init__(
        self,
        data_path: str,
        tokenizer: PreTrainedTokenizerBase,
        data_args: DataSettings,
        visit: Callable[[int, JsonObject], None] | None = None,
    ) -> None:
        self.records = Records(data_path, visit)
        self.tokenizer = tokenizer
        self.data_args = data_args
        self.text_preprocess = TextPreprocess(tokenizer, data_args.template, getattr(data_args, "eos_token_ids", None))
        self.on_bad_image = getattr(data_args, "on_bad_image", None) or "raise"
        if self.on_bad_image not in BAD_IMAGE_POLICIES:
            raise ValueError(
                f"Unknown on_bad_image {self.on_bad_image!r}; choose one of {', '.join(BAD_IMAGE_POLICIES)}."
            )
        self.image_folder = getattr(data_args, "image_folder", None) or ""
        self._folder = ImageFolder(self.image_folder, bool(getattr(data_args, "allow_outside_images", False)))
        image_processor = getattr(data_args, "image_processor", None)
        if image_processor is None and self.records.num_images.any():
            raise ValueError(
                f"{data_path} names images, but the data arguments have no image_processor; take it from the vision "
                f"tower."
            )
        self.image_preprocess = None if image_processor is None else ImagePreprocess(image_processor, data_args)
        self.teacher_image_preprocess = self._preprocess_of_teacher(data_args)
        self._kept: dict[int, Sample] | None = {} if getattr(data_args, "keep_in_memory", False) else None
        # Shared with the loader's workers: images requested, images that could not be read.
        self._counts = torch.zeros(2, dtype=torch.int64).share_memory_()

    def __len__(self) -> int:
        return len(self.records)

    @property
    def bad_images(self) -> int:
        return int(self._counts[1])

    @property
    def lengths(self) -> list[int]:
        """Length of every sample in words, plus 128 if it has images."""
        return (self.records.words + WORDS_PER_IMAGE * (self.records.num_images > 0)).tolist()

    @property
    def modality_lengths(self) -> list[int]:
        """Length of every sample in words (at least 1), negative for a sample without images."""
        words = self.records.words.clip(min=1)
        words[self.records.num_images == 0] *= -1
        return words.tolist()

    def __getitem__(self, index: int) -> Sample:
        """One sample.

        Returns:
            input_ids [T], labels [T], id (see `Records.id_of`) and, for a sample with n images, images [n, 3, H, W];
            also teacher_images [n, 3, H', W'] of the same images, for a teacher that preprocesses them differently.

        Raises:
            SampleError: the sample cannot be made; the message names it.
        """
        if self._kept is None:
            return self._make(index)
        if index not in self._kept:
            self._kept[index] = self._make(index)
        return self._kept[index].copy()

    def _make(self, index: int) -> Sample:
        sample, names, where = self._encode(index)
        if names:
            images = [image for name in names if (image := self._load(name, where)) is not None]
            if len(images) < len(names):
                return without_lesson(sample)
            for key in self._preprocesses:
                sample[key] = torch.stack([image[key] for image in images])
        return sample

    def encode(self, index: int) -> Sample:
        """One sample without its images: input_ids [T], labels [T], id.

        Raises:
            SampleError: as for a sample.
        """
        return self._encode(index)[0]

    def _encode(self, index: int) -> tuple[Sample, list[str], str]:
        try:
            record = self.records[index]
        except ValueError:
            raise SampleError(f"Sample {index} of {self.records.path} has changed on disk since it was read.") from None
        where = f"Sample {index} (id {record.get('id')!r}) of {self.records.path}"
        names = images_of(record, where)
        try:
            sample = self.text_preprocess(record["conversations"], num_images=len(names))
        except ValueError as error:
            raise SampleError(f"{where}: {error}") from None
        sample["id"] = self.records.id_of(index, record)
        return sample, names, where

    @property
    def _preprocesses(self) -> dict[Pictures, ImagePreprocess]:
        """Key in a sample -> how its images are made."""
        both: dict[Pictures, ImagePreprocess | None] = {
            "images": self.image_preprocess,
            "teacher_images": self.teacher_image_preprocess,
        }
        return {key: preprocess for key, preprocess in both.items() if preprocess is not None}

    def _preprocess_of_teacher(self, data_args: object) -> ImagePreprocess | None:
        """The teacher's preprocessing; None without a teacher, or if its pixels are the student's."""
        processor = getattr(data_args, "teacher_image_processor", None)
        if processor is None or self.image_preprocess is None:
            return None
        aspect = getattr(data_args, "teacher_image_aspect_ratio", None) or self.image_preprocess.image_aspect_ratio
        settings = {"image_aspect_ratio": aspect, "image_backend": getattr(data_args, "image_backend", None)}
        preprocess = ImagePreprocess(processor, SimpleNamespace(**settings))
        return None if preprocess.makes_same_pixels(self.image_preprocess) else preprocess

    def _load(self, name: str, where: str) -> dict[Pictures, torch.Tensor] | None:
        """Decode an image and make pixel values [3, H, W] for each model; None for a bad image that is skipped."""
        path = os.path.join(self.image_folder, name)
        self._counts[0] += 1
        try:
            rgb = read_image(self._folder.path(name))
            return {key: preprocess(rgb) for key, preprocess in self._preprocesses.items()}
        except (OSError, ValueError) as error:
            self._counts[1] += 1
            reason = "does not exist" if isinstance(error, FileNotFoundError) else f"cannot be read: {error}"
            message = f"{where}: the image {path} {reason}"
        seen, bad = self._counts.tolist()
        if self.on_bad_image == "raise":
            raise SampleError(f"{message}. Set on_bad_image to 'skip' to train without such samples.")
        if bad > _TOLERATED_BAD_IMAGES and bad > _TOLERATED_BAD_SHARE * seen:
            raise SampleError(f"{message}; with {bad - 1} others of {seen}, these are too many bad images to skip.")
        logger.warning("%s; nothing is learned from this sample.", message)
        return None


class DataModule(TypedDict):
    """Data arguments of a Trainer."""

    train_dataset: LazySupervisedDataset
    eval_dataset: None
    data_collator: DataCollatorForSupervisedDataset


def make_supervised_data_module(tokenizer: PreTrainedTokenizerBase, data_args: DataSettings) -> DataModule:
    """Data set and collator (v1, ``data/dataset.py``), after checking the data (see `inspection`).

    Args:
        tokenizer: the language model's tokenizer; samples are truncated to its ``model_max_length``.
        data_args: as for `LazySupervisedDataset`, plus ``data_path``, ``num_image_tokens`` (tokens per image after the
            connector; default: 1), ``is_multimodal`` (whether a batch without images gets a zero image; default: yes)
            and ``eos_token_ids`` (the ids that end generation; default: the tokenizer's eos). With a
            ``teacher_image_processor``, batches may have ``teacher_images``.

    Returns:
        ``{"train_dataset", "eval_dataset": None, "data_collator"}``, as arguments of a Trainer.

    Raises:
        FileNotFoundError, ValueError: the data cannot be read, the template does not fit the tokenizer, or truncation
            removes every answer from more than a tenth of the samples.
    """
    check_template(tokenizer, data_args.template, getattr(data_args, "eos_token_ids", None))
    # One process per machine checks the data; if it fails, the launcher ends the others.
    checker = DataChecker(data_args.template) if os.environ.get("LOCAL_RANK", "0") == "0" else None
    dataset = LazySupervisedDataset(data_args.data_path, tokenizer, data_args, visit=checker)
    if checker is not None:
        allow_outside = bool(getattr(data_args, "allow_outside_images", False))
        report = checker.finish(dataset.image_folder, preprocess=dataset.image_preprocess, allow_outside=allow_outside)
        _judge(report, dataset)
    sees = getattr(data_args, "is_multimodal", True)
    shapes = [
        preprocess.blank().shape if sees and preprocess is not None else None
        for preprocess in (dataset.image_preprocess, dataset.teacher_image_preprocess)
    ]
    collator = DataCollatorForSupervisedDataset(
        tokenizer,
        num_image_tokens=getattr(data_args, "num_image_tokens", None) or 1,
        image_shape=shapes[0],
        teacher_image_shape=shapes[1],
    )
    tried = encode_some(dataset.records, dataset.text_preprocess, collator, _PROBED_SAMPLES)
    collator.counts.zero_()
    lost = sum(not kept for *_, kept in tried)
    message = (
        f"{lost} of {len(tried)} samples tried have no answer left after truncation to {collator.model_max_length} "
        f"tokens, {collator.num_image_tokens} of them for each image; raise model_max_length"
    )
    if lost > _TOLERATED_LOST_SHARE * len(tried):
        raise ValueError(message + ".")
    if lost:
        logger.warning("%s if you want to learn from them.", message)
    return {"train_dataset": dataset, "eval_dataset": None, "data_collator": collator}


def _judge(report: DataReport, dataset: LazySupervisedDataset) -> None:
    """Log the warnings of a report and raise its problems; bad images that are skipped become warnings."""
    if dataset.on_bad_image == "skip":
        for kind in (MISSING_IMAGES, BROKEN_IMAGES):
            if kind in report.problems:
                report.warnings[kind] = report.problems.pop(kind)
    for kind, cases in report.warnings.items():
        logger.warning("%s has %d %s; the first is %s.", dataset.records.path, cases.count, kind, cases.examples[0])
    report.raise_problems(dataset.records.path)
