"""The quickstart's three base models, from random weights: ``python -m tinyllava_switchkd.quickstart.bases``.

They stand for what people download, SigLIP and Qwen2.5: a vision tower that sees, and two language models that can
speak of what it sees, all of it about rendered digits. Those shipped with the project were made by this command.

Small models answer a kind of question by chance for some thousand steps, and then, within a few hundred, rightly; when
that happens differs from one start to the next. So each is asked about validation scenes before it is taken; if it has
missed one kind, it trains for another round, and then begins anew from other random weights.
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

from . import base_models, scenes
from .experiment import PRETRAIN, Experiment, Plan, StageError, logged, once, prepare_environment, told

if TYPE_CHECKING:
    from transformers import BaseImageProcessor, PreTrainedTokenizerBase

    from tinyllava_switchkd.model.modeling import TinyLlavaForConditionalGeneration as TinyLlava

LEARNED = {"digits": 75, "position": 65, "colour": 65, "where": 90, "read": 30, "yes_no": 62, "choice": 62}
"""What counts as learned, in per cent: far above chance (10, 10, 10, 25, 0, 50, 50), and as high as a tower that reads
four of five digits right allows ("read" asks for four digits at once)."""


@dataclass(frozen=True)
class BasePlan:
    """Sizes and settings of the bases."""

    scenes: int = 10_000
    """Scenes of font digits that they grow up on."""
    val_scenes: int = 100
    layers: int = 2
    towers: tuple[tuple[str, int], ...] = (("base-siglip", 64),)
    """Names and widths of vision towers."""
    companion_width: int = 48
    """Of the language model that the tower grows up with."""
    widths: tuple[tuple[str, int], ...] = (("teacher", 64), ("student", 48))
    """Names and widths of language models."""
    padding: int = 0
    """Rows of the language models' vocabularies beyond the tokenizer's."""
    tower_steps: int = 1500
    llm_steps: int = 3000
    rounds: int = 4
    """Times that a start trains, one after the other, while something is not learned: each begins at the full learning
    rate again."""
    starts: int = 3
    """Starts from other random weights, at most."""
    first_start: int = 0
    """Seed of the first start's weights; the next one's is one more."""
    learned: Mapping[str, float] = field(default_factory=lambda: dict(LEARNED))
    """Right answers in per cent that every kind of question must reach on validation scenes."""


def make_bases(
    root: Path,
    plan: BasePlan | None = None,
    say: Callable[[str], object] = print,
    vision_tower: Path | None = None,
) -> Path:
    """Train the base tower and both base language models, unless they are there.

    Args:
        root: folder that everything goes to.
        plan: sizes and settings.
        say: takes what there is to tell, a line at a time.
        vision_tower: that the language models grow up with; the first of the plan's if None.

    Returns:
        the folder with them, by default ``base-siglip``, ``base-qwen2-teacher`` and ``base-qwen2-student``.

    Raises:
        StageError: a training failed, or something was not learned in any of the attempts.
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
    """Trainings of bases; those that have learned all go to the folder ``models``."""

    def __init__(self, root: Path, sizes: BasePlan, say: Callable[[str], object]) -> None:
        super().__init__(root, Plan(), root / "models", say)
        self.sizes = sizes
        # The young models learn from descriptions what those adapted later know: more of them
        self.grown_on = self.data("font", "font", sizes.scenes, 0, caption_share=0.5)
        self.asked = scenes.question_set("font", "val", sizes.val_scenes, seed=0)

    def random(self, name: str, source: Sequence[object], write: Callable[[Path], None]) -> Path:
        """A folder of random weights, made once."""
        made = self.bases / name
        once(made, [*source, [digest(base_models.__file__), digest(scenes.__file__)]], write)
        return made

    def random_llm(self, who: str, width: int, seed: int) -> Path:
        sizes = self.sizes
        write = partial(base_models.write_llm, width=width, layers=sizes.layers, seed=seed, padding=sizes.padding)
        return self.random(f"random{seed}-qwen2-{who}", ["llm", width, sizes.layers, sizes.padding, seed], write)

    def train_tower(self, name: str, width: int, seed: int, number: int, before: Path | None) -> Path:
        """Captions of font scenes, everything tuned; the language model is thrown away afterwards.

        Args:
            name, width: of the tower.
            seed: of the start's random weights.
            number: of the round.
            before: checkpoint of the round before.
        """
        write = partial(base_models.write_vision_tower, width=width, seed=seed)
        flags = {
            "template": "pretrain",
            "data_path": self.grown_on / "captions.json",
            "model_name_or_path": self.random_llm("tower", self.sizes.companion_width, seed),
            "vision_tower": self.random(f"random{seed}-{name}", [width, seed], write),
            "tune_type_vision_tower": "full",
            "per_device_train_batch_size": 32,
            "max_steps": self.sizes.tower_steps,
        }
        return self.grow("Base vision tower", f"{name}-start{seed}-round{number}", flags, number, before)

    def train_llm(self, who: str, width: int, vision_tower: Path, seed: int, number: int, before: Path | None) -> Path:
        """Descriptions of and questions about font scenes, from random weights and with the base tower.

        (Language models that grew up with the tower know cells by their order, and hardly unlearn it.)
        """
        flags = {
            "template": base_models.CONV_VERSION,
            "data_path": self.grown_on / "questions.json",
            "model_name_or_path": self.random_llm(who, width, seed),
            "vision_tower": vision_tower,
            "max_steps": self.sizes.llm_steps,
        }
        name = f"base-qwen2-{who}-start{seed}-round{number}"
        return self.grow(f"Base language model ({who})", name, flags, number, before)

    def grow(self, title: str, name: str, flags: Mapping[str, object], number: int, before: Path | None) -> Path:
        """One round of a base's training."""
        common = {**PRETRAIN, "image_folder": self.grown_on / "images", "tune_type_llm": "full"}
        return self.train(title, name, {**common, **flags, "pretrained_model_path": before, "seed": number})

    def what_tower_sees(self, checkpoint: Path) -> Mapping[str, float]:
        """Digits that a probe reads off the tower, in per cent."""
        from . import evaluate

        fitted = scenes.make_scenes("font", "train", 2 * self.sizes.val_scenes, 10_000)
        return {"digits": evaluate.probe(evaluate.load(checkpoint), fitted, self.asked.scenes, self.asked.scenes)}

    def what_llm_knows(self, checkpoint: Path) -> Mapping[str, float]:
        """Kind of question -> right answers in per cent."""
        from . import evaluate

        answers = evaluate.answer_questions(evaluate.load(checkpoint), self.asked)
        return evaluate.accuracy(self.asked.questions, answers)[1]

    def settle(
        self,
        name: str,
        train: Callable[[int, int, Path | None], Path],
        ask: Callable[[Path], Mapping[str, float]],
        keep: Callable[[Path, Path], None],
    ) -> None:
        """Train until all is learned, a round longer or from other weights if need be, and keep that part.

        Args:
            name: of the folder with the part.
            train: makes a checkpoint of a start's seed, a round's number and the checkpoint of the round before.
            ask: what a checkpoint knows.
            keep: writes the part of a checkpoint to a folder.
        """
        sizes, checkpoint = self.sizes, None
        for attempt in range(sizes.starts * sizes.rounds):
            start, number = divmod(attempt, sizes.rounds)
            checkpoint = train(sizes.first_start + start, number, checkpoint if number else None)
            with logged(f"Asking {name}", self.root / "logs" / f"{name}.log"):
                found = ask(checkpoint)
            known = ", ".join(f"{kind} {value:.0f} %" for kind, value in found.items())
            self.say(f"    right answers, validation: {known}")
            missed = [kind for kind, value in found.items() if value < sizes.learned.get(kind, 0)]
            if not missed:
                once(self.bases / name, digest(checkpoint / "model.safetensors"), partial(keep, checkpoint))
                return
            left = sizes.starts * sizes.rounds - attempt - 1
            go_on = "a round longer" if number + 1 < sizes.rounds else "from other weights"
            after = f"{go_on}, attempts left: {left}" if left else "enough"
            self.say(f"    not learned: {', '.join(missed)}; {after}")
        raise StageError(
            f"{name} did not learn every kind of question from any of {sizes.starts} starts. Use the bases that are "
            f"shipped (without --from_scratch), or tell us the versions that you use."
        )


def _keep_tower(checkpoint: Path, folder: Path) -> None:
    """The tower of a trained VLM, in the shape in which SigLIP comes."""
    model, _, image_processor = _load(checkpoint)
    model.vision_tower._vision_tower.vision_model.save_pretrained(folder)
    image_processor.save_pretrained(folder)


def _keep_llm(checkpoint: Path, folder: Path) -> None:
    """The language model of a trained VLM, in the shape in which Qwen2.5 comes."""
    model, tokenizer, _ = _load(checkpoint)
    model.language_model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _load(checkpoint: Path) -> tuple[TinyLlava, PreTrainedTokenizerBase, BaseImageProcessor]:
    from tinyllava_switchkd.model.checkpoint import load_pretrained_model

    return load_pretrained_model(checkpoint, device="cpu")[:3]


def main(argv: list[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = CommandParser(prog="quickstart.bases", description=__doc__.split("\n\n")[0])
    parser.add_argument("--output", type=Path, required=True, help="folder for data, runs and, in models/, the bases")
    args = parser.parse_args(argv)
    prepare_environment()
    return told("quickstart.bases", lambda: print(f"The bases are in {make_bases(args.output)}."))


if __name__ == "__main__":
    sys.exit(main())
