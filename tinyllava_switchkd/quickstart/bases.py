"""Train the quickstart's three base models from random weights: ``python -m tinyllava_switchkd.quickstart.bases``.

They stand for downloads such as SigLIP and Qwen2.5: a vision tower and two language models that can describe what the
tower sees, here rendered digits. The models shipped with the project were made by this command.

A small model answers a kind of question by chance for some thousand steps, and then learns it within a few hundred.
When this happens differs between random starts. So each model is tested on validation scenes; if it has not learned
every kind of question, it is trained for further rounds, and then again from other random weights.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from tinyllava_switchkd.cli import CommandParser
from tinyllava_switchkd.io import digest
from tinyllava_switchkd.quickstart import base_models, scenes
from tinyllava_switchkd.quickstart.experiment import (
    PRETRAIN,
    Experiment,
    Plan,
    StageError,
    logged,
    once,
    prepare_environment,
    told,
)

if TYPE_CHECKING:
    from transformers import BaseImageProcessor, PreTrainedTokenizerBase

    from tinyllava_switchkd.model.modeling import TinyLlavaForConditionalGeneration as TinyLlava

LEARNED = {"digits": 75, "position": 65, "colour": 65, "where": 90, "read": 30, "yes_no": 62, "choice": 62}
"""Accuracy in per cent that counts as learned: far above chance (10, 10, 10, 25, 0, 50, 50), and as high as is possible
with a tower that reads four of five digits correctly ("read" asks for four digits at once)."""


@dataclass(frozen=True)
class BasePlan:
    """Sizes and settings of the bases."""

    scenes: int = 10_000
    """Training scenes of font digits."""
    val_scenes: int = 100
    layers: int = 2
    towers: tuple[tuple[str, int], ...] = (("base-siglip", 64),)
    """Names and widths of vision towers."""
    companion_width: int = 48
    """Width of the language model that is trained with the tower and then discarded."""
    widths: tuple[tuple[str, int], ...] = (("teacher", 64), ("student", 48))
    """Names and widths of language models."""
    padding: int = 0
    """Vocabulary rows of the language models beyond the tokenizer's."""
    tower_steps: int = 1500
    llm_steps: int = 3000
    rounds: int = 4
    """Largest number of training rounds per start; each begins at the full learning rate again."""
    starts: int = 3
    """Largest number of starts from other random weights."""
    first_start: int = 0
    """Seed of the first start's weights; each further start adds one."""
    learned: Mapping[str, float] = field(default_factory=lambda: dict(LEARNED))
    """Accuracy in per cent that every kind of question must reach on validation scenes."""


def make_bases(
    root: Path, plan: BasePlan | None = None, say: Callable[[str], object] = print, vision_tower: Path | None = None
) -> Path:
    """Train the base tower and both base language models, unless they exist.

    Args:
        root: output folder.
        plan: sizes and settings.
        say: called with each line of progress.
        vision_tower: the tower that the language models are trained with; default: the plan's first.

    Returns:
        the folder with the models, by default ``base-siglip``, ``base-qwen2-teacher`` and ``base-qwen2-student``.

    Raises:
        StageError: a training failed, or a model did not learn every kind of question in any attempt.
    """
    plan = plan or BasePlan()
    bases = _Bases(root, plan, say)
    for name, width in plan.towers:
        bases.settle(name, partial(bases.train_tower, name, width), bases.what_tower_sees, _keep_tower)
    vision_tower = vision_tower or bases.bases / plan.towers[0][0]
    for who, width in plan.widths:
        train = partial(bases.train_llm, who, width, vision_tower)
        bases.settle(f"base-qwen2-{who}", train, bases.what_llm_knows, _keep_llm)
    return bases.bases


