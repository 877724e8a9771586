"""The entry point of every training: ``python -m tinyllava_switchkd.train.train --data_path ...``.

Pre-training, supervised fine-tuning and, with ``--teacher_path``, distillation are one program; scripts/train has the
arguments of each. As much as possible is checked before weights are read and before anything is written.
"""

from __future__ import annotations

import sys

from tinyllava_switchkd.io import JsonObject
from tinyllava_switchkd.train.command_line.argv import answer_at_once, parse_arguments

if __name__ == "__main__":
    answer_at_once(sys.argv[1:])

import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist
from accelerate.utils import broadcast_object_list, gather_object
from transformers import EarlyStoppingCallback, set_seed

from tinyllava_switchkd.data.collator import SampleError
from tinyllava_switchkd.data.dataset import make_supervised_data_module
from tinyllava_switchkd.distill import Distiller, Task, TeacherCache, build_distiller, check_compatible
from tinyllava_switchkd.distill.teacher_cache import tell_size
from tinyllava_switchkd.model.card import write_model_card
from tinyllava_switchkd.model.checkpoint import load_pretrained_model
from tinyllava_switchkd.model.quantized import BITS, check_quantization
from tinyllava_switchkd.runtime import is_main_process
from tinyllava_switchkd.train.adapters import begin_adapters
from tinyllava_switchkd.train.attention import attention_of
from tinyllava_switchkd.train.command_line.arguments import Arguments
from tinyllava_switchkd.train.command_line.deepspeed_config import warn_of_builds
from tinyllava_switchkd.train.compiling import check_compile
from tinyllava_switchkd.train.filling import Filling
from tinyllava_switchkd.train.preflight import checks
from tinyllava_switchkd.train.preflight.estimate import estimate_run
from tinyllava_switchkd.train.preflight.skeleton import (
    apply_run_settings,
    checkpoint_skeleton,
    model_settings,
    student_skeleton,
    visual_tokens,
)
from tinyllava_switchkd.train.recipes import BaseTrainingRecipe, TrainingRecipeFactory
from tinyllava_switchkd.train.reliability import checkpoints, fingerprint, resume, signals, universal
from tinyllava_switchkd.train.reliability.guard import NON_FINITE, NonFiniteError
from tinyllava_switchkd.train.reliability.locking import LockedError, OutputLock
from tinyllava_switchkd.train.reliability.record import keep_rates, write_recipe
from tinyllava_switchkd.train.task import SupervisedTask
from tinyllava_switchkd.train.trainer import LLaVATrainer
from tinyllava_switchkd.train.validation import hold_out

if TYPE_CHECKING:
    from tinyllava_switchkd.data.collator import DataCollatorForSupervisedDataset
    from tinyllava_switchkd.data.dataset import Samples
    from tinyllava_switchkd.model.modeling import TinyLlavaForConditionalGeneration as TinyLlava

logger = logging.getLogger("tinyllava_switchkd.train.train")  # also when run as __main__

T = TypeVar("T")

USER_ERRORS = (ValueError, OSError, ImportError, LockedError)
"""Errors before training: a wrong argument, file or installation."""

EXIT_CODES: dict[type[Exception], int] = {
    resume.ResumeError: 1,
    SampleError: 1,
    NonFiniteError: NON_FINITE,
    checkpoints.CheckpointError: checkpoints.NO_ROOM,
    signals.InterruptedRunError: signals.INTERRUPTED,
}
"""Errors that end a run after training has started -> exit codes."""


class OtherRankFailedError(RuntimeError):
    """A check failed on another rank."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a training from a command line; returns the exit code.

    An error before the first step is printed as one sentence. The environment variable TINYLLAVA_TRACEBACK adds a
    traceback.
    """
    _set_up_logging()
    signals.follow_launcher()
    signals.install()
    run = None
    try:
        arguments = parse_arguments(argv)
        if arguments.training.estimate:
            checks.check_names(arguments)
            checks.check_paths(arguments)
            print(estimate_run(arguments))
            return 0
        run = prepare(arguments)
        if run is not None:
            run()
        return 0
    except Exception as error:
        early = (*USER_ERRORS, checkpoints.CheckpointError, OtherRankFailedError)
        expected = tuple(EXIT_CODES) if run is not None else early
        if not isinstance(error, expected) or (run is None and os.environ.get("TINYLLAVA_TRACEBACK")):
            raise
        # during training only one rank meets a bad sample or a full disk, but all ranks meet every other error
        if is_main_process() or (run is not None and isinstance(error, (SampleError, checkpoints.CheckpointError))):
            print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return next((code for kind, code in EXIT_CODES.items() if isinstance(error, kind)), 1)
    except KeyboardInterrupt:  # ends the run at once; a cluster's signals wait for the next step
        if run is None:
            raise
        if is_main_process():
            print(f"error: Interrupted; {run.resume_hint()}.", file=sys.stderr)
        return 130
    finally:
        if run is not None:
            run.release()
        signals.uninstall()


