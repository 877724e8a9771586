"""The entry point of every training: ``python -m tinyllava_switchkd.train.train --data_path ...``.

Pre-training, supervised fine-tuning and, with ``--teacher_path``, distilled fine-tuning are one program; scripts/train
has the arguments of each. What can be checked is checked before weights are read and before anything is written.
"""

from __future__ import annotations

import sys

from tinyllava_switchkd.train.argv import answer_at_once, parse_arguments

if __name__ == "__main__":
    answer_at_once(sys.argv[1:])

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from transformers import set_seed

from tinyllava_switchkd.data import SampleError, make_supervised_data_module
from tinyllava_switchkd.distill import Task, build_distiller
from tinyllava_switchkd.model import load_pretrained_model
from tinyllava_switchkd.runtime import is_main_process

from . import checks, resume
from .arguments import Arguments
from .attention import attention_of
from .estimate import estimate_run
from .recipes import BaseTrainingRecipe, TrainingRecipeFactory
from .record import write_recipe
from .skeleton import (
    Skeleton,
    apply_run_settings,
    checkpoint_skeleton,
    model_settings,
    student_skeleton,
)
from .task import SupervisedTask
from .trainer import LLaVATrainer

logger = logging.getLogger("tinyllava_switchkd.train.train")  # also when run as __main__

USER_ERRORS = (ValueError, OSError, ImportError)
"""What a wrong argument, file or installation raises before training, with a sentence that says so."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a training from a command line; the exit code.

    What is wrong before the first step is said in one sentence, without a traceback unless TINYLLAVA_TRACEBACK is set.
    """
    _set_up_logging()
    run = None
    try:
        arguments = parse_arguments(argv)
        if arguments.training.estimate:
            checks.check_names(arguments)
            checks.check_paths(arguments)
            print(estimate_run(arguments))
        else:
            run = prepare(arguments)
    except OtherRankFailedError:
        return 1
    except USER_ERRORS as error:
        if os.environ.get("TINYLLAVA_TRACEBACK"):
            raise
        if is_main_process():
            print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    if run is not None:
        try:
            run()
        except (resume.ResumeError, SampleError) as error:
            if is_main_process():
                print(f"error: {error}", file=sys.stderr)
            return 1
    return 0


class OtherRankFailedError(RuntimeError):
    """A check failed on another rank, which says why."""


@dataclass
class Run:
    """A training that is ready to start."""

    recipe: BaseTrainingRecipe
    model: nn.Module
    trainer: LLaVATrainer
    checkpoint: str | None
    """Where to resume from."""

    def __call__(self) -> None:
        """Train, and write the student."""
        self.trainer.train(resume_from_checkpoint=self.checkpoint)
        self.recipe.save(self.model, self.trainer)
        truncation = self.trainer.data_collator.report()
        if truncation is not None:
            logger.warning(truncation)
        logger.info("The trained model is in %s.", self.trainer.args.output_dir)


def prepare(arguments: Arguments) -> Run | None:
    """Check everything, then load everything; None if the run is finished already.

    Raises:
        ValueError, OSError, ImportError: something is wrong with the arguments or the files they name.
        OtherRankFailedError: another rank found something wrong.
    """
    training = arguments.training
    error = plan = None
    try:
        plan = check(arguments)
    except USER_ERRORS as raised:
        error = raised
    failed = torch.tensor(int(error is not None), device=training.device)
    if training.world_size > 1:  # nobody is left waiting for a rank that has gone
        torch.distributed.all_reduce(failed, op=torch.distributed.ReduceOp.MAX)
    if error is not None:
        raise error
    if failed:
        raise OtherRankFailedError
    if plan is None:
        return None

    recipe = plan.recipe
    set_seed(training.seed)  # a fresh connector is the same on every rank and in every run
    model = recipe.load(plan.skeleton.model, recipe.add_args(model_settings(arguments)))
    apply_run_settings(model, model.tokenizer, arguments)
    model = recipe(model)
    trainer = LLaVATrainer(build_task(arguments, model, recipe), training, recipe=recipe, **plan.data_module)
    if training.overwrite_output_dir and trainer.is_world_process_zero():
        resume.remove_checkpoints(training.output_dir)
    trainer.accelerator.wait_for_everyone()
    return Run(recipe, model, trainer, plan.checkpoint)


