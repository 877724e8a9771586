"""One benchmark, one checkpoint, one folder of answers: the checks, the generation, and the merge at the end."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import shortuuid
import torch
from tqdm import tqdm

from tinyllava_switchkd.constants import SPLIT_FOLDERS
from tinyllava_switchkd.data.image import ImagePreprocess
from tinyllava_switchkd.eval.answers import AnswerFolder, AnswerWriter, check_keys, in_question_order, split_answered
from tinyllava_switchkd.eval.batches import (
    UNREADABLE,
    Prefetched,
    Task,
    batches_of,
    in_order,
    open_image,
    pair_of,
    tasks_of,
)
from tinyllava_switchkd.eval.benchmarks import Benchmark, BenchmarkFactory, Question
from tinyllava_switchkd.eval.benchmarks.files import prepare_hint
from tinyllava_switchkd.eval.cache import ResponseCache
from tinyllava_switchkd.eval.generate import Answerer, Setting
from tinyllava_switchkd.eval.guesses import Guesses
from tinyllava_switchkd.eval.processes import Processes
from tinyllava_switchkd.io import JsonObject, digest_of_files, read_json, write_json
from tinyllava_switchkd.model.weights import shard_names
from tinyllava_switchkd.runtime import versions

logger = logging.getLogger(__name__)

MISSING_FILE = "missing.json"

PROMPT_PROTOCOL = "LLaVA-1.5: one turn, the image first, then the question file's text as it is"

PACKAGES = ("torch", "transformers", "tokenizers", "accelerate", "timm", "open_clip_torch", "pillow")

_FILES = (
    *("model*.safetensors", "pytorch_model*.bin", "adapter_model*.safetensors", "adapter_model*.bin"),
    *("config.json", "adapter_config.json", "preprocessor_config.json", "generation_config.json"),
    *("tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json", "added_tokens.json", "*.jinja"),
)


@dataclass
class Job:
    """One benchmark, one checkpoint, one folder.

    Attributes:
        questions: all questions of the split.
        wanted: those to answer (`--limit`).
        answers: the files.
        cache: answers of other runs, with `--response_cache`.
    """

    benchmark: Benchmark
    questions: list[Question]
    wanted: list[Question]
    answers: AnswerFolder
    arguments: argparse.Namespace
    processes: Processes = field(default_factory=Processes)
    cache: ResponseCache | None = None

    @classmethod
    def of(cls, arguments: argparse.Namespace, processes: Processes) -> Job:
        """Read the questions.

        Raises:
            FileNotFoundError: the data do not exist.
            ValueError: the benchmark is unknown, or its data are malformed.
        """
        benchmark = BenchmarkFactory(arguments.benchmark)
        benchmark.configure(arguments.options)
        questions = list(benchmark.questions(arguments.data_dir, arguments.split))
        if not questions:
            raise ValueError(f"{benchmark.title} has no questions in {arguments.data_dir}.")
        wanted = questions[: arguments.limit]
        return cls(benchmark, questions, wanted, AnswerFolder(arguments.output_dir), arguments, processes)

    @cached_property
    def setting(self) -> Setting:
        """The checkpoint and how it is asked.

        Raises:
            FileNotFoundError: there is no such checkpoint.
            ValueError: it is not a TinyLLaVA, or its conversation template is unknown.
        """
        arguments = self.arguments
        return Setting.of(
            arguments.model_path,
            device=arguments.device,
            dtype=arguments.dtype,
            template=arguments.template,
            image_aspect_ratio=arguments.image_aspect_ratio,
            attn_implementation=arguments.attn_implementation,
        )

    @cached_property
    def pixels_of(self) -> ImagePreprocess:
        """Picture -> pixel values; `generate` sets it where it loads the model."""
        return Answerer.load(self.setting).pixels_of

    @property
    def split(self) -> str:
        """The split of the questions."""
        return self.benchmark.split_of(self.arguments.data_dir, self.arguments.split)

    @property
    def max_new_tokens(self) -> int:
        """The benchmark's own length limit (LLaVA's), unless the user sets another."""
        return self.arguments.max_new_tokens or self.benchmark.max_new_tokens


def describe(job: Job) -> JsonObject:
    """The `run` object: how the answers are made."""
    arguments, setting = job.arguments, job.setting
    device = setting.device
    return {
        "model_name": arguments.model_name,
        "model_path": arguments.model_path,
        "checkpoint_digest": checkpoint_digest(setting.folder),
        "language_model": setting.config.llm_model_name_or_path,
        "vision_tower": setting.config.vision_model_name_or_path,
        "connector": setting.config.connector_type,
        "benchmark": job.benchmark.name,
        "split": job.split,
        "options": dict(job.benchmark.settings),
        "prompt_protocol": PROMPT_PROTOCOL,
        "conversation_template": setting.template,
        "image_aspect_ratio": setting.image_aspect_ratio,
        "decoding": {
            "do_sample": False,
            "num_beams": 1,
            "repetition_penalty": 1.0,
            "max_new_tokens": job.max_new_tokens,
            "dtype": str(setting.dtype).removeprefix("torch."),
        },
        "batch_size": arguments.batch_size,
        "processes": job.processes.world,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
        "packages": versions(PACKAGES),
    }


def checkpoint_digest(folder: str | Path) -> str:
    """SHA-256 of everything that a checkpoint's answers depend on: weights, configuration, tokenizer, image processor.

    Optimiser states, logs and the model card do not count.

    Args:
        folder: the checkpoint, of any layout (also with parts in subfolders).

    Returns:
        ``sha256:`` and 64 hexadecimal digits.

    Raises:
        ValueError: an index of shards is malformed.
    """
    folder = Path(folder)
    places = ("", *(f"{part}/" for part in SPLIT_FOLDERS))
    found = {file for place in places for name in _FILES for file in folder.glob(place + name)}
    for index in [file for place in places for file in folder.glob(f"{place}*.index.json")]:
        found |= {index.parent / name for name in shard_names(index)}  # shards may have any name
    return f"sha256:{digest_of_files(folder, filter(Path.is_file, found))}"


def check_images(job: Job) -> None:
    """Check that the image files exist, before the model is loaded.

    Raises:
        FileNotFoundError: some do not (only a warning with ``--skip_bad_images``).
    """
    paths = {image for question in job.wanted for image in question.images if isinstance(image, Path)}
    absent = sorted(path for path in paths if not path.is_file())
    if not absent:
        return
    message = (
        f"{len(absent):,} of {len(paths):,} images of {job.benchmark.title} do not exist, the first is {absent[0]}"
    )
    if not job.arguments.skip_bad_images:
        hint = prepare_hint(job.benchmark.name)
        raise FileNotFoundError(f"{message}. {hint}, or pass --skip_bad_images to leave their questions unanswered.")
    logger.warning("%s.", message)


def set_up(job: Job) -> None:
    """The work of process 0 before the others begin: check everything, lock the folder, repair its files."""
    check_keys(job.questions, job.arguments.data_dir)
    check_images(job)
    run = describe(job)
    job.answers.lock(0)
    job.answers.repair()
    job.answers.claim(run)


def generate(job: Job) -> None:
    """Answer this process's share of the unanswered questions."""
    rows = job.answers.read()
    job.processes.meet()
    job.processes.leave()  # from here on the files change, and no process waits for another
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
        if job.arguments.response_cache is not None:
            tasks = read_cache(job, tasks, writer)
        if tasks:
            answerer = Answerer.load(job.setting)
            job.pixels_of = answerer.pixels_of
            answerer.guesses = Guesses() if job.arguments.guess_answers else None
            ask(job, answerer, tasks, writer)


