"""One benchmark, one checkpoint, one folder of answers: from the checks before to the completeness after."""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import shortuuid
import torch
from tqdm import tqdm

from ..model.checkpoint import read_config
from ..model.weights import resolve_folder
from .answers import AnswerFolder, AnswerWriter, check_keys, in_question_order, split_answered
from .batches import UNREADABLE, Prefetched, Task, batches_of, in_order, open_image, pair_of, tasks_of
from .benchmarks import Benchmark, BenchmarkFactory, Question
from .benchmarks.base import prepare_hint
from .generate import Answerer, check_device, default_device, dtype_of, image_policy_of, template_of
from .processes import Processes
from .provenance import PROMPT_PROTOCOL, checkpoint_digest, describe_parts, package_versions

logger = logging.getLogger(__name__)

MISSING_FILE = "missing.json"


class Incomplete(ValueError):
    """Questions are left without an answer."""


@dataclass
class Job:
    """One benchmark, one checkpoint, one folder.

    Attributes:
        questions: all of the split.
        wanted: those to be answered now (`--limit`).
        answers: the files.
    """

    benchmark: Benchmark
    questions: list[Question]
    wanted: list[Question]
    answers: AnswerFolder
    arguments: argparse.Namespace
    processes: Processes = field(default_factory=Processes)

    @classmethod
    def of(cls, arguments: argparse.Namespace, processes: Processes) -> Job:
        """Read the questions.

        Raises:
            FileNotFoundError: the data are not there.
            ValueError: the benchmark is unknown, or its data are malformed.
        """
        benchmark = BenchmarkFactory(arguments.benchmark)
        questions = list(benchmark.questions(arguments.data_dir, arguments.split))
        if not questions:
            raise ValueError(f"{benchmark.title} has no questions in {arguments.data_dir}.")
        wanted = questions[: arguments.limit]
        return cls(benchmark, questions, wanted, AnswerFolder(arguments.output_dir), arguments, processes)

    @property
    def split(self) -> str:
        """The split whose questions these are."""
        return self.benchmark.split_of(self.arguments.data_dir, self.arguments.split)

    @property
    def max_new_tokens(self) -> int:
        """The benchmark's own length limit (LLaVA's), unless the user sets another."""
        return self.arguments.max_new_tokens or self.benchmark.max_new_tokens


def describe(job: Job) -> dict[str, Any]:
    """The `run` object: how the answers are made. Fails early where the checkpoint or the flags are wrong.

    Raises:
        FileNotFoundError: there is no such checkpoint.
        ValueError: it is no TinyLLaVA, or its conversation template is unknown.
    """
    arguments = job.arguments
    folder = resolve_folder(arguments.model_path)
    config = read_config(folder)
    device = check_device(arguments.device or default_device())
    return {
        "model_name": arguments.model_name,
        "model_path": arguments.model_path,
        "checkpoint_digest": checkpoint_digest(folder),
        **describe_parts(config),
        "benchmark": job.benchmark.name,
        "split": job.split,
        "prompt_protocol": PROMPT_PROTOCOL,
        "conversation_template": template_of(config, arguments.conv_mode, arguments.model_path),
        "image_aspect_ratio": image_policy_of(config, arguments.image_aspect_ratio),
        "decoding": {
            "do_sample": False,
            "num_beams": 1,
            "repetition_penalty": 1.0,
            "max_new_tokens": job.max_new_tokens,
            "dtype": str(dtype_of(config, arguments.dtype, device)).removeprefix("torch."),
        },
        "batch_size": arguments.batch_size,
        "processes": job.processes.world,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
        "packages": package_versions(),
    }