class _Bases(Experiment):
    """Trains bases; those that have learned everything are written to the folder ``models``."""

    def __init__(self, root: Path, sizes: BasePlan, say: Callable[[str], object]) -> None:
        super().__init__(root, Plan(), root / "models", say)
        self.sizes = sizes
        # Untrained models have to learn from descriptions what adapted models already know, so they get more of them
        self.train_data = self.data("font", "font", sizes.scenes, 0, caption_share=0.5)
        self.asked = scenes.question_set("font", "val", sizes.val_scenes, seed=0)

    def random(self, name: str, source: Sequence[object], write: Callable[[Path], None]) -> Path:
        """A folder of random weights, created once."""
        made = self.bases / name
        once(made, [*source, [digest(base_models.__file__), digest(scenes.__file__)]], write)
        return made

    def random_llm(self, who: str, width: int, seed: int) -> Path:
        sizes = self.sizes
        write = partial(base_models.write_llm, width=width, layers=sizes.layers, seed=seed, padding=sizes.padding)
        return self.random(f"random{seed}-qwen2-{who}", ["llm", width, sizes.layers, sizes.padding, seed], write)

    def train_tower(self, name: str, width: int, seed: int, number: int, before: Path | None) -> Path:
        """Train a tower on captions of font scenes with all parts tuned; the language model is discarded afterwards.

        Args:
            name, width: name and width of the tower.
            seed: seed of the start's random weights.
            number: number of the round.
            before: checkpoint of the previous round.
        """
        write = partial(base_models.write_vision_tower, width=width, seed=seed)
        flags = {
            "template": "pretrain",
            "data_path": self.train_data / "captions.json",
            "model_name_or_path": self.random_llm("tower", self.sizes.companion_width, seed),
            "vision_tower": self.random(f"random{seed}-{name}", [width, seed], write),
            "tune_type_vision_tower": "full",
            "per_device_train_batch_size": 32,
            "max_steps": self.sizes.tower_steps,
        }
        return self.grow("Base vision tower", f"{name}-start{seed}-round{number}", flags, number, before)

    def train_llm(self, who: str, width: int, vision_tower: Path, seed: int, number: int, before: Path | None) -> Path:
        """Train a language model on descriptions of and questions about font scenes, with the base tower.

        It starts from random weights, because a language model trained with the tower identifies cells by their order
        and hardly unlearns this.
        """
        flags = {
            "template": base_models.CONV_VERSION,
            "data_path": self.train_data / "questions.json",
            "model_name_or_path": self.random_llm(who, width, seed),
            "vision_tower": vision_tower,
            "max_steps": self.sizes.llm_steps,
        }
        name = f"base-qwen2-{who}-start{seed}-round{number}"
        return self.grow(f"Base language model ({who})", name, flags, number, before)

    def grow(self, title: str, name: str, flags: Mapping[str, object], number: int, before: Path | None) -> Path:
        """Train a base for one round."""
        common = {**PRETRAIN, "image_folder": self.train_data / "images", "tune_type_llm": "full"}
        return self.train(title, name, {**common, **flags, "pretrained_model_path": before, "seed": number})

    def what_tower_sees(self, checkpoint: Path) -> Mapping[str, float]:
        """Per cent of the digits that a linear probe reads from the tower's tokens."""
        from tinyllava_switchkd.quickstart import evaluate

        fitted = scenes.make_scenes("font", "train", 2 * self.sizes.val_scenes, 10_000)
        return {"digits": evaluate.probe(evaluate.load(checkpoint), fitted, self.asked.scenes, self.asked.scenes)}

    def what_llm_knows(self, checkpoint: Path) -> Mapping[str, float]:
        """Kind of question -> accuracy in per cent."""
        from tinyllava_switchkd.quickstart import evaluate

        answers = evaluate.answer_questions(evaluate.load(checkpoint), self.asked)
        return evaluate.accuracy(self.asked.questions, answers)[1]

    def settle(
        self,
        name: str,
        train: Callable[[int, int, Path | None], Path],
        ask: Callable[[Path], Mapping[str, float]],
        keep: Callable[[Path, Path], None],
    ) -> None:
        """Train until everything is learned, with more rounds or other weights if needed, and keep the trained part.

        Args:
            name: folder name of the part.
            train: (seed of the start, number of the round, checkpoint of the previous round) -> checkpoint.
            ask: checkpoint -> accuracies.
            keep: writes the part of a checkpoint to a folder.
        """
        sizes, checkpoint = self.sizes, None
        for attempt in range(sizes.starts * sizes.rounds):
            start, number = divmod(attempt, sizes.rounds)
            checkpoint = train(sizes.first_start + start, number, checkpoint if number else None)
            with logged(f"Asking {name}", self.root / "logs" / f"{name}.log"):
                found = ask(checkpoint)
            known = ", ".join(f"{kind} {value:.0f} %" for kind, value in found.items())
            self.say(f"    accuracy on validation scenes: {known}")
            missed = [kind for kind, value in found.items() if value < sizes.learned.get(kind, 0)]
            if not missed:
                once(self.bases / name, digest(checkpoint / "model.safetensors"), partial(keep, checkpoint))
                return
            left = sizes.starts * sizes.rounds - attempt - 1
            going_on = "training another round" if number + 1 < sizes.rounds else "starting from other weights"
            after = f"{going_on}, attempts left: {left}" if left else "giving up"
            self.say(f"    not learned: {', '.join(missed)}; {after}")
        raise StageError(
            f"{name} did not learn every kind of question from any of {sizes.starts} starts. Use the shipped bases "
            f"(without --from_scratch), or tell us the versions that you use."
        )


def _keep_tower(checkpoint: Path, folder: Path) -> None:
    """Write the tower of a trained VLM as a SigLIP folder."""
    model, _, image_processor = _load(checkpoint)
    model.vision_tower._vision_tower.vision_model.save_pretrained(folder)
    image_processor.save_pretrained(folder)


def _keep_llm(checkpoint: Path, folder: Path) -> None:
    """Write the language model of a trained VLM as a Qwen2 folder."""
    model, tokenizer, _ = _load(checkpoint)
    model.language_model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _load(checkpoint: Path) -> tuple[TinyLlava, PreTrainedTokenizerBase, BaseImageProcessor]:
    from tinyllava_switchkd.model.checkpoint import load_pretrained_model

    return load_pretrained_model(checkpoint, device="cpu")[:3]


def main(argv: list[str] | None = None) -> int:
    parser = CommandParser(prog="quickstart.bases", description=__doc__.split("\n\n")[0])
    parser.add_argument("--output", type=Path, required=True, help="folder for data, runs and, in models/, the bases")
    args = parser.parse_args(argv)
    prepare_environment()
    return told("quickstart.bases", lambda: print(f"The bases are in {make_bases(args.output)}."))


if __name__ == "__main__":
    sys.exit(main())
