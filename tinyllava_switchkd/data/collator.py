"""Collate samples into batches, truncated to the model's context length (v1, ``data/dataset.py``)."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, TypedDict

import torch
from torch import Tensor

from tinyllava_switchkd.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


logger = logging.getLogger(__name__)

Text = Literal["input_ids", "labels", "attention_mask"]
Pictures = Literal["images", "teacher_images"]
"""Keys of a sample or a batch: the model's pixels, and those of a teacher that preprocesses images differently."""


class SampleError(ValueError):
    """A sample or a batch cannot be made; the message is one sentence.

    A data loader re-raises a worker's exception in the main process with the whole traceback as its message. The
    constructor keeps only the original message.
    """

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.rpartition(f"{type(self).__name__}: ")[2].split()))


class Sample(TypedDict, total=False):
    """One encoded sample, see `LazySupervisedDataset`. "prompt" is the text of a sample for generation."""

    input_ids: Tensor
    labels: Tensor
    images: Tensor
    teacher_images: Tensor
    id: str
    prompt: str


def without_lesson(sample: Sample) -> Sample:
    """A sample with the same id that no loss learns from: one token without a label, and no image."""
    kept: Sample = {"input_ids": torch.zeros(1, dtype=torch.long), "labels": torch.full((1,), IGNORE_INDEX)}
    if "id" in sample:
        kept["id"] = sample["id"]
    return kept


class Batch(TypedDict, total=False):
    """A training batch, see `DataCollatorForSupervisedDataset`."""

    input_ids: Tensor
    labels: Tensor
    attention_mask: Tensor
    images: Tensor
    teacher_images: Tensor
    ids: list[str]
    digests: list[str]


TENSORS: tuple[Text | Pictures, ...] = ("input_ids", "labels", "attention_mask", "images", "teacher_images")


def on_device(batch: Batch, device: torch.device) -> Batch:
    """The batch with its tensors on a device."""
    moved: Batch = {**batch}
    for key in TENSORS:
        if key in moved:
            moved[key] = moved[key].to(device)
    return moved


