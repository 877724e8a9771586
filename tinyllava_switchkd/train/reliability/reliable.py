"""The part of the trainer that keeps a run from being lost or silently ruined.

* Every step's losses, terms and gradient norm are checked (`guard`).
* A signal ends the run on all ranks at the same step, after a checkpoint (`signals`).
* Checkpoints are written to a temporary folder, sealed and renamed, and rotated by their steps (`checkpoints`).
* Nothing in a checkpoint is executed, and the arguments are written as JSON without secrets.
* Filler samples in the ranks' last batches have neither labels nor images, so any number of ranks computes one
  process's gradient.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from accelerate.data_loader import SeedableRandomSampler
from accelerate.utils import broadcast_object_list
from torch import Tensor, nn
from torch.utils.data import RandomSampler, Sampler, SequentialSampler
from transformers import Trainer

from tinyllava_switchkd.io import JsonObject, write_json
from tinyllava_switchkd.train.adapters import read_adapters, whole
from tinyllava_switchkd.train.command_line.arguments import TrainingArguments
from tinyllava_switchkd.train.reliability import checkpoints, fingerprint, signals, universal
from tinyllava_switchkd.train.reliability.guard import Guard, check_trained
from tinyllava_switchkd.train.reliability.record import ARGUMENTS
from tinyllava_switchkd.train.reliability.resume import REMEDY, ResumeError, reading
from tinyllava_switchkd.train.validation import WithFillers

if TYPE_CHECKING:
    from transformers.trainer_utils import TrainOutput

    from tinyllava_switchkd.data.collator import Batch
    from tinyllava_switchkd.data.dataset import Samples
    from tinyllava_switchkd.data.sampler import LengthGroupedSampler

logger = logging.getLogger(__name__)


class ReliableTrainer(Trainer):
    """`transformers.Trainer` with the above; base class of `LLaVATrainer`.

    Attributes:
        fingerprint: recorded in checkpoints for `fingerprint.check`, unless empty.
        interrupted: whether a signal ended training before its last step.
        group_settings: the initial settings of each parameter group.
    """

    def __init__(self, *, args: TrainingArguments, **kwargs: object) -> None:
        # transformers' filter hides NaN and infinity from the log and waits for the device in every micro-batch
        args.logging_nan_inf_filter = False
        super().__init__(args=args, **kwargs)
        self._fills_up = self.train_dataset is not None and args.world_size > 1 and not args.dataloader_drop_last
        if self._fills_up:
            self.train_dataset: Samples = WithFillers(self.train_dataset)
        self.guard = Guard(args.output_dir, skip=args.on_nan == "skip", most=args.max_nan_steps, scaler=args.fp16)
        self.fingerprint: JsonObject = {}
        self.interrupted = False
        self.group_settings: list[dict[str, object]] = []
        self._run_folder: str | None = None
        self._is_lagging = args.device.type == "cuda" and not self.is_deepspeed_enabled and not self.guard.skip

    # Finite values and signals

    def begin_step(self, batches: list[Batch], totals: Tensor) -> Tensor:
        """Record the samples of a step, and gather the token counts and signals of all ranks.

        Args:
            batches: the step's micro-batches, optionally with "ids".
            totals: this rank's count of each unit that losses are divided by, [units] on its device.

        Returns:
            the counts of all ranks, [units]; this rank's own if `average_tokens_across_devices` is off.
        """
        asked: Tensor | float = float(signals.received() is not None)
        if self.args.world_size > 1:
            mine = torch.cat([totals, totals.new_tensor([int(asked)])])
            everyone = self.accelerator.gather(mine[None])
            asked = everyone[:, -1].max()
            if self.args.average_tokens_across_devices:
                totals = everyone[:, :-1].sum(0)
        ids = [[str(name) for name in batch.get("ids") or ()] for batch in batches]
        self.guard.begin(self.state.global_step + 1, ids, asked)
        return totals

    def training_step(self, model: nn.Module, inputs: Batch, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        loss = super().training_step(model, inputs, num_items_in_batch)
        # keeps the logged mean over steps finite
        return torch.nan_to_num(loss, nan=0.0, posinf=0.0, neginf=0.0) if self.guard.skip else loss

    def _get_grad_norm(self, model: nn.Module, grad_norm: Tensor | float | None = None) -> Tensor | float | None:
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        left_out = self.is_deepspeed_enabled and self.accelerator.optimizer_step_was_skipped
        self.guard.end(norm, bool(left_out))
        if self.guard.judge(all_but_last=self._is_lagging):
            return norm
        if not self.is_deepspeed_enabled:
            model.zero_grad(set_to_none=True)  # optimisers skip parameters without a gradient
        elif not left_out:
            check_trained(self.model)
        return None

    def _maybe_log_save_evaluate(self, *args: object, **kwargs: object) -> None:
        if self.control.should_log or self.control.should_save or not self._is_lagging:
            self.guard.judge()
        if self.guard.asked_to_stop and not self.interrupted and 0 < self.state.global_step < self.state.max_steps:
            self.interrupted = True
            self.guard.judge()
            self.control.should_save = self.control.should_training_stop = True
        super()._maybe_log_save_evaluate(*args, **kwargs)
        if self.interrupted:  # with a limit of one, transformers would end by removing this checkpoint beside the best
            self.args.save_total_limit = None

    def _run_epoch(self, *args: object, **kwargs: object) -> None:
        if not self.control.should_training_stop:  # at its beginning: the run is resumed from its end
            super()._run_epoch(*args, **kwargs)

    def train(self, *args: object, **kwargs: object) -> TrainOutput:
        result = super().train(*args, **kwargs)
        self.guard.judge()
        check_trained(self.model)
        if self.guard.skipped and self.is_world_process_zero():
            logger.warning("%d steps were skipped because something was not finite.", self.guard.skipped)
        return result

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if self.guard.skipped and "loss" in logs:
            logs = {**logs, "skipped_steps": self.guard.skipped}
        super().log(logs, start_time)

    # Writing

    def _get_output_dir(self, trial: object = None) -> str:
        return super()._get_output_dir(trial) if self._run_folder is None else self._run_folder

    def _save_checkpoint(self, model: nn.Module, trial: object = None) -> None:
        """Write to a temporary folder, seal, rename and rotate; all ranks return together."""
        self.guard.judge()
        check_trained(self.model)
        output, step = Path(self.args.output_dir), self.state.global_step
        aside = output / checkpoints.WRITING
        if self.is_world_process_zero():
            checkpoints.clean(output)
            checkpoints.check_space(output, self._bytes_needed(), step)
        self.accelerator.wait_for_everyone()
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        self._run_folder = str(aside)
        try:
            with checkpoints.writing(output, step, self._bytes_needed()):
                super()._save_checkpoint(model, trial)
                if self.state.best_global_step == step:  # recorded with the temporary path
                    self.state.best_model_checkpoint = str(output / f"checkpoint-{step}")
                self.accelerator.wait_for_everyone()
                if self.is_world_process_zero():
                    folder = aside / f"checkpoint-{step}"
                    self.state.save_to_json(str(folder / "trainer_state.json"))
                    if self.fingerprint:
                        write_json(folder / fingerprint.FILE, self.fingerprint)
                    manifest = checkpoints.seal(folder, step, self.args.world_size)
                    checkpoints.publish(folder, output / folder.name, manifest)
                    checkpoints.clean(output)
        except checkpoints.CheckpointError:
            checkpoints.clean(output)
            raise
        finally:
            self._run_folder, self.args.save_total_limit = None, limit
        if self.is_world_process_zero():
            checkpoints.rotate(output, step, limit, best=self.state.best_model_checkpoint)
        self.accelerator.wait_for_everyone()

    def save_result(self) -> None:
        """Write the trained model and, last, the state that marks the run as finished."""
        output = Path(self.args.output_dir)
        if self.is_world_process_zero():
            checkpoints.check_space(output, self._bytes_needed() // 3, self.state.global_step)
        self.state.max_steps = self.state.global_step  # a run that stopped early is finished, too
        with checkpoints.writing(output, self.state.global_step, self._bytes_needed() // 3):
            if self.is_world_process_zero() and self.fingerprint:
                write_json(output / fingerprint.FILE, self.fingerprint)
            self.recipe.save(self.student, self)

    def _bytes_needed(self) -> int:
        """The size of the last checkpoint; otherwise that of the weights and two optimiser states per trained one."""
        last = next(iter(checkpoints.checkpoints(self.args.output_dir)), None)
        if last is not None:
            return int(1.02 * checkpoints.size_of(last))
        total = 0
        for name, parameter in self.model.named_parameters():
            if name.startswith("student.") or parameter.requires_grad:
                count = getattr(parameter, "ds_numel", parameter.numel())
                total += count * (parameter.element_size() + (8 if parameter.requires_grad else 0))
        return total

    def write_arguments(self, folder: str | Path) -> None:
        """Write the arguments as JSON, without tokens."""
        plain = {name: value for name, value in self.args.to_dict().items() if not name.endswith("_token")}
        write_json(Path(folder, ARGUMENTS), fingerprint.plain(plain))

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        # trainer_state.json is written next; all ranks must have finished before
        self.accelerator.wait_for_everyone()

    # Reading

    def _init_training_state(self, *args: Any, **kwargs: Any) -> Any:
        found = super()._init_training_state(*args, **kwargs)
        best = Path(self.args.output_dir, f"checkpoint-{self.state.best_global_step}")
        if best.is_dir():  # the recorded path is elsewhere if the run's folder was moved
            self.state.best_model_checkpoint = str(best)
        return found

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> Any:
        with reading(kwargs.get("resume_from_checkpoint") or (args[2] if len(args) > 2 else None)):
            return super()._prepare_for_training(*args, **kwargs)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        try:
            with reading(resume_from_checkpoint), whole(self.model.parameters(), writer=0):
                self.recipe.read_student(self.student, resume_from_checkpoint)
                read_adapters(self.model, resume_from_checkpoint)
        except ResumeError:
            raise
        except ValueError as error:  # for example the adapters of another method
            reason = str(error).rstrip(".")
            raise ResumeError(f"The run cannot continue from {resume_from_checkpoint} ({reason}); {REMEDY}.") from error

    def _load_best_model(self) -> None:
        """Load the weights of the best checkpoint, but not its shards, which only fit the ranks that wrote them."""
        if self.interrupted:
            return
        best = self.state.best_model_checkpoint
        damage = [checkpoints.damage(best) if self.is_world_process_zero() else None]
        broadcast_object_list(damage)
        if damage[0] is not None:
            raise ResumeError(
                f"The best checkpoint {best} cannot be loaded ({damage[0]}); run the same command with "
                "--load_best_model_at_end False (and without --early_stopping_patience) to keep the last weights."
            )
        logger.info("Loading %s, which has the best held-out %s.", best, self.args.metric_for_best_model)
        self._load_from_checkpoint(best)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """As in transformers, but refuse another optimiser's state."""
        try:
            super()._load_optimizer_and_scheduler(checkpoint)
        except (ValueError, KeyError) as error:
            raise ResumeError(f"The optimiser cannot continue from {checkpoint} ({error}); {REMEDY}.") from error
        if checkpoint is None:
            return
        if universal.is_universal(checkpoint):
            universal.correct(self.optimizer, self.group_settings, self.lr_scheduler.get_last_lr())
        if not self.is_deepspeed_enabled and any(
            set(self.optimizer.defaults) - set(group) for group in self.optimizer.param_groups
        ):
            raise ResumeError(f"The checkpoint {checkpoint} was written with another --optim; {REMEDY}.")

    def _load_rng_state(self, checkpoint: str | None) -> None:
        manifest = None if checkpoint is None else checkpoints.read_manifest(checkpoint)
        if manifest is None or manifest["world_size"] == self.args.world_size:
            with reading(checkpoint):
                super()._load_rng_state(checkpoint)
            return
        # another number of ranks: each gets its own random numbers, the same whenever the run is resumed here
        seed = self.args.seed + 1_000_003 * (self.state.global_step + 1) + self.args.process_index
        random.seed(seed)
        np.random.seed(seed % 2**32)
        torch.manual_seed(seed)

    # Filler samples

    def fill_up(self, sampler: Sampler | None) -> Sampler | None:
        """The sampler, with fillers at the end so that all ranks have full batches."""
        if not self._fills_up or sampler is None:
            return sampler
        if type(sampler) is RandomSampler:  # accelerate does this only to a bare RandomSampler
            seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
            sampler = SeedableRandomSampler(sampler.data_source, generator=torch.Generator(), data_seed=seed)
        return Filled(sampler, self.args.train_batch_size * self.args.world_size, len(self.train_dataset))


class Filled(Sampler):
    """A sampler extended to a multiple of `multiple` by indices beyond the data."""

    def __init__(
        self, sampler: LengthGroupedSampler | SeedableRandomSampler | SequentialSampler, multiple: int, size: int
    ) -> None:
        self.sampler, self.multiple, self.size = sampler, multiple, size

    def __len__(self) -> int:
        return -(-len(self.sampler) // self.multiple) * self.multiple

    def __iter__(self) -> Iterator[int]:
        index = 0
        for index in self.sampler:
            yield index
        yield from [self.size + index] * (len(self) - len(self.sampler))

    def set_epoch(self, epoch: int) -> None:
        if hasattr(self.sampler, "set_epoch"):  # a sequential one has the same order in every epoch
            self.sampler.set_epoch(epoch)
