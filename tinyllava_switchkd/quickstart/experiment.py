"""Runs of the quickstart: data, bases, teacher and students, each made once and then reused.

All trainings call the usual entry point (`tinyllava_switchkd.train.train.main`) in this process, with a dict of flags
in place of the arguments that ``scripts/train/*.sh`` pass. For a comparison of your own::

    experiment = Experiment(Path("playground/mine"))
    for seed in (1, 2, 3):
        flags = {"teacher_path": experiment.teacher(), "distill_loss": "fkl"}
        print(experiment.scores(experiment.student("fkl", seed, flags))["score"])
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import logging
import os
import shutil
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from tinyllava_switchkd.io import JsonObject, digest, read_json, write_json
from tinyllava_switchkd.launch import stages
from tinyllava_switchkd.quickstart import scenes
from tinyllava_switchkd.quickstart.base_models import CONV_VERSION, SHIPPED

MADE = "made.json"
"""A file in every finished folder that records what the folder was made from. A folder without it is made again."""

CONNECTOR = "mlp2x_gelu"

TOWER = "base-siglip"
"""The shipped base vision tower."""

COMMON = {
    "connector_type": CONNECTOR,
    "training_recipe": "common",
    "model_max_length": 256,  # tokens, including the image's; the longest conversation has about 120
    "per_device_train_batch_size": 16,
    "num_train_epochs": 1,
    "weight_decay": 0.01,
    "adam_beta2": 0.98,
    "max_grad_norm": 1.0,
    "warmup_steps": 0.05,
    "lr_scheduler_type": "cosine",
    "mm_vision_select_layer": -1,
    # One visual token per cell; TinyLLaVA's "patch" would drop the first one, a quarter of the scene.
    "mm_vision_select_feature": "cls_patch",
    "keep_in_memory": True,  # a few hundred scenes, each used dozens of times
    "save_strategy": "no",  # a stage takes a minute, so resuming is not needed
    "report_to": "none",
    "use_cpu": True,
    "gradient_checkpointing": False,
}
"""Flags of every stage."""

PRETRAIN = {
    "template": CONV_VERSION,  # the only template that the base language models know
    "learning_rate": 3e-3,
    "tune_type_llm": "frozen",
    "tune_type_vision_tower": "frozen",
    "tune_type_connector": "full",
}
"""Flags of pre-training (PT), as in scripts/train/pretrain.sh."""

FINETUNE = {
    "template": CONV_VERSION,
    "learning_rate": 2e-3,
    "vision_tower_lr": 1e-3,
    "tune_type_llm": "full",
    "tune_type_vision_tower": "full",
    "tune_type_connector": "full",
}
"""Flags of fine-tuning (SFT), as in scripts/train/finetune.sh; with ``teacher_path``, of distillation."""


class StageError(RuntimeError):
    """A stage failed; the message names it and its log."""


@dataclass(frozen=True)
class Plan:
    """Sizes and settings. They were chosen on validation scenes, without the test scenes."""

    teacher_scenes: int = 10_000
    """Handwriting scenes on which the teacher is adapted."""
    student_scenes: int = 300
    """Handwriting scenes for the student; each seed has others."""
    val_scenes: int = 150
    test_scenes: int = 400
    probe_scenes: int = 400
    """Scenes of training digits on which the linear probe is fitted."""

    teacher_pt_steps: int = 200
    teacher_steps: int = 1200
    student_pt_steps: int = 400
    student_steps: int = 600


class Experiment:
    """Makes models and scores, and everything that they need. What was made before from the same inputs is reused.

    Args:
        root: output folder.
        plan: sizes and settings.
        bases: folder of the base models; default: those shipped with the project.
        say: called with each line of progress.
    """

    def __init__(
        self,
        root: Path,
        plan: Plan | None = None,
        bases: Path = SHIPPED,
        say: Callable[[str], object] = lambda line: None,
    ) -> None:
        self.root, self.plan, self.bases, self.say = Path(root), plan or Plan(), Path(bases), say

    # Data

    def data(self, name: str, domain: str, number: int, seed: int, caption_share: float = 0.1) -> Path:
        """A folder of scenes in LLaVA's format: images, ``captions.json``, ``descriptions.json``, ``questions.json``.

        Args:
            name: folder name.
            domain: one of `scenes.DOMAINS`.
            number: number of scenes from the domain's training split.
            seed: seed of the scenes and the questions about them.
            caption_share: fraction of the scenes that are described in ``questions.json`` instead of asked about.
        """

        def make(folder: Path) -> None:
            made = scenes.make_scenes(domain, "train", number, seed)
            names = scenes.save_images(made, folder / "images", name)
            write_json(folder / "captions.json", scenes.caption_samples(made, names))
            # Used for PT: a frozen language model can teach a new connector only with text that it has learned itself
            write_json(folder / "descriptions.json", scenes.description_samples(made, names, seed))
            samples = scenes.conversation_samples(made, names, seed, caption_share=caption_share)
            write_json(folder / "questions.json", samples)

        folder = self.root / "data" / name
        once(folder, [domain, number, seed, caption_share, digest(scenes.__file__)], make)
        return folder

    def student_data(self, seed: int) -> Path:
        return self.data(f"student{seed}", "handwriting", self.plan.student_scenes, seed)

    # Training

    def train(self, title: str, name: str, flags: Mapping[str, object]) -> Path:
        """Run the training entry point and return its output folder in ``checkpoints``.

        Args:
            title: title to print.
            name: folder name.
            flags: flags of the entry point without dashes, in addition to `COMMON`; flags with value None are omitted.

        Raises:
            StageError: the training failed.
        """
        flags = {key: value for key, value in {**COMMON, **flags}.items() if value is not None}
        flags.setdefault("logging_steps", max(1, min(10, int(str(flags.get("max_steps", 1))) // 40)))
        folder, log = self.root / "checkpoints" / name, self.root / "logs" / f"{name}.log"

        def make(folder: Path) -> dict[str, float]:
            from tinyllava_switchkd.train.train import main

            started = time.process_time()
            call(title, main, [*words_of(flags), "--output_dir", folder], log)
            seconds = time.process_time() - started
            self.say(f"  {title:<38} {flags.get('max_steps', ''):>5} steps {seconds:6.1f} s")
            return {"seconds": seconds}

        once(folder, {key: _content(value) for key, value in flags.items() if key != "teacher_cache"}, make)
        return folder

    def base(self, name: str) -> Path:
        """The folder of a base model: made for this experiment, or else one of `bases`."""
        made = self.root / "models" / name
        return made if (made / MADE).is_file() else self.bases / name

    def inputs(self, who: str, data: Path, samples: str, tower: str = TOWER) -> dict[str, Path]:
        """Flags that name a run's inputs: the base models of `who`, and a file of samples in a data folder."""
        return {
            "model_name_or_path": self.base(f"base-qwen2-{who}"),
            "vision_tower": self.base(tower),
            "data_path": data / f"{samples}.json",
            "image_folder": data / "images",
        }

    def teacher(self, who: str = "teacher") -> Path:
        """The teacher: base models adapted on many handwriting scenes (PT, then SFT)."""
        plan = self.plan
        data = self.data("teacher", "handwriting", plan.teacher_scenes, 0)
        flags = {**PRETRAIN, **self.inputs(who, data, "descriptions"), "max_steps": plan.teacher_pt_steps, "seed": 0}
        start = self.train("Teacher: PT", run_name(who, "handwriting", "pretrain"), flags)
        flags = {**FINETUNE, **self.inputs(who, data, "questions"), "max_steps": plan.teacher_steps, "seed": 0}
        flags["pretrained_model_path"] = start
        return self.train("Teacher: SFT", run_name(who, "handwriting", "finetune"), flags)

    def student_start(
        self,
        seed: int,
        flags: Mapping[str, object] | None = None,
        way: str = "pretrain",
        who: str = "student",
        tower: str = TOWER,
    ) -> Path:
        """The starting point of a seed's students: the base models after PT on the seed's few scenes.

        Args:
            seed: seed of data and order.
            flags: override those of PT; ``teacher_path`` makes it a distilled pre-training.
            way: name of the way of training, the end of the folder's name.
            who: name of the base language model.
            tower: the base vision tower.
        """
        inputs = self.inputs(who, self.student_data(seed), "descriptions", tower)
        settings = {**PRETRAIN, **inputs, "max_steps": self.plan.student_pt_steps, "seed": seed, **(flags or {})}
        return self.train(f"Student {seed}: {way}", run_name(who, f"seed{seed}", way, tower), settings)

    def student(
        self,
        way: str,
        seed: int,
        flags: Mapping[str, object] | None = None,
        start: Path | None = None,
        who: str = "student",
        tower: str = TOWER,
    ) -> Path:
        """A student of a seed, trained from `student_start`.

        All ways of training share data, order, steps and learning rate, unless the flags change them.

        Args:
            way: name of the way of training, the end of the folder's name.
            seed: seed of data and order.
            flags: override those of SFT; ``teacher_path`` makes it a distillation.
            start: checkpoint to start from; default: `student_start` of `who` and `tower`.
            who: name of the base language model.
            tower: the base vision tower.
        """
        inputs = self.inputs(who, self.student_data(seed), "questions", tower)
        begin = {"pretrained_model_path": start or self.student_start(seed, who=who, tower=tower)}
        settings = {"max_steps": self.plan.student_steps, "seed": seed, **(flags or {})}
        name = run_name(who, f"seed{seed}", way, tower)
        return self.train(f"Student {seed}: {way}", name, {**FINETUNE, **inputs, **begin, **settings})

    def switch_kd(self) -> dict[str, object]:
        """Flags of Switch-KD with the paper's settings."""
        weights = {"temperature": 3.0, "align_weight": 1.0, "switch_weight": 1.0}
        return {"teacher_path": self.teacher(), "distill_loss": "dbild", **weights}

    # Scores

    def questions(self, split: str) -> scenes.QuestionSet:
        """Handwriting scenes of the validation or test digits, with a question of every type about each."""
        return scenes.question_set("handwriting", split, getattr(self.plan, f"{split}_scenes"), seed=0)

    def scores(self, checkpoint: Path, split: str = "test") -> JsonObject:
        """A checkpoint's answers and scores.

        Returns:
            "score" and "by_type" (exact matches in per cent), "probe" (see `evaluate.probe`), "answers", and "seconds"
            and "steps" of its last training.
        """
        from tinyllava_switchkd.quickstart import evaluate

        def make(folder: Path) -> None:
            asked, answerer = self.questions(split), evaluate.load(checkpoint)
            answers = evaluate.answer_questions(answerer, asked)
            score, by_type = evaluate.accuracy(asked.questions, answers)
            fitted = scenes.make_scenes("handwriting", "train", self.plan.probe_scenes, 10_000)
            probe = evaluate.probe(answerer, fitted, self.questions("val").scenes, asked.scenes)
            found = {"score": score, "by_type": by_type, "probe": probe, "answers": answers}
            write_json(folder / "scores.json", {**found, **training_time(checkpoint)})

        folder = self.root / "scores" / f"{checkpoint.name}-{split}"
        once(
            folder, [_content(checkpoint), asdict(self.plan), digest(scenes.__file__), digest(evaluate.__file__)], make
        )
        return read_json(folder / "scores.json")


