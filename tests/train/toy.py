"""A data set in memory and a trainer around a tiny model, for the tests of the trainer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset

from tests.tiny import IMAGE_SIZE, tiny_llava, tiny_tokenizer
from tinyllava_switchkd.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from tinyllava_switchkd.data import DataCollatorForSupervisedDataset
from tinyllava_switchkd.distill import build_distiller
from tinyllava_switchkd.train.command_line.arguments import TrainingArguments
from tinyllava_switchkd.train.task import SupervisedTask
from tinyllava_switchkd.train.trainer import LLaVATrainer


class ToyDataset(Dataset):
    """Samples of unequal length, every third without an image; the same for the same seed."""

    def __init__(self, size: int = 12, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.samples = []
        for index in range(size):
            length = int(torch.randint(6, 20, (), generator=generator))
            ids = torch.randint(0, 250, (length,), generator=generator)
            labels = ids.clone()
            labels[: 2 + index % 4] = IGNORE_INDEX
            sample = {"input_ids": ids, "labels": labels}
            if index % 3:
                ids[1], labels[1] = IMAGE_TOKEN_INDEX, IGNORE_INDEX
                sample["images"] = torch.randn(1, 3, IMAGE_SIZE, IMAGE_SIZE, generator=generator)
            self.samples.append(sample)

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return self.samples[index]

    @property
    def modality_lengths(self) -> list[int]:
        return [len(s["input_ids"]) * (1 if "images" in s else -1) for s in self.samples]


def toy_arguments(output_dir: str | Path, **kwargs: Any) -> TrainingArguments:
    fields = {
        "use_cpu": True,
        "report_to": "none",
        "max_steps": 3,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "disable_tqdm": True,
        "tune_type_llm": "full",
        "tune_type_vision_tower": "full",
    }
    return TrainingArguments(output_dir=str(output_dir), **{**fields, **kwargs})


def toy_task(distil: bool = False, seed: int = 0) -> SupervisedTask:
    """A task with a tiny student; with `distil`, a Distiller with a teacher of another seed."""
    student = tiny_llava(seed=seed)
    student.freeze_unused_parameters()
    if not distil:
        return SupervisedTask(student)
    return build_distiller(student, tiny_llava(seed=100, text={"hidden_size": 48}))


def toy_trainer(args: TrainingArguments, task: torch.nn.Module | None = None, size: int = 12, **kwargs: Any):
    task = toy_task() if task is None else task
    student = getattr(task, "student", task)
    student.tokenizer, student.image_processor = tiny_tokenizer(), student.vision_tower.image_processor
    return LLaVATrainer(task, args, train_dataset=ToyDataset(size), data_collator=toy_collator(student), **kwargs)


def toy_collator(student: torch.nn.Module) -> DataCollatorForSupervisedDataset:
    return DataCollatorForSupervisedDataset(
        tiny_tokenizer(), num_image_tokens=student.num_image_tokens, image_shape=(3, IMAGE_SIZE, IMAGE_SIZE)
    )


def weights(task: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in task.named_parameters()}


def largest_difference(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> float:
    assert first.keys() == second.keys()
    return max(float((first[name] - second[name]).abs().max()) for name in first)


def logged(trainer: LLaVATrainer, key: str) -> Sequence[float]:
    return [entry[key] for entry in trainer.state.log_history if key in entry]