def check_images(job: Job) -> None:
    """Look for the image files before the model is loaded.

    Raises:
        FileNotFoundError: some are not there (only a warning with ``--skip-bad-images``).
    """
    paths = {question.image for question in job.wanted if isinstance(question.image, Path)}
    absent = sorted(path for path in paths if not path.is_file())
    if not absent:
        return
    message = (
        f"{len(absent):,} of {len(paths):,} images of {job.benchmark.title} do not exist, the first is {absent[0]}"
    )
    if not job.arguments.skip_bad_images:
        hint = prepare_hint(job.benchmark.name)
        raise FileNotFoundError(f"{message}. {hint}, or pass --skip-bad-images to leave their questions unanswered.")
    logger.warning("%s.", message)


def set_up(job: Job) -> dict[str, Any]:
    """What process 0 does before the others begin: check everything, take the folder, tidy it up.

    Returns:
        the `run` object.
    """
    check_keys(job.questions, job.arguments.data_dir)
    check_images(job)
    run = describe(job)
    job.answers.lock(0)
    job.answers.repair()
    job.answers.claim(run)
    return run


def generate(job: Job) -> None:
    """Answer this process's share of what is not answered yet."""
    rows = job.answers.read()
    job.processes.meet()
    job.processes.leave()  # from here on the files change, and nobody waits for anybody
    answered, pending = split_answered(job.wanted, rows)
    known = {pair_of(question): rows[question.key][0]["text"] for question in answered}
    repeated = [question for question in pending if pair_of(question) in known]
    tasks = in_order(
        tasks_of(question for question in pending if pair_of(question) not in known),
        job.processes.rank,
        job.processes.world,
    )
    with job.answers.writer(job.processes.rank) as writer:
        if job.processes.first:
            if answered:
                logger.info("%d of %d questions are answered already.", len(answered), len(job.wanted))
            writer.write(answer_row(job, question, known[pair_of(question)]) for question in repeated)
        if tasks:
            arguments = job.arguments
            answerer = Answerer.from_pretrained(
                arguments.model_path,
                device=arguments.device,
                dtype=arguments.dtype,
                conv_mode=arguments.conv_mode,
                image_aspect_ratio=arguments.image_aspect_ratio,
                attn_implementation=arguments.attn_implementation,
            )
            ask(job, answerer, tasks, writer)


def ask(job: Job, answerer: Answerer, tasks: Sequence[Task], writer: AnswerWriter) -> None:
    """Generate batch by batch; an answer is on the disk before the next batch begins."""
    batches = batches_of(tasks, job.arguments.batch_size)
    workers = job.arguments.num_workers
    if workers is None:
        workers = 4 if answerer.model.device.type == "cuda" else 0
    prefetched = Prefetched(batches, answerer.prompt_ids, answerer.pixels_of).loader(workers)
    visual: dict[str, torch.Tensor] = {}  # [1, K, D] of each picture that this batch or a later one shows
    with progress_bar(job, sum(len(task.questions) for task in tasks)) as bar:
        for batch, prepared in zip(batches, prefetched, strict=True):
            for key, reason in prepared.unreadable.items():
                logger.warning("An image cannot be read (%s): %s", reason, name_of(batch.load[key]))
            if prepared.pixels:
                encoded = answerer.encode_images(torch.stack(list(prepared.pixels.values())))  # [I, K, D]
                visual.update(zip(prepared.pixels, encoded.split(1), strict=True))
            ready = [
                (task, prompt)
                for task, prompt in zip(batch.tasks, prepared.prompts, strict=True)
                if task.image_key is None or task.image_key in visual
            ]
            texts = answerer.answer(
                [prompt for _, prompt in ready], [visual.get(task.image_key) for task, _ in ready], job.max_new_tokens
            )
            writer.write(
                answer_row(job, question, text)
                for (task, _), text in zip(ready, texts, strict=True)
                for question in task.questions
            )
            for key in batch.drop:
                visual.pop(key, None)
            bar.update(sum(len(task.questions) for task in batch.tasks))