@dataclass
class Run:
    """A training that is ready to start."""

    trainer: LLaVATrainer
    checkpoint: str | None
    """The checkpoint to resume from."""
    lock: OutputLock
    """The lock of the output folder."""

    def release(self) -> None:
        """Release the output folder."""
        self.lock.release()

    def resume_hint(self) -> str:
        """What the user can continue from if the run ends now."""
        output = self.trainer.args.output_dir
        without = " without --overwrite_output_dir" if self.trainer.args.overwrite_output_dir else ""
        return f"the same command{without} continues from {checkpoints.latest_name(output)} in {output}"

    def __call__(self) -> None:
        """Train, and write the student.

        Raises:
            ResumeError, NonFiniteError, CheckpointError, InterruptedRunError: the run ended early.
        """
        trainer, output = self.trainer, self.trainer.args.output_dir
        trainer.train(resume_from_checkpoint=self.checkpoint)
        if trainer.interrupted:
            raise signals.InterruptedRunError(
                f"{signals.received() or 'A signal to another rank'} has ended the run at step "
                f"{trainer.state.global_step} of {trainer.state.max_steps}; {self.resume_hint()}."
            )
        trainer.save_result()
        if trainer.is_world_process_zero():
            try:
                write_model_card(output)  # again, because the folder now has the settings of the training
            except OSError as error:  # the model and its first card are complete
                logger.warning("The training's settings could not be added to the model card (%s).", error)
        truncation = trainer.data_collator.report()
        if truncation is not None:
            logger.warning(truncation)
        logger.info("The trained model is in %s.", output)


def prepare(arguments: Arguments) -> Run | Filling | None:
    """Check everything, then load everything; None if the run is already finished.

    With ``--fill_teacher_cache`` the result fills the teacher cache, and the output folder is not touched.

    Raises:
        ValueError, OSError, ImportError: an argument or a file that it names is wrong.
        OtherRankFailedError: a check failed on another rank.
    """
    training = arguments.training
    error = plan = None
    try:
        plan = check(arguments)
    except USER_ERRORS as raised:
        error = raised
    found = gather_object([error and str(error)])  # so that no rank waits for one that has failed
    if error is not None:
        raise error
    for rank, words in enumerate(found):
        if words is not None:
            raise OtherRankFailedError(f"On rank {rank}: {words}")
    if plan is None:
        on_main(
            lambda: fingerprint.check(
                training.output_dir, fingerprint.describe(arguments, training.world_size), training.allow_changed or ()
            )
        )
        return None
    if arguments.distill.fill_teacher_cache:
        return _prepare_filling(arguments, plan)
    lock = OutputLock(training.output_dir)
    try:
        return _prepare(arguments, plan, lock)
    except BaseException:
        lock.release()
        raise


def _prepare(arguments: Arguments, plan: Plan, lock: OutputLock) -> Run:
    training = arguments.training
    checkpoint, chosen = on_main(lambda: _lock_and_find_checkpoint(arguments, plan, lock))
    keep_rates(arguments, checkpoint)  # on the other ranks, too
    recipe = plan.recipe
    cache = _teacher_cache(arguments, plan, chosen)
    set_seed(training.seed)  # a new connector is the same on every rank and in every run
    model = recipe.load(model_settings(arguments))
    apply_run_settings(model, arguments)
    model = recipe(model)
    callbacks = []
    if training.early_stopping_patience is not None:
        callbacks.append(EarlyStoppingCallback(training.early_stopping_patience))
    task = build_task(arguments, model, recipe)
    if cache is not None:
        assert isinstance(task, Distiller)
        task.teacher_cache = cache
    if training.deepspeed is not None:
        warn_of_builds()
    if universal.is_universal(checkpoint):
        training.hf_deepspeed_config.config.setdefault("checkpoint", {})["load_universal"] = (
            True  # where DeepSpeed looks
        )
    trainer = LLaVATrainer(
        task,
        training,
        recipe=recipe,
        callbacks=callbacks,
        train_dataset=plan.train_dataset,
        eval_dataset=plan.eval_dataset,
        data_collator=plan.collator,
    )
    trainer.fingerprint = chosen
    if checkpoint is None:
        begin_adapters(task, training.pretrained_model_path, plan.train_dataset, plan.collator)
    if training.overwrite_output_dir and trainer.is_world_process_zero():
        resume.remove_checkpoints(training.output_dir)
    trainer.accelerator.wait_for_everyone()
    return Run(trainer, checkpoint, lock)