@dataclass
class Plan:
    """What the checks have made sure of, and made on the way."""

    recipe: BaseTrainingRecipe
    skeleton: Skeleton
    data_module: dict[str, Any]
    checkpoint: str | None


def check(arguments: Arguments) -> Plan | None:
    """Everything that can be known to be wrong before weights are read; None if the run is finished already.

    Raises:
        ValueError, OSError, ImportError: the first thing found, in one sentence.
    """
    training = arguments.training
    checks.check_names(arguments)
    checks.check_paths(arguments)
    checks.check_machine(arguments)
    if not training.overwrite_output_dir and resume.is_finished(training.output_dir):
        logger.info(
            "The run in %s is finished; nothing to do. To train it anew, remove the folder or pass "
            "--overwrite_output_dir True.",
            training.output_dir,
        )
        return None
    checkpoint = _where_to_resume(arguments)
    recipe = TrainingRecipeFactory(training.training_recipe)(training)
    skeleton = student_skeleton(arguments)
    if checkpoint is not None:
        resume.check_fits(checkpoint, skeleton.model.config, training)
    if arguments.distill.teacher_path is not None:
        teacher = checkpoint_skeleton(arguments.distill.teacher_path, arguments.model.cache_dir)
        checks.check_teacher(arguments, skeleton, teacher)
    data_module = _data_module(arguments, skeleton)
    if is_main_process():
        checks.prepare_output(training.output_dir)
        write_recipe(arguments)
    return Plan(recipe, skeleton, data_module, checkpoint)


def build_task(arguments: Arguments, model: nn.Module, recipe: BaseTrainingRecipe) -> Task:
    """What the trainer trains: the model alone, or the model with a teacher."""
    distill = arguments.distill
    if distill.teacher_path is None:
        return SupervisedTask(model, chunk_size=distill.chunk_size, packing=arguments.training.packing)
    teacher, tokenizer, image_processor, _ = load_pretrained_model(
        distill.teacher_path,
        device=arguments.training.device,
        dtype=recipe.compute_dtype(),  # frozen, it needs no float32 copy: on a GPU usually bfloat16
        attn_implementation=attention_of(arguments),
        load_8bit=distill.teacher_bits == 8,
        load_4bit=distill.teacher_bits == 4,
        cache_dir=arguments.model.cache_dir,
    )
    return build_distiller(
        model,
        teacher,
        distill.method(),
        chunk_size=distill.chunk_size,
        packing=arguments.training.packing,
        student_tokenizer=model.tokenizer,
        teacher_tokenizer=tokenizer,
        student_image_processor=model.image_processor,
        teacher_image_processor=image_processor,
    )


def _where_to_resume(arguments: Arguments) -> str | None:
    """The checkpoint to go on from; None to begin at the beginning."""
    training = arguments.training
    if training.overwrite_output_dir:
        return None
    asked = training.resume_from_checkpoint
    if asked is not None and asked.lower() != "true":  # True asks for the latest, which is sought anyway
        missing = resume.what_is_missing(asked, training.world_size)
        if missing is not None:
            raise ValueError(f"--resume_from_checkpoint {asked} is incomplete: {missing}.")
        return asked
    checkpoint = resume.find_checkpoint(training.output_dir, training.world_size)
    if checkpoint is not None:
        logger.info("Resuming from %s.", checkpoint)
    return checkpoint


def _data_module(arguments: Arguments, skeleton: Skeleton) -> dict[str, Any]:
    """Data set and collator, after the data has been looked over."""
    settings = vars(arguments.data) | {
        "image_processor": skeleton.image_processor,
        "image_aspect_ratio": skeleton.model.config.image_aspect_ratio,
        "num_image_tokens": skeleton.model.num_image_tokens,
        "eos_token_ids": skeleton.eos_token_ids,
    }
    module = make_supervised_data_module(skeleton.tokenizer, SimpleNamespace(**settings))
    return {name: module[name] for name in ("train_dataset", "data_collator")}


def _set_up_logging() -> None:
    """Messages of this package on stderr: from the main process all, from the others warnings."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s", datefmt="%H:%M:%S"))
    package = logging.getLogger("tinyllava_switchkd")
    package.handlers = [handler]
    package.setLevel(logging.INFO if is_main_process() else logging.WARNING)
    package.propagate = False


if __name__ == "__main__":
    sys.exit(main())
