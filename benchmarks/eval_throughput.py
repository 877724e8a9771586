"""Answers per second of the evaluation, compared with one question at a time.

    python -m benchmarks.eval_throughput [--sizes tiny small] [--batch_sizes 1 4 16 32] [--questions 240] [--device cpu]

The questions imitate nine of the ten benchmarks in proportion (VQAv2, 69 % of all, resembles GQA): questions per image,
repeated pairs, length of the text, JPEGs of 640 x 480. The model is random and biased, so that half of the answers have
one token, as in MME, MMBench, POPE, ScienceQA and MMMU, and the others a few. "One at a time" is the loop of LLaVA and
TinyLLaVA v1: open the image, encode it, generate, write the row. The others do what `tinyllava_switchkd.eval.run` does.
All must give the same answers.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import CONFIG_MAPPING, PreTrainedTokenizerFast

from benchmarks._table import machine, readme_cell, write_section
from tinyllava_switchkd.cli import CommandParser
from tinyllava_switchkd.eval.answers import AnswerFolder
from tinyllava_switchkd.eval.batches import Prefetched, in_order, open_image, tasks_of
from tinyllava_switchkd.eval.benchmarks import BenchmarkFactory, Question
from tinyllava_switchkd.eval.generate import Answerer
from tinyllava_switchkd.eval.guesses import Guesses
from tinyllava_switchkd.eval.job import Job, ask
from tinyllava_switchkd.eval.prefix import SharedPrefix
from tinyllava_switchkd.eval.processes import Processes
from tinyllava_switchkd.model import TinyLlavaConfig, TinyLlavaForConditionalGeneration

SIZES = {"tiny": (64, 4, 112, 2.3), "small": (192, 6, 224, 1.3)}
"""Width and depth of language model and tower, side of the images in pixels (patches of 16), bias of `CHOICES`."""
MAX_NEW_TOKENS = 16

# share of the nine benchmarks' 48,485 questions, questions per image, share of distinct pairs, words per prompt
KINDS = {
    "mme": (0.049, 2, 1.0, 20),
    "mmbench": (0.180, 4, 1.0, 60),
    "gqa": (0.259, 32, 1.0, 20),
    "scienceqa": (0.042, 1, 1.0, 90),
    "mmmu": (0.019, 1, 1.0, 90),
    "textvqa": (0.103, 2, 1.0, 50),
    "vizwiz": (0.165, 1, 1.0, 35),
    "pope": (0.184, 18, 0.57, 20),
}
SENTENCE = "what is the small red thing left of a large table behind two old people who are they doing there"
WORDS = SENTENCE.split()
LETTERS = "bcdefghijklmnopqrstuvwxyz"
CHOICES = LETTERS[:4]
BASELINE = "one at a time"


def word_tokenizer() -> PreTrainedTokenizerFast:
    """A word-level tokenizer, so that prompts have as many tokens as real ones."""
    vocabulary = ["<unk>", "<|endoftext|>", *dict.fromkeys(WORDS), *LETTERS]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(vocabulary)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        eos_token="<|endoftext|>",
        pad_token="<|endoftext|>",
        model_max_length=4096,
    )


def make_answerer(size: str, device: str) -> Answerer:
    """A random model, in float32 so that batching does not change answers.

    Half of the answers are one of four letters, as for the questions of MME, MMBench, POPE, ScienceQA and MMMU; the
    others have a few letters.
    """
    hidden, layers, side, favour = SIZES[size]
    shape = {"hidden_size": hidden, "intermediate_size": 4 * hidden, "num_hidden_layers": layers}
    tokenizer = word_tokenizer()
    end = tokenizer.eos_token_id
    config = TinyLlavaConfig(
        llm_model_name_or_path="phi",
        vision_model_name_or_path="clip",
        connector_type="mlp2x_gelu",
        template="phi",
        text_config=CONFIG_MAPPING["phi"](
            **shape,
            num_attention_heads=4,
            vocab_size=len(tokenizer),
            max_position_embeddings=4096,
            initializer_range=2 * hidden**-0.5,
            bos_token_id=None,
            eos_token_id=end,
        ),
        vision_config=CONFIG_MAPPING["clip_vision_model"](
            **shape, num_attention_heads=4, image_size=side, patch_size=16
        ),
    )
    torch.manual_seed(0)
    model = TinyLlavaForConditionalGeneration(config).eval().to(device)
    with torch.no_grad():
        head, bias = model.language_model.lm_head.weight, model.language_model.lm_head.bias
        bias.fill_(-50)
        bias[tokenizer(" ".join(LETTERS)).input_ids] = 0
        bias[tokenizer(" ".join(CHOICES)).input_ids] = favour
        # A direction that means "the answer ends": strong in the four letters, weak in the others.
        over = torch.randn(hidden)
        over /= over.norm()
        embeddings = model.get_input_embeddings().weight
        embeddings[tokenizer(" ".join(LETTERS)).input_ids] += 40 * over
        embeddings[tokenizer(" ".join(CHOICES)).input_ids] += 1000 * over
        head[end] += 2 * over
        bias[end] = -6
    return Answerer(model, tokenizer, model.vision_tower.image_processor, "phi")


def make_questions(total: int, folder: Path) -> list[Question]:
    """Questions of all kinds, with their images on disk."""
    draw = random.Random(0)
    questions: list[Question] = []
    for kind, (share, per_image, distinct, words) in KINDS.items():
        about: dict[Path, list[str]] = {}
        for number in range(max(round(share * total), 2)):
            picture = folder / f"{kind}-{number // per_image}.jpg"
            if picture not in about:
                noise = Image.effect_noise((80, 60), 90).resize((640, 480), Image.Resampling.BICUBIC)
                noise.convert("RGB").save(picture, quality=90)
            earlier = about.setdefault(picture, [])
            if earlier and draw.random() > distinct:
                prompt = draw.choice(earlier)
            else:
                prompt = " ".join(draw.choices(WORDS, k=round(words * draw.uniform(0.6, 1.6)))) + f" ? {number}"
                earlier.append(prompt)
            questions.append(Question(len(questions), prompt, picture))
    draw.shuffle(questions)
    return questions


def one_at_a_time(answerer: Answerer, questions: list[Question], folder: Path) -> dict:
    """The loop of LLaVA and TinyLLaVA v1."""
    answerer.guesses = None
    texts = {}
    with (folder / "answers.jsonl").open("w", encoding="utf-8") as file:
        for question in questions:
            prompt = answerer.prompt_ids(question.prompt)
            pixels = answerer.pixels_of(open_image(question.image))
            visual = answerer.encode_images(pixels[None])
            [text] = answerer.answer([prompt], [visual], MAX_NEW_TOKENS)
            file.write(json.dumps(question.answer_row(text, answer_id="", model_id="")) + "\n")
            texts[str(question.question_id)] = text
    return texts


def in_batches(answerer: Answerer, questions: list[Question], folder: Path, size: int, guessing: bool = True) -> dict:
    """What `tinyllava_switchkd.eval.run` does after loading the model, with or without guessing one-token answers."""
    answerer.guesses = Guesses() if guessing else None
    arguments = argparse.Namespace(batch_size=size, num_workers=0, model_name="", max_new_tokens=MAX_NEW_TOKENS)
    folder_of_answers = AnswerFolder(folder)
    job = Job(BenchmarkFactory("pope"), questions, questions, folder_of_answers, arguments, Processes(rank=1, world=2))
    with folder_of_answers.writer(0) as writer:
        ask(job, answerer, in_order(tasks_of(questions)), writer)
    return {key[0]: rows[0]["text"] for key, rows in folder_of_answers.read().items()}


def profile(size: str, args: argparse.Namespace, root: Path) -> list[list[str]]:
    """The share of each part in the time of an evaluation, at the largest batch size."""
    answerer = make_answerer(size, args.device)
    questions = make_questions(args.questions, root)
    clock = time.process_time if args.device == "cpu" else time.perf_counter
    parts = {
        "preparing images and prompts": (Prefetched, "__getitem__"),
        "vision tower and connector": (Answerer, "encode_images"),
        "shared beginnings of prompts": (SharedPrefix, "compute"),
        "generation": (Answerer, "_answer"),
    }
    spent = dict.fromkeys(parts, 0.0)

    def timed(part: str, function: Callable) -> Callable:
        @functools.wraps(function)
        def run(*inputs: Any, **more: Any) -> Any:
            start = clock()
            result = function(*inputs, **more)
            spent[part] += clock() - start
            return result

        return run

    with contextlib.ExitStack() as patches:
        for part, (owner, name) in parts.items():
            patches.enter_context(mock.patch.object(owner, name, timed(part, getattr(owner, name))))
        for _ in range(2):  # the first round warms up
            spent.update(dict.fromkeys(parts, 0.0))
            start = clock()
            in_batches(answerer, questions, Path(tempfile.mkdtemp(dir=root)), max(args.batch_sizes))
            total = clock() - start
    spent["generation"] -= spent["shared beginnings of prompts"]
    spent["everything else (text of the answers, files)"] = total - sum(spent.values())
    return [[part, f"{100 * seconds / total:.0f} %"] for part, seconds in spent.items()]


def race(
    ways: dict[str, Callable[..., dict]],
    answerer: Answerer,
    questions: list[Question],
    args: argparse.Namespace,
    root: Path,
) -> tuple[list[list[str]], dict[str, str]]:
    """One row per way, relative to the first, and the answers; exits if two ways give different answers."""
    # On a CPU the process's own time, which does not depend on other programs.
    clock = time.process_time if args.device == "cpu" else time.perf_counter
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    expected: dict[str, str] = {}
    for repeat in range(args.repeats + 1):
        for way, run in ways.items():
            folder = Path(tempfile.mkdtemp(dir=root))
            start = clock()
            texts = run(answerer, questions, folder)
            if repeat:  # the first round warms up
                seconds[way].append(clock() - start)
            expected = expected or texts
            if texts != expected:
                raise SystemExit(f"{way}: the answers differ from those of {next(iter(ways))}.")
    medians = {way: statistics.median(values) for way, values in seconds.items()}
    first = next(iter(medians.values()))
    rows = [[way, f"{len(questions) / median:.1f}", f"{first / median:.2f}"] for way, median in medians.items()]
    return rows, expected


def measure(size: str, args: argparse.Namespace, root: Path) -> tuple[list[tuple[list[str], list[list[str]]]], str]:
    """The tables of a size (all questions, and those with one-token answers), and a sentence about it."""
    answerer = make_answerer(size, args.device)
    questions = make_questions(args.questions, root)
    unit = "answers/CPU s" if args.device == "cpu" else "answers/s"
    batches = {f"batch size {size}": functools.partial(in_batches, size=size) for size in args.batch_sizes}
    rows, answers = race({BASELINE: one_at_a_time, **batches}, answerer, questions, args, root)

    lengths = {question: len(text.split()) for question, text in answers.items()}
    short = [question for question in questions if lengths[str(question.question_id)] == 1]
    largest = max(args.batch_sizes)
    ways = {
        "a generate loop": functools.partial(in_batches, size=largest, guessing=False),
        "guessed, in the prompt's pass": functools.partial(in_batches, size=largest),
    }
    short_rows, _ = race(ways, answerer, short, args, root)
    hidden, layers, side, _ = SIZES[size]
    note = (
        f"{size}: {layers} layers of width {hidden} in language model and tower, {answerer.model.num_image_tokens} "
        f"tokens per picture of {side} pixels, {statistics.mean(lengths.values()):.1f} tokens per answer "
        f"(longest {max(lengths.values())}; {100 * len(short) / len(questions):.0f} % have one)"
    )
    tables = [
        ([size, unit, f"x {BASELINE}"], rows),
        ([f"{size}, batch size {largest}: answers of one token", unit, "x a generate loop"], short_rows),
    ]
    return tables, note


def main() -> None:
    parser = CommandParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--batch_sizes", nargs="+", type=int, default=[1, 4, 16, 32])
    parser.add_argument("--questions", type=int, default=240)
    parser.add_argument("--repeats", type=int, default=3, help="rounds after a warm-up; medians are printed")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    tables, notes = [], []
    with tempfile.TemporaryDirectory() as root:
        for size in args.sizes:
            of_size, note = measure(size, args, Path(root))
            tables += of_size
            head = [f"{size}, batch size {max(args.batch_sizes)}: where the time goes", "share"]
            tables.append((head, profile(size, args, Path(root))))
            notes.append(note)
    gains = [float(row[-1]) for _, rows in tables for row in rows if row[0] == "batch size 16"]
    if args.device == "cpu" and gains:
        readme_cell("| benchmark answers per second, batch 16", f"{min(gains):.1f} to {max(gains):.1f}")
    questions = f"About {args.questions} questions in the proportions of the benchmarks, float32, on {args.device}"
    write_section(
        f"evaluation-{args.device}",
        f"Evaluation, answers per second ({args.device})",
        tables,
        machine(),
        note=f"{questions}. Every row gave the same answers. {'; '.join(notes)}.",
    )


if __name__ == "__main__":
    main()