def _prepare_filling(arguments: Arguments, plan: Plan) -> Filling:
    training = arguments.training
    chosen = on_main(lambda: fingerprint.describe(arguments, training.world_size))
    cache = _teacher_cache(arguments, plan, chosen)
    assert cache is not None, "the arguments have been checked"
    teacher = load_teacher(arguments, plan.recipe)
    data = [one for one in (plan.train_dataset, plan.eval_dataset) if one is not None]
    return Filling(cache, teacher, data, plan.collator, training)


def _teacher_cache(arguments: Arguments, plan: Plan, chosen: JsonObject) -> TeacherCache | None:
    """The cache of the teacher's hidden states, if there is one; logs how large it will become.

    Raises:
        OSError, ValueError: the folder cannot be created, or the disk has no room.
    """
    distill = arguments.distill
    if distill.teacher_cache is None or plan.teacher is None:
        return None
    computed = plan.recipe.compute_dtype()
    kept = {"bf16": torch.bfloat16, "fp32": torch.float32}.get(distill.teacher_cache_dtype or "", computed)
    identity = f"{chosen[fingerprint.TEACHER]} {computed} {distill.teacher_bits}"
    cache = TeacherCache(distill.teacher_cache, identity, kept)
    plan.collator.digests = True
    width = plan.teacher.config.hidden_size
    logger.info(on_main(lambda: tell_size(cache, plan.train_dataset, plan.collator, width)))
    return cache


def on_main(function: Callable[[], T]) -> T:
    """Call a function on the main process and return its result on all processes.

    Raises:
        OtherRankFailedError: on the other processes, if the function failed; the main process raises its own error.
    """
    error: Exception | None = None
    box: list[Any] = [None, False]
    if is_main_process():
        try:
            box = [function(), True]
        except (*USER_ERRORS, checkpoints.CheckpointError) as raised:
            error = raised
    broadcast_object_list(box)
    if error is not None:
        raise error
    if not box[1]:
        raise OtherRankFailedError
    return box[0]


def _lock_and_find_checkpoint(arguments: Arguments, plan: Plan, lock: OutputLock) -> tuple[str | None, JsonObject]:
    """Lock the output folder (main process); returns the checkpoint to resume from, if any, and the fingerprint.

    Raises:
        LockedError: another run writes there.
        ValueError: the run cannot resume from the checkpoint.
        CheckpointError: the checkpoint must be converted for another number of processes, and there is no room.
    """
    training = arguments.training
    checks.prepare_output(training.output_dir)
    lock.acquire()
    chosen = fingerprint.describe(arguments, training.world_size)
    checkpoint = None
    if not training.overwrite_output_dir:
        checkpoints.clean(training.output_dir)
        checkpoint = _where_to_resume(arguments)
    if checkpoint is not None:
        resume.check_fits(checkpoint, plan.skeleton.config, training)
        fingerprint.check(checkpoint, chosen, training.allow_changed or ())
        if resume.needs_conversion(checkpoint, training.world_size):
            checkpoint = str(universal.convert(checkpoint, training.output_dir))
    write_recipe(keep_rates(arguments, checkpoint))
    return checkpoint, chosen


@dataclass
class Plan:
    """The results of the checks: all that a run needs except the weights."""

    recipe: BaseTrainingRecipe
    skeleton: TinyLlava
    teacher: TinyLlava | None
    train_dataset: Samples
    eval_dataset: Samples | None
    collator: DataCollatorForSupervisedDataset


def check(arguments: Arguments) -> Plan | None:
    """Check everything that can be checked without weights; None if the run is already finished.

    Raises:
        ValueError, OSError, ImportError: the first mistake found, in one sentence.
    """
    training = arguments.training
    if resume.begun_by_this_job(training.output_dir):
        training.overwrite_output_dir = False
    checks.check_names(arguments)
    checks.check_paths(arguments)
    attention_of(arguments)
    check_compile(training)
    if arguments.distill.teacher_path is not None:
        checks.check_gradient_shares(training)
    if arguments.distill.teacher_bits in BITS:
        check_quantization(f"--teacher_bits {arguments.distill.teacher_bits}", training.device)
    filling = arguments.distill.fill_teacher_cache
    if not training.overwrite_output_dir and not filling and resume.is_finished(training.output_dir):
        logger.info(
            "The run in %s is finished; nothing to do. To train again, remove the folder or pass "
            "--overwrite_output_dir True.",
            training.output_dir,
        )
        return None
    recipe = TrainingRecipeFactory(training.training_recipe)(training)
    skeleton = student_skeleton(arguments)
    teacher = None
    if arguments.distill.teacher_path is not None:
        teacher = checkpoint_skeleton(arguments.distill.teacher_path, arguments.model.cache_dir)
        check_compatible(skeleton, teacher, arguments.distill.method(), bridge=arguments.distill.bridge)
    logger.info("An image takes %s.", visual_tokens(skeleton))
    data = _data(arguments, skeleton, teacher)
    checks.check_batch(training, len(data[0]))
    few = checks.few_steps(training, len(data[0]))
    for words in [*checks.remarks(training), few]:
        if words is not None and is_main_process():
            logger.warning(words)
    metric = training.metric_for_best_model
    if training.load_best_model_at_end and metric is not None:
        checks.check_metric(arguments, metric)
    return Plan(recipe, skeleton, teacher, *data)