def read_cache(job: Job, tasks: Sequence[Task], writer: AnswerWriter) -> list[Task]:
    """Write the answers found in the response cache; returns the remaining tasks."""
    job.cache = ResponseCache(job.arguments.response_cache, read_json(job.answers.run_file))
    known = job.cache.get(tasks)
    writer.write(
        answer_row(job, question, text) for place, text in known.items() for question in tasks[place].questions
    )
    if known:
        logger.info("%d of %d answers are taken from %s.", len(known), len(tasks), job.cache.path)
    return [task for place, task in enumerate(tasks) if place not in known]


def ask(job: Job, answerer: Answerer, tasks: Sequence[Task], writer: AnswerWriter) -> None:
    """Generate batch by batch; each batch's answers are written before the next batch begins."""
    size = job.arguments.batch_size
    if size == "auto":
        size = answerer.auto_batch_size(
            max(len(task.prompt) for task in tasks), max(len(task.images) for task in tasks), job.max_new_tokens
        )
        logger.info("%s: %d questions at once.", job.benchmark.title, size)
    batches = batches_of(tasks, size)
    workers = job.arguments.num_workers
    if workers is None:
        workers = 4 if answerer.model.device.type == "cuda" else 0
    prefetched = Prefetched(batches, answerer.prompt_ids, answerer.pixels_of).loader(workers)
    visual: dict[str, torch.Tensor] = {}  # [n, K, D] of the pictures that this or a later batch shows
    with progress_bar(job, sum(len(task.questions) for task in tasks)) as bar:
        for batch, prepared in zip(batches, prefetched, strict=True):
            for key, reason in prepared.unreadable.items():
                logger.warning("An image cannot be read (%s): %s", reason, name_of(batch.load[key]))
            if prepared.pixels:
                encoded = answerer.encode_images(torch.cat(list(prepared.pixels.values())))  # [I, K, D]
                counts = [len(pixels) for pixels in prepared.pixels.values()]
                visual.update(zip(prepared.pixels, encoded.split(counts), strict=True))
            ready = [
                (task, prompt)
                for task, prompt in zip(batch.tasks, prepared.prompts, strict=True)
                if task.image_key is None or task.image_key in visual
            ]
            texts = answerer.answer(
                [prompt for _, prompt in ready],
                [None if task.image_key is None else visual[task.image_key] for task, _ in ready],
                job.max_new_tokens,
            )
            writer.write(
                answer_row(job, question, text)
                for (task, _), text in zip(ready, texts, strict=True)
                for question in task.questions
            )
            if job.cache is not None:
                job.cache.put((task, text) for (task, _), text in zip(ready, texts, strict=True))
            for key in batch.drop:
                visual.pop(key, None)
            bar.update(sum(len(task.questions) for task in batch.tasks))