def told(name: str, command: Callable[[], object]) -> int:
    """Run a command and return its exit code; report a failure in one sentence after its name."""
    try:
        command()
    except (StageError, ValueError, OSError) as error:
        print(f"\n{name}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"\n{name}: stopped; the next run reuses what is finished.", file=sys.stderr)
        return 130
    return 0


def words_of(flags: Mapping[str, object]) -> list[str]:
    """Flags as command-line arguments."""
    return [word for name, value in flags.items() for word in (f"--{name}", str(value))]


def run_name(who: str, version: str, stage: str, tower: str = TOWER) -> str:
    """The name of an output folder, as in TinyLLaVA."""
    return stages.run_name(f"base-qwen2-{who}", tower, version, stage)


def once(folder: Path, source: object, make: Callable[[Path], Mapping[str, object] | None]) -> None:
    """Make a folder, unless it is already finished and was made from the same source.

    Args:
        folder: the folder.
        source: what it is made from, as a JSON value.
        make: fills the empty folder; the facts that it returns are written to `MADE`.
    """
    mark = hashlib.sha256(json.dumps(source, sort_keys=True, default=str).encode()).hexdigest()
    with contextlib.suppress(OSError, ValueError):
        if read_json(folder / MADE)["mark"] == mark:
            return
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    facts = make(folder) or {}
    write_json(folder / MADE, {"mark": mark, **facts, "source": json.loads(json.dumps(source, default=str))})


def training_time(checkpoint: Path) -> dict[str, float]:
    """Seconds of processor time of a run (without the start of the process), and its steps."""
    return {
        "seconds": float(read_json(checkpoint / MADE)["seconds"]),
        "steps": int(read_json(checkpoint / "trainer_state.json")["global_step"]),
    }


def _content(value: object) -> object:
    """What identifies a flag's value: for a file or folder its content, not its path."""
    if not isinstance(value, Path):
        return value
    if value.is_dir():
        if (value / MADE).is_file():
            return read_json(value / MADE)["mark"]
        files = sorted(file for file in value.rglob("*") if file.is_file())
        return [[str(file.relative_to(value)), digest(file)] for file in files if file.suffix != ".png"]
    return digest(value)


@contextlib.contextmanager
def logged(title: str, log: Path) -> Iterator[None]:
    """Redirect the output of the block to a log; a terminal shows the latest progress bar.

    Raises:
        StageError: the block raised an error; the message contains the end of the log.
    """
    logger = logging.getLogger("tinyllava_switchkd")
    handlers = logger.handlers
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "a", encoding="utf-8") as file:
        screen = _Screen(file, title)
        try:
            with contextlib.redirect_stdout(file), contextlib.redirect_stderr(screen):
                yield
        except (Exception, SystemExit) as error:
            if isinstance(error, Exception):
                file.write(traceback.format_exc())
            file.flush()
            lines = [line for line in log.read_text(encoding="utf-8").splitlines() if line.strip()]
            end = "\n".join("    " + line for line in lines[-8:])
            raise StageError(f"{title} failed; its log is {log}:\n{end}") from error
        finally:
            screen.clear()
            logger.handlers = handlers  # handlers set in the block write to the log, which is closed now


