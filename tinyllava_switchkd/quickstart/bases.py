"""The quickstart's three base models, from random weights: ``python -m tinyllava_switchkd.quickstart.bases``.

They stand for what people download, SigLIP and Qwen2.5: a vision tower that sees, and two language models that can
speak of what it sees, all of it about rendered digits. Those shipped with the project were made by this command.

Small models answer a kind of question by chance for some thousand steps, and then, within a few hundred, rightly; when
that happens differs from one start to the next. So each is asked about validation scenes before it is taken; if it has
missed one kind, it trains for another round, and then begins anew from other random weights.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from tinyllava_switchkd.cli import CommandParser
from tinyllava_switchkd.io import digest

from . import base_models, scenes
from .experiment import PRETRAIN, Experiment, Plan, StageError, logged, once, prepare_environment

if TYPE_CHECKING:
    from transformers import BaseImageProcessor, PreTrainedTokenizerBase

    from tinyllava_switchkd.model.modeling import TinyLlavaForConditionalGeneration as TinyLlava

Scores = Mapping[str, float]
"""Kind of question -> right answers in per cent."""

Train = Callable[[int, int, "Path | None"], Path]
"""Start, round and the checkpoint of the round before -> checkpoint."""

Keep = Callable[[Path, Path], None]
"""Writes a part of a checkpoint to a folder."""


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
    experiment, folder = Experiment(root, Plan(), root / "models", say), root / "models"
    # The young models learn from descriptions what those adapted later know: more of them
    data = experiment.data("font", "font", plan.scenes, 0, caption_share=0.5)
    asked = scenes.question_set("font", "val", plan.val_scenes, seed=0)
    code = [digest(base_models.__file__), digest(scenes.__file__)]
    everything = {
        **PRETRAIN,
        "image_folder": data / "images",
        "tune_type_llm": "full",
    }

    def random_llm(who: str, width: int, seed: int) -> Path:
        made = folder / f"random{seed}-qwen2-{who}"
        source = ["llm", width, plan.layers, plan.padding, seed, code]
        once(
            made,
            source,
            lambda path: base_models.write_llm(path, width, plan.layers, seed=seed, padding=plan.padding),
        )
        return made

    def tower(name: str, width: int) -> Train:
        """Captions of font scenes, everything tuned; the language model is thrown away afterwards."""

        def train(seed: int, number: int, before: Path | None) -> Path:
            vision = folder / f"random{seed}-{name}"
            once(
                vision,
                [width, seed, code],
                lambda path: base_models.write_vision_tower(path, width, seed=seed),
            )
            flags = {
                **everything,
                "conv_version": "pretrain",
                "data_path": data / "captions.json",
                "model_name_or_path": random_llm("tower", plan.companion_width, seed),
                "vision_tower": vision,
                "tune_type_vision_tower": "full",
                "per_device_train_batch_size": 32,
                "max_steps": plan.tower_steps,
                "pretrained_model_path": before,
                "seed": number,
            }
            return experiment.train("Base vision tower", f"{name}-start{seed}-round{number}", flags)

        return train

    def llm(who: str, width: int) -> Train:
        """Descriptions of and questions about font scenes, from random weights and with the base tower.

        (Language models that grew up with the tower know cells by their order, and hardly unlearn it.)
        """

        def train(seed: int, number: int, before: Path | None) -> Path:
            flags = {
                **everything,
                "conv_version": base_models.CONV_VERSION,
                "data_path": data / "questions.json",
                "model_name_or_path": random_llm(who, width, seed),
                "vision_tower": vision_tower or folder / plan.towers[0][0],
                "max_steps": plan.llm_steps,
                "pretrained_model_path": before,
                "seed": number,
            }
            name = f"base-qwen2-{who}-start{seed}-round{number}"
            return experiment.train(f"Base language model ({who})", name, flags)

        return train

    def what_tower_sees(checkpoint: Path) -> Scores:
        from . import evaluate

        fitted = scenes.make_scenes("font", "train", 2 * plan.val_scenes, 10_000)
        return {"digits": evaluate.probe(evaluate.load(checkpoint), fitted, asked.scenes, asked.scenes)}

    def what_llm_knows(checkpoint: Path) -> Scores:
        from . import evaluate

        return evaluate.accuracy(asked.questions, evaluate.answer_questions(evaluate.load(checkpoint), asked))[1]

    def settle(name: str, train: Train, ask: Callable[[Path], Scores], keep: Keep) -> None:
        """Train until all is learned, a round longer or from other weights if need be, and keep that part."""
        checkpoint = None
        for attempt in range(plan.starts * plan.rounds):
            start, number = divmod(attempt, plan.rounds)
            seed = plan.first_start + start
            checkpoint = train(seed, number, checkpoint if number else None)
            with logged(f"Asking {name}", root / "logs" / f"{name}.log"):
                found = ask(checkpoint)
            say("    right answers, validation: " + ", ".join(f"{kind} {value:.0f} %" for kind, value in found.items()))
            missed = [kind for kind, value in found.items() if value < plan.learned.get(kind, 0)]
            if not missed:
                once(folder / name, digest(checkpoint / "model.safetensors"), functools.partial(keep, checkpoint))
                return
            left = plan.starts * plan.rounds - attempt - 1
            go_on = "a round longer" if number + 1 < plan.rounds else "from other weights"
            say(f"    not learned: {', '.join(missed)}; " + (f"{go_on}, attempts left: {left}" if left else "enough"))
        raise StageError(
            f"{name} did not learn every kind of question from any of {plan.starts} starts. Use the bases that are "
            f"shipped (without --from_scratch), or tell us the versions that you use."
        )

    for name, width in plan.towers:
        settle(name, tower(name, width), what_tower_sees, _keep_tower)
    for who, width in plan.widths:
        settle(f"base-qwen2-{who}", llm(who, width), what_llm_knows, _keep_llm)
    return folder


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
    try:
        print(f"The bases are in {make_bases(args.output)}.")
    except StageError as error:
        print(f"quickstart.bases: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
