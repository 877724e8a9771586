"""Everything that a training run reads, in one call."""

from __future__ import annotations

import logging
import os
from typing import TYPE_CHECKING, TypedDict

from tinyllava_switchkd.constants import IGNORE_INDEX
from tinyllava_switchkd.data.collator import DataCollatorForSupervisedDataset
from tinyllava_switchkd.data.dataset import LazySupervisedDataset
from tinyllava_switchkd.data.inspection import BROKEN_IMAGES, MISSING_IMAGES, DataChecker, DataReport
from tinyllava_switchkd.data.template import check_template
from tinyllava_switchkd.data.text import DataSettings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

_PROBED_SAMPLES = 256
_TOLERATED_LOST_SHARE = 0.1


class DataModule(TypedDict):
    """Data as a Trainer takes them."""

    train_dataset: LazySupervisedDataset
    eval_dataset: None
    data_collator: DataCollatorForSupervisedDataset


def make_supervised_data_module(tokenizer: PreTrainedTokenizerBase, data_args: DataSettings) -> DataModule:
    """Data set and collator (v1, ``data/dataset.py``), after looking the data over (see `inspection`).

    Args:
        tokenizer: the language model's tokenizer; its ``model_max_length`` is where samples are cut.
        data_args: as for `LazySupervisedDataset`, with ``data_path``; further ``num_image_tokens`` (tokens an image
            takes after the connector; 1 if absent), ``is_multimodal`` (whether a batch without images gets a zero
            image; yes if absent) and ``eos_token_ids`` (the ids generation stops at; the tokenizer's eos if absent).
            With ``teacher_image_processor`` and ``teacher_image_aspect_ratio`` of a teacher that reads other pixels,
            batches hold ``teacher_images`` as well.

    Returns:
        ``{"train_dataset", "eval_dataset": None, "data_collator"}``, as a Trainer takes them.

    Raises:
        FileNotFoundError, ValueError: the data cannot be read, the template does not fit the tokenizer, or more than a
            tenth of the samples lose every answer by being cut.
    """
    check_template(tokenizer, data_args.conv_version, getattr(data_args, "eos_token_ids", None))
    # One process a machine looks the data over; a launcher ends the others when it fails.
    checker = DataChecker(data_args.conv_version) if os.environ.get("LOCAL_RANK", "0") == "0" else None
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
    check_supervision(dataset, collator)
    return {"train_dataset": dataset, "eval_dataset": None, "data_collator": collator}


def _judge(report: DataReport, dataset: LazySupervisedDataset) -> None:
    """Log the warnings of a report and raise its problems, bad images only if they are not to be skipped."""
    if dataset.on_bad_image == "skip":
        for kind in (MISSING_IMAGES, BROKEN_IMAGES):
            if kind in report.problems:
                report.warnings[kind] = report.problems.pop(kind)
    for kind, cases in report.warnings.items():
        logger.warning("%s has %d %s, the first being %s.", dataset.records.path, cases.count, kind, cases.examples[0])
    report.raise_problems(dataset.records.path)


def check_supervision(dataset: LazySupervisedDataset, collator: DataCollatorForSupervisedDataset) -> float:
    """Encode some samples, evenly spread, and see how many keep an answer after the cut.

    Returns:
        the share of samples that have nothing to learn from.

    Raises:
        ValueError: the share is above a tenth, or a sample cannot be encoded.
    """
    step = max(1, len(dataset) // _PROBED_SAMPLES)
    chosen = range(0, len(dataset), step)
    lost = 0
    for index in chosen:
        sample = dataset.encode(index)
        labels = collator.truncate(sample)["labels"]
        lost += not bool((labels != IGNORE_INDEX).any())
    share = lost / len(chosen)
    collator.counts.zero_()
    message = (
        f"{lost} of {len(chosen)} samples tried have no answer left once cut to {collator.model_max_length} tokens, "
        f"{collator.num_image_tokens} of which an image takes; raise model_max_length"
    )
    if share > _TOLERATED_LOST_SHARE:
        raise ValueError(message + ".")
    if lost:
        logger.warning("%s if you want to learn from them.", message)
    return share