def call(title: str, command: Callable[[list[str]], int], arguments: Sequence[object], log: Path) -> None:
    """Run a command of this package in this process; its output goes to a log.

    Raises:
        StageError: the command failed; the message contains the end of the log.
    """
    words = [str(argument) for argument in arguments]
    with logged(title, log):
        print(title, *words)
        code = command(words)
        if code != 0:
            raise SystemExit(code)


class _Screen(io.TextIOBase):
    """Standard error of a command: written to a log, but progress bars (after a carriage return) are shown."""

    def __init__(self, log: io.TextIOBase, title: str) -> None:
        self.log, self.title, self.terminal = log, title, sys.stderr

    def write(self, text: str) -> int:
        if not text.startswith("\r"):
            return self.log.write(text)
        if self.terminal.isatty():
            width = shutil.get_terminal_size().columns - 1
            self.terminal.write("\r" + f"  {self.title}: {text[1:]}"[:width].ljust(width))
            self.terminal.flush()
        return len(text)

    def flush(self) -> None:
        self.log.flush()

    def clear(self) -> None:
        if self.terminal.isatty():
            self.terminal.write("\r" + " " * (shutil.get_terminal_size().columns - 1) + "\r")


def prepare_environment() -> None:
    """Set libraries up for tiny models: one thread, unless ``OMP_NUM_THREADS`` is set, and no loading bars."""
    from transformers.utils import logging as transformers_logging

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    transformers_logging.disable_progress_bar()
    torch.set_num_threads(int(os.environ.setdefault("OMP_NUM_THREADS", "1")))