def progress_bar(job: Job, total: int) -> tqdm:
    """Progress of process 0's share on stderr; if stderr is a file, one line every 15 s."""
    label = job.benchmark.title
    if job.processes.world > 1:
        label += f" (process 0 of {job.processes.world})"
    interval = 0.1 if sys.stderr.isatty() else 15
    return tqdm(
        total=total, desc=label, unit=" answers", disable=not job.processes.first, mininterval=interval, miniters=1
    )


def answer_row(job: Job, question: Question, text: str) -> JsonObject:
    """The row of the answers file."""
    return question.answer_row(text, answer_id=shortuuid.uuid(), model_id=job.arguments.model_name)


def name_of(images: Sequence[Path | bytes]) -> str:
    """A question's pictures, for messages."""
    return ", ".join(
        str(image) if isinstance(image, Path) else f"an encoded image of {len(image)} bytes" for image in images
    )


def finish(job: Job) -> None:
    """Wait for the other processes, check that nothing is missing, merge, and write the counts to `run.json`.

    Raises:
        ValueError: questions have no answer; the existing answers are kept.
    """
    for process in range(1, job.processes.world):
        job.answers.wait_for(process)
    job.answers.repair()
    rows = job.answers.read()
    _, missing = split_answered(job.wanted, rows)
    unreadable = unreadable_images(job, missing)
    (job.answers.folder / MISSING_FILE).unlink(missing_ok=True)
    if missing:
        message = note_missing(job, missing, unreadable)
        if unreadable is None or not job.arguments.skip_bad_images:
            raise ValueError(message)
    job.answers.merge(in_question_order(job.questions, rows, job.answers.folder))
    answered, unanswered = split_answered(job.questions, rows)
    run = read_json(job.answers.run_file) | {
        "limit": job.arguments.limit if len(unanswered) > len(missing) else None,
        "counts": {
            "questions": len(job.questions),
            "answered": len(answered),
            "generated": len({pair_of(question) for question in answered}),
            "images": len({key for question in answered for key in (question.image_key or "").split("\n")} - {""}),
            "unreadable_images": len(unreadable or ()),
        },
    }
    write_json(job.answers.run_file, run)
    logger.info("%s: %d answers in %s.", job.benchmark.title, len(answered), job.answers.merged)


def unreadable_images(job: Job, missing: Sequence[Question]) -> dict[str, str] | None:
    """Picture -> why it cannot be read or prepared; None if any question has no pictures or only usable ones."""
    reasons: dict[str, str] = {}
    for question in missing:
        if not question.images:
            return None
        name = name_of(question.images)
        if name in reasons:
            continue
        try:
            for image in question.images:
                job.pixels_of(open_image(image))
        except UNREADABLE as error:
            reasons[name] = str(error) or type(error).__name__
        else:
            return None
    return reasons


def note_missing(job: Job, missing: Sequence[Question], unreadable: Mapping[str, str] | None = None) -> str:
    """Write the list of unanswered questions; returns a message with what is missing, why, and the remedy."""
    path = job.answers.folder / MISSING_FILE
    names = [{"question_id": question.question_id, "prompt": question.key[1]} for question in missing]
    write_json(path, names, indent=1)
    named = ", ".join(repr(question.question_id) for question in missing[:5]) + (", ..." if len(missing) > 5 else "")
    message = (
        f"{len(missing):,} of {len(job.wanted):,} questions of {job.benchmark.title} have no answer: {named} "
        f"(all in {path}). "
    )
    if unreadable:
        name, reason = next(iter(unreadable.items()))
        return message + (
            f"{len(unreadable)} image(s) cannot be read, the first is {name} ({reason}). The other answers are kept: "
            f"repair the images and repeat the command, or pass --skip_bad_images to leave these questions unanswered."
        )
    return message + "A process has ended early. The other answers are kept: repeat the command to continue."


def still_open(job: Job) -> str:
    """As `note_missing`, for a run that is being stopped while other processes may still write."""
    try:
        _, missing = split_answered(job.wanted, job.answers.read())
    except ValueError:  # half a line of another process
        return "Not all questions have an answer. The answers so far are kept: repeat the command to continue."
    return note_missing(job, missing) if missing else "All questions have an answer: repeat the command to merge them."