def progress_bar(job: Job, total: int) -> tqdm:
    """Done, rate and time left of process 0's share, on stderr; a line every 15 s where that is a file."""
    label = job.benchmark.title
    if job.processes.world > 1:
        label += f" (process 0 of {job.processes.world})"
    interval = 0.1 if sys.stderr.isatty() else 15
    return tqdm(
        total=total, desc=label, unit=" answers", disable=not job.processes.first, mininterval=interval, miniters=1
    )


def answer_row(job: Job, question: Question, text: str) -> dict[str, Any]:
    """The row of the answers file."""
    return question.answer_row(text, answer_id=shortuuid.uuid(), model_id=job.arguments.model_name)


def name_of(image: Path | bytes) -> str:
    """What to call a picture in a message."""
    return str(image) if isinstance(image, Path) else f"an encoded image of {len(image)} bytes"


def finish(job: Job, run: Mapping[str, Any]) -> dict[str, Any]:
    """Wait for the other processes, check that nothing is missing, and merge.

    Returns:
        the `run` object with its counts.

    Raises:
        Incomplete: questions have no answer; the answers there are stay where they are.
    """
    for process in range(1, job.processes.world):
        job.answers.wait_for(process)
    job.answers.repair()
    rows = job.answers.read()
    _, missing = split_answered(job.wanted, rows)
    unreadable = unreadable_images(missing)
    (job.answers.folder / MISSING_FILE).unlink(missing_ok=True)
    if missing:
        message = note_missing(job, missing, unreadable)
        if unreadable is None or not job.arguments.skip_bad_images:
            raise Incomplete(message)
    job.answers.merge(in_question_order(job.questions, rows, job.answers.folder))
    answered, unanswered = split_answered(job.questions, rows)
    run = {
        **run,
        "limit": job.arguments.limit if len(unanswered) > len(missing) else None,
        "counts": {
            "questions": len(job.questions),
            "answered": len(answered),
            "generated": len({pair_of(question) for question in answered}),
            "images": len({question.image_key for question in answered} - {None}),
            "unreadable_images": len(unreadable or ()),
        },
    }
    job.answers.write_run(run)
    logger.info("%s: %d answers in %s.", job.benchmark.title, len(answered), job.answers.merged)
    return run


def unreadable_images(missing: Sequence[Question]) -> dict[str, str] | None:
    """Why the pictures of unanswered questions cannot be read; None as soon as one can, or there is none to blame."""
    reasons: dict[str, str] = {}
    for question in missing:
        if question.image is None:
            return None
        name = name_of(question.image)
        if name in reasons:
            continue
        try:
            open_image(question.image)
        except UNREADABLE as error:
            reasons[name] = str(error) or type(error).__name__
        else:
            return None
    return reasons


def note_missing(job: Job, missing: Sequence[Question], unreadable: Mapping[str, str] | None = None) -> str:
    """Write down which questions have no answer; returns what is missing, why, and what to do about it."""
    path = job.answers.folder / MISSING_FILE
    names = [{"question_id": question.question_id, "prompt": question.key[1]} for question in missing]
    path.write_text(json.dumps(names, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    named = ", ".join(repr(question.question_id) for question in missing[:5]) + (", ..." if len(missing) > 5 else "")
    message = (
        f"{len(missing):,} of {len(job.wanted):,} questions of {job.benchmark.title} have no answer: {named} "
        f"(all in {path}). "
    )
    if unreadable:
        name, reason = next(iter(unreadable.items()))
        return message + (
            f"{len(unreadable)} image(s) cannot be read, the first is {name} ({reason}). The other answers are kept: "
            f"repair the images and repeat the command, or pass --skip-bad-images to leave these questions unanswered."
        )
    return message + "A process has ended early. The other answers are kept: repeat the command to go on."


def still_open(job: Job) -> str:
    """The same of a run that is being stopped, while other processes may yet be writing."""
    try:
        _, missing = split_answered(job.wanted, job.answers.read())
    except ValueError:  # half a line of another process
        return "Not all questions have an answer. The answers made are kept: repeat the command to go on."
    return note_missing(job, missing) if missing else "All questions have an answer: repeat the command to merge them."
