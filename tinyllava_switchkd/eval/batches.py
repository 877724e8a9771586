"""The order of generation: each (image, prompt) once, an image's questions together, similar lengths together."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from tinyllava_switchkd.data.image_files import opened
from tinyllava_switchkd.eval.benchmarks import Question

UNREADABLE = (OSError, ValueError)
"""Errors that Pillow raises for a file that is not an image, or a broken or huge one."""


@dataclass
class Task:
    """One generation, and the questions that its text answers.

    Attributes:
        prompt: the user's turn without the image token.
        images: its pictures in order, paths or encoded bytes.
        image_key: equal for the same pictures; None without pictures.
        questions: the questions with this (image, prompt) pair (POPE repeats 43 % of its pairs).
    """

    prompt: str
    images: tuple[Path | bytes, ...]
    image_key: str | None
    questions: list[Question] = field(default_factory=list)


@dataclass
class Batch:
    """Tasks that are generated together.

    Attributes:
        tasks: in order.
        load: pictures that no earlier batch shows, by image key.
        drop: image keys that no later batch has.
    """

    tasks: list[Task]
    load: dict[str, tuple[Path | bytes, ...]] = field(default_factory=dict)
    drop: set[str] = field(default_factory=set)


def pair_of(question: Question) -> tuple[str | None, str]:
    """The picture and prompt, on which the answer depends."""
    return question.image_key, question.prompt


def tasks_of(questions: Iterable[Question]) -> list[Task]:
    """The distinct (image, prompt) pairs of some questions, in the order in which they first occur."""
    tasks: dict[Hashable, Task] = {}
    for question in questions:
        pair = pair_of(question)
        if pair not in tasks:
            tasks[pair] = Task(question.prompt, question.images, question.image_key)
        tasks[pair].questions.append(question)
    return list(tasks.values())


def in_order(tasks: Iterable[Task], shard: int = 0, shards: int = 1) -> list[Task]:
    """One process's share of the tasks, in the best order.

    Questions about one picture stay together, so that one process decodes and encodes it once. The groups are sorted by
    length, longest first: batches then have little padding, a batch that is too large for the memory fails at once, and
    the remaining time is over- rather than underestimated. The shards take the groups in turn.
    """
    groups: dict[Hashable, list[Task]] = {}
    for number, task in enumerate(tasks):
        groups.setdefault(number if task.image_key is None else task.image_key, []).append(task)
    for group in groups.values():
        group.sort(key=_length, reverse=True)
    ordered = sorted(groups.values(), key=lambda group: _length(group[0]), reverse=True)
    return [task for group in ordered[shard::shards] for task in group]


def _length(task: Task) -> tuple[int, int]:
    """Sort key: first the number of pictures, whose visual tokens outnumber the words, then the characters."""
    return len(task.images), len(task.prompt)


def batches_of(tasks: Sequence[Task], batch_size: int) -> list[Batch]:
    """Cut ordered tasks into batches, and record in which batch a picture is needed first and last."""
    batches = [Batch(list(tasks[start : start + batch_size])) for start in range(0, len(tasks), batch_size)]
    first: dict[str, int] = {}
    last: dict[str, int] = {}
    for number, batch in enumerate(batches):
        for task in batch.tasks:
            if task.image_key is not None:
                if task.image_key not in first:
                    first[task.image_key] = number
                    batch.load[task.image_key] = task.images
                last[task.image_key] = number
    for key, number in last.items():
        batches[number].drop.add(key)
    return batches


def open_image(image: Path | bytes) -> Image.Image:
    """A decoded picture.

    Raises:
        FileNotFoundError, BadImageError: it does not exist, or does not decode.
    """
    with opened(image) as one:
        one.load()
        return one


@dataclass
class Prepared:
    """A batch prepared by a worker.

    Attributes:
        prompts: token ids [T] of each task.
        pixels: image key -> [n, 3, H, W], for the keys of `Batch.load` whose pictures could all be read.
        unreadable: image key -> reason, for the others.
    """

    prompts: list[Tensor]
    pixels: dict[str, Tensor]
    unreadable: dict[str, str]


class Prefetched(Dataset):
    """Batches with tokenised prompts and with the new pictures decoded, resized and normalised.

    Args:
        batches: from `batches_of`.
        prompt_ids: text and number of images -> token ids [T].
        pixels_of: picture -> pixel values [3, H, W].
    """

    def __init__(
        self,
        batches: Sequence[Batch],
        prompt_ids: Callable[[str, int], Tensor],
        pixels_of: Callable[[Image.Image], Tensor],
    ) -> None:
        self.batches = batches
        self.prompt_ids = prompt_ids
        self.pixels_of = pixels_of

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, index: int) -> Prepared:
        batch = self.batches[index]
        prompts = [self.prompt_ids(task.prompt, len(task.images)) for task in batch.tasks]
        prepared = Prepared(prompts, {}, {})
        for key, images in batch.load.items():
            try:
                prepared.pixels[key] = torch.stack([self.pixels_of(open_image(image)) for image in images])
            except UNREADABLE as error:
                prepared.unreadable[key] = str(error) or type(error).__name__
        return prepared

    def loader(self, num_workers: int) -> Iterable[Prepared]:
        """The batches in order, prepared ahead by `num_workers` processes (0: on demand, in this process)."""
        # Forking is quick, and the workers end with this process however it ends. A fork server's would outlive it.
        context = "fork" if num_workers else None
        return DataLoader(self, batch_size=None, num_workers=num_workers, multiprocessing_context=context)