class DataCollatorForSupervisedDataset:
    """Pads samples on the right to a batch.

    A sample is truncated where the sequence *with spliced images* reaches `model_max_length`, so the model never
    truncates again and the labels of a batch are exactly the tokens learned from. An image is kept completely or not at
    all.

    Args:
        tokenizer: gives the padding id and ``model_max_length``.
        num_image_tokens: tokens per image in the sequence.
        image_shape: (3, H, W) of the zero image that a batch without images gets, so that every rank runs the vision
            tower in every step; None for a model without vision.
        teacher_image_shape: likewise for the teacher's images, if it preprocesses them differently; see
            `LazySupervisedDataset`.
        model_max_length: longest sequence, the tokenizer's if None.

    Attributes:
        digests: whether batches have the `sample_digest` of each sample, the key of a teacher cache.
        counts: samples seen, truncated, and left without anything to learn, over all workers; see `report`.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        num_image_tokens: int = 1,
        image_shape: Sequence[int] | None = None,
        model_max_length: int | None = None,
        teacher_image_shape: Sequence[int] | None = None,
    ) -> None:
        self.pad_token_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
        self.model_max_length = min(model_max_length or tokenizer.model_max_length, 1 << 40)  # "none" is 1e30
        self.num_image_tokens = num_image_tokens
        self.image_shapes: dict[Pictures, Sequence[int] | None] = {
            "images": image_shape,
            "teacher_images": teacher_image_shape,
        }
        self.digests = False
        self.counts = torch.zeros(3, dtype=torch.int64).share_memory_()

    def __call__(self, instances: Sequence[Sample]) -> Batch:
        """Make a batch of B samples with I images in all.

        Returns:
            input_ids [B, T]; labels [B, T] (IGNORE_INDEX at padding); attention_mask [B, T] (bool, true at tokens, even
            if the end of an answer has the padding id); images [I, 3, H, W] in the order of their placeholders, or one
            zero image if there are none; teacher_images [I, 3, H', W'] of the same images, for a teacher that
            preprocesses them differently; ids, the B names of the samples, if they have any; digests if `digests`. A
            model ignores the last three.

        Raises:
            SampleError: a sample's numbers of images and placeholders differ, or images differ in size.
        """
        for instance in instances:
            places, images = int((instance["input_ids"] == IMAGE_TOKEN_INDEX).sum()), len(instance.get("images", ()))
            if places != images:
                raise SampleError(f"A sample has {images} image(s), but {places} placeholder(s) for them.")
        samples = [self.truncate(instance) for instance in instances]
        longest = max(len(sample["input_ids"]) for sample in samples)
        shape = (len(samples), longest)
        batch: Batch = {
            "input_ids": torch.full(shape, self.pad_token_id, dtype=torch.long),
            "labels": torch.full(shape, IGNORE_INDEX, dtype=torch.long),
            "attention_mask": torch.zeros(shape, dtype=torch.bool),
        }
        for row, sample in enumerate(samples):
            length = len(sample["input_ids"])
            batch["input_ids"][row, :length] = sample["input_ids"]
            batch["labels"][row, :length] = sample["labels"]
            batch["attention_mask"][row, :length] = True
        for key, image_shape in self.image_shapes.items():
            stacks = [sample[key] for sample in samples if key in sample]
            sizes = {tuple(image.shape[1:]) for image in stacks}
            if len(sizes) > 1:
                raise SampleError(
                    f"The images of a batch differ in size: {sorted(sizes)}; the image processor must fix it."
                )
            if stacks:
                batch[key] = torch.cat(stacks)
            elif image_shape is not None:
                batch[key] = torch.zeros(1, *image_shape)
        if all("id" in sample for sample in samples):
            batch["ids"] = [sample["id"] for sample in samples]
        if self.digests:
            batch["digests"] = [sample_digest(sample) for sample in samples]
        return batch

    def truncate(self, sample: Sample) -> Sample:
        """Truncate one sample to `model_max_length`; images whose placeholders are cut off are dropped."""
        input_ids, labels = sample["input_ids"], sample["labels"]
        is_image = input_ids == IMAGE_TOKEN_INDEX
        # The end of each token or image in the spliced sequence; it increases, so the kept tokens are a prefix.
        ends = torch.where(is_image, self.num_image_tokens, 1).cumsum(0)
        keep = int((ends <= self.model_max_length).sum())
        self.counts[0] += 1
        if keep == len(input_ids):
            return sample
        self.counts[1] += 1
        kept: Sample = {**sample, "input_ids": input_ids[:keep], "labels": labels[:keep]}
        if (labels != IGNORE_INDEX).any() and not (kept["labels"] != IGNORE_INDEX).any():
            self.counts[2] += 1
        kept_images = int(is_image[:keep].sum())
        for key in self.image_shapes:
            if key in kept and kept_images:
                kept[key] = kept[key][:kept_images]
            else:
                kept.pop(key, None)
        return kept

    def report(self) -> str | None:
        """One sentence about samples truncated so far; None if there are none."""
        seen, cut, lost = self.counts.tolist()
        if not cut:
            return None
        return (
            f"Of {seen} samples {cut} ({cut / seen:.1%}) were cut to {self.model_max_length} tokens, "
            f"and {lost} ({lost / seen:.1%}) of them have no answer left to learn from."
        )


def sample_digest(sample: Sample) -> str:
    """32 hexadecimal digits of a sample's id, its tokens, which of these are supervised, and the teacher's pixels.

    Any other question, image, preprocessing or random augmentation gives another digest.
    """
    total = hashlib.blake2b(str(sample.get("id")).encode(errors="surrogatepass"), digest_size=16)
    pixels = sample.get("teacher_images", sample.get("images"))
    parts = [sample["input_ids"].long(), sample["labels"] != IGNORE_INDEX, *([] if pixels is None else [pixels])]
    for part in parts:
        total.update(f"|{part.dtype} {tuple(part.shape)}|".encode())
        total.update(part.contiguous().view(torch.uint8).numpy().data)
    return total.hexdigest()