def build_task(arguments: Arguments, model: TinyLlava, recipe: BaseTrainingRecipe) -> Task:
    """The task for the trainer: the model alone, or the model with a teacher."""
    distill = arguments.distill
    if distill.teacher_path is None:
        return SupervisedTask(model, chunk_size=distill.chunk_size, packing=arguments.training.packing)
    return build_distiller(
        model,
        load_teacher(arguments, recipe),
        distill.method(),
        chunk_size=distill.chunk_size,
        packing=arguments.training.packing,
        bridge=distill.bridge,
    )


def load_teacher(arguments: Arguments, recipe: BaseTrainingRecipe) -> TinyLlava:
    """The teacher on this rank's device, with its tokenizer and image processor."""
    distill = arguments.distill
    assert distill.teacher_path is not None, "the arguments have been checked"
    return load_pretrained_model(
        distill.teacher_path,
        device=arguments.training.device,
        dtype=recipe.compute_dtype(),  # frozen weights need no float32 copy
        attn_implementation=attention_of(arguments),
        load_8bit=distill.teacher_bits == 8,
        load_4bit=distill.teacher_bits == 4,
        cache_dir=arguments.model.cache_dir,
    )[0]


def _where_to_resume(arguments: Arguments) -> str | None:
    """The checkpoint to resume from; None to start from the beginning."""
    training = arguments.training
    asked = training.resume_from_checkpoint
    if asked is not None and asked.lower() == "true":  # True means the latest, which is looked for anyway
        asked = None
    if asked is not None and not checkpoints.is_chosen(training.output_dir, asked):
        missing = resume.what_is_missing(asked, training.world_size)
        if missing is not None:
            raise ValueError(f"--resume_from_checkpoint {asked} is incomplete: {missing}.")
        checkpoints.choose(training.output_dir, asked)
        return asked
    checkpoint = resume.find_checkpoint(training.output_dir, training.world_size)
    if checkpoint is not None:
        logger.info("Resuming from %s.", checkpoint)
    elif asked is not None:
        raise ValueError(
            f"--resume_from_checkpoint {asked} is gone, and {training.output_dir} has no later checkpoint."
        )
    return checkpoint


def _data(
    arguments: Arguments, skeleton: TinyLlava, teacher: TinyLlava | None
) -> tuple[Samples, Samples | None, DataCollatorForSupervisedDataset]:
    """The training data, the held-out data if any, and the collator; checks the data."""
    data = arguments.data
    tokenizer = skeleton.tokenizer
    assert tokenizer is not None, "it came with the model"
    ends = skeleton.language_model.generation_config.eos_token_id
    settings = vars(data) | {
        "image_processor": skeleton.image_processor,
        "image_aspect_ratio": skeleton.config.image_aspect_ratio,
        "num_image_tokens": skeleton.num_image_tokens,
        "eos_token_ids": tokenizer.eos_token_id if ends is None else ends,
    }
    if teacher is not None:
        settings["teacher_image_processor"] = teacher.image_processor
        settings["teacher_image_aspect_ratio"] = teacher.config.image_aspect_ratio
    module = make_supervised_data_module(tokenizer, SimpleNamespace(**settings))
    whole, collator = module["train_dataset"], module["data_collator"]
    if data.eval_data_path is not None:
        settings["data_path"] = data.eval_data_path
        held_out = make_supervised_data_module(tokenizer, SimpleNamespace(**settings))
        return whole, held_out["train_dataset"], collator
    if data.eval_share is not None:
        return *hold_out(whole, data.eval_share, arguments.training.seed), collator
    return whole, None, collator


def _set_up_logging() -> None:
    """Log this package's messages to stderr; processes other than the main one only log warnings."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s", datefmt="%H:%M:%S"))
    package = logging.getLogger("tinyllava_switchkd")
    package.handlers = [handler]
    package.setLevel(logging.INFO if is_main_process() else logging.WARNING)
    package.propagate = False


if __name__ == "__main__":
    code = main()
    if code in (0, signals.INTERRUPTED) and dist.is_initialized():  # all ranks reach this line
        dist.destroy_process_group()  # at the interpreter's exit its threads can abort a successful run
    sys.exit(code)
