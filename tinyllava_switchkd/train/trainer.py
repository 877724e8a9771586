"""LLaVATrainer: transformers' Trainer for a task (supervised training, or distillation by any method).

Differences from the Trainer:

* The loss is divided by the supervised tokens of the whole optimiser step, over all micro-batches and ranks, so that
  batch 4, batch 1 accumulated four times, and two ranks give the same gradients.
* The task's losses and measures are logged beside the loss, averaged over the logging window and all ranks.
* Connector and vision tower may have separate learning rates.
* `--torch_compile` compiles the layers of the models, not the task.
* Grouping by modality or length uses an order that depends only on seed and epoch.
* A checkpoint holds only the student, and can be loaded by itself. A subfolder holds the method's adapters, if any.
* `ReliableTrainer` keeps a run from being lost.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

import torch
from accelerate.utils import DynamoBackend
from torch import Tensor, nn
from torch.utils.data import Sampler
from transformers import EarlyStoppingCallback, TrainerCallback, TrainerControl, TrainerState

from tinyllava_switchkd.constants import IMAGE_TOKEN_INDEX
from tinyllava_switchkd.data.sampler import LengthGroupedSampler
from tinyllava_switchkd.distill import Distiller, Measure, Task
from tinyllava_switchkd.train.adapters import write_adapters
from tinyllava_switchkd.train.command_line.arguments import TrainingArguments
from tinyllava_switchkd.train.compiling import compile_layers
from tinyllava_switchkd.train.recipes import BaseTrainingRecipe
from tinyllava_switchkd.train.reliability.reliable import ReliableTrainer
from tinyllava_switchkd.train.task import SupervisedTask
from tinyllava_switchkd.train.validation import held_out_means

if TYPE_CHECKING:
    from accelerate import Accelerator

    from tinyllava_switchkd.data.collator import Batch
    from tinyllava_switchkd.data.dataset import Samples
    from tinyllava_switchkd.model.modeling import TinyLlavaForConditionalGeneration as TinyLlava

logger = logging.getLogger(__name__)

SMALL_SHARE = 0.01
"""A weighted term with less than this share of the gradient at every place causes a warning."""


class LLaVATrainer(ReliableTrainer):
    """Trains a task.

    Args:
        model: a task, or a TinyLLaVA model to train with cross-entropy only.
        args: training arguments.
        recipe: writes the student, and reads it back to resume without DeepSpeed; the common one by default.
        kwargs: for `transformers.Trainer` (train_dataset, data_collator, callbacks, ...).
    """

    def __init__(
        self,
        model: Task | TinyLlava,
        args: TrainingArguments,
        recipe: BaseTrainingRecipe | None = None,
        **kwargs: object,
    ) -> None:
        task = model if isinstance(model, Task) else SupervisedTask(model, packing=args.packing)
        self.recipe = BaseTrainingRecipe(args) if recipe is None else recipe
        self._epoch_sampler: Sampler | None = None
        self._window = _Window(task.measures, args.average_tokens_across_devices)
        self._step_counts: dict[str, Tensor] | None = None
        self._first_of_step = False
        self._gradients: dict[str, float] = {}
        self._warned_of_small_terms = False
        super().__init__(model=task, args=args, **kwargs)
        self.model_accepts_loss_kwargs = True  # a task takes num_items_in_batch
        if args.torch_compile:
            compile_layers(
                task, args.torch_compile_backend, args.torch_compile_mode, retain_graph=args.log_gradient_shares > 0
            )
            self.accelerator.state.dynamo_plugin.backend = DynamoBackend.NO  # accelerate would compile the whole task
        self.add_callback(_TrainingHooks(self))

    @property
    def student(self) -> TinyLlava:
        return self.model.student

    # The loss

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list[Batch], Tensor | None]:
        """The micro-batches of an optimiser step, and the number of supervised tokens in them on all ranks."""
        start = time.perf_counter()
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        self._window.waited += time.perf_counter() - start
        names = self.model.units
        counts = [self.model.counts(batch) for batch in batches]
        totals = torch.stack([sum((each[name] for each in counts), torch.tensor(0)) for name in names]).to(device)
        totals = self.begin_step(batches, totals)
        self._first_of_step = True
        self._step_counts = dict(zip(names, totals.clamp(min=1), strict=True))
        return batches, self._step_counts["supervised"]

    def compute_loss(
        self, model: nn.Module, inputs: Batch, return_outputs: bool = False, num_items_in_batch: Tensor | None = None
    ) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
        """The task's loss; its other losses and measures go into the logging window."""
        counts = self._step_counts if num_items_in_batch is not None else None
        every = self.args.log_gradient_shares
        if every and self._first_of_step and self.state.global_step % every == 0 and isinstance(self.model, Distiller):
            device = inputs["input_ids"].device  # dropout of the training draws the same numbers as without this pass
            forked = torch.random.fork_rng([device] if device.type == "cuda" else [])
            with self.compute_loss_context_manager(), forked:
                self._note_gradients(self.model.gradient_norms(inputs))
        self._first_of_step = False
        losses = model(inputs, num_items_in_batch=num_items_in_batch, step_counts=counts)
        if self.model.training:
            losses = self.guard.watch(losses)
        loss = losses["loss"]
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            loss = loss * self.accelerator.num_processes  # gradients are averaged over ranks, not summed
        if self.model.training:
            placeholders = (inputs["input_ids"] == IMAGE_TOKEN_INDEX).sum(1)
            lengths = inputs["attention_mask"].sum(1) + placeholders * (self.student.num_image_tokens - 1)
            computed = lengths.sum() if self.model.packing else lengths.max() * len(lengths)
            self._window.add(losses, lengths.sum(), computed)
        return (loss, losses) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log the window's losses, measures and speed beside the loss."""
        if "loss" in logs:
            logs, self._gradients = {**logs, **self._gradients}, {}
            logs = {**logs, **self._window.close(self.accelerator, self.state.global_step)}
        super().log(logs, start_time)

    def _note_gradients(self, norms: Mapping[str, Mapping[str, float]]) -> None:
        """Add each term's gradient norm to the next log line; warn once if a term's share is tiny everywhere."""
        for place, terms in norms.items():
            self._gradients |= {f"gradient/{place}/{term}": norm for term, norm in terms.items()}
        if self._warned_of_small_terms or self.state.global_step == 0:  # at first, equal towers give no gradient
            return
        totals = {place: sum(terms.values()) for place, terms in norms.items()}
        for name, measure in self.model.measures.items():
            shares = [terms.get(name, 0.0) / totals[place] for place, terms in norms.items() if totals[place] > 0]
            # a share of 0 has another reason, such as no images or a frozen tower, and no larger weight helps
            if measure.weight and shares and 0 < max(shares) < SMALL_SHARE:
                self._warned_of_small_terms = True
                logger.warning(
                    "The term %s gives less than %.0f %% of the gradient everywhere (at most %.2g %% at step %d); give "
                    "it a larger weight than %g, or leave it out.",
                    *(name, 100 * SMALL_SHARE, 100 * max(shares), self.state.global_step, measure.weight),
                )

    # Held-out data

    def evaluate(
        self, eval_dataset: Samples | None = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Every loss and measure of the task on held-out data, without gradients, on all ranks."""
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        if dataset is None:
            raise ValueError("There is no held-out data; give --eval_data_path or --eval_share.")
        model = self.model_wrapped if self.is_in_train else self.model
        means = held_out_means(self, model, dataset, self.args.per_device_eval_batch_size)
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in means.items()}
        self.log(dict(metrics))
        self.control: TrainerControl = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    # Order of the samples

    def _get_train_sampler(self, train_dataset: Samples | None = None) -> Sampler | None:
        dataset: Samples = self.train_dataset if train_dataset is None else train_dataset
        args, by_modality = self.args, self.args.group_by_modality_length
        if by_modality or args.train_sampling_strategy == "group_by_length":
            sampler: Sampler | None = LengthGroupedSampler(
                args.train_batch_size,
                args.world_size,
                lengths=dataset.modality_lengths if by_modality else dataset.lengths,
                group_by_modality=by_modality,
                gradient_accumulation_steps=args.gradient_accumulation_steps,
                seed=args.seed if args.data_seed is None else args.data_seed,
            )
        else:
            sampler = super()._get_train_sampler(dataset)
        self._epoch_sampler = self.fill_up(sampler)
        return self._epoch_sampler

    # The optimiser

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """The optimiser, with a learning rate per part and without weight decay for norms and biases."""
        if self.optimizer is None:
            cls, kwargs = self.get_optimizer_cls_and_kwargs(self.args, self.model)
            optimizer: torch.optim.Optimizer = cls(self.parameter_groups(model), **kwargs)
            self.group_settings = [
                {name: value for name, value in group.items() if name != "params"} for group in optimizer.param_groups
            ]
            self.optimizer: torch.optim.Optimizer | None = optimizer
        return self.optimizer

    def parameter_groups(self, model: nn.Module | None = None) -> list[dict[str, object]]:
        """Trainable parameters by learning rate and weight decay, without empty groups."""
        model = self.model if model is None else model
        rates = {"connector": self.args.mm_projector_lr, "vision_tower": self.args.vision_tower_lr}
        decayed = set(self.get_decay_parameter_names(model))
        groups: dict[tuple[str, bool], list[nn.Parameter]] = {}
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                part = next((part for part in rates if part in name.split(".") and rates[part] is not None), "")
                groups.setdefault((part, name in decayed), []).append(parameter)
        return [
            {
                "params": parameters,
                "lr": rates[part] if part else self.args.learning_rate,
                "weight_decay": self.args.weight_decay if decay else 0.0,
            }
            for (part, decay), parameters in sorted(groups.items(), key=lambda item: item[0])
        ]

    # Checkpoints

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        if not self.args.should_save:
            return
        output_dir = output_dir or self.args.output_dir
        write_adapters(self.model, output_dir, state_dict)
        if state_dict is not None:
            prefix = "student."
            state_dict = {name[len(prefix) :]: value for name, value in state_dict.items() if name.startswith(prefix)}
        self.recipe.write_student(self.student, output_dir, state_dict)
        self.write_arguments(output_dir)


class _TrainingHooks(TrainerCallback):
    """Opens the logging window at the start, tells the sampler the epoch, and writes the teacher cache.

    A resumed run goes on with the patience that it had, and trains no further if it was at its end.

    accelerate does not reach the sampler through the nested batch samplers of a resumed run. The cache is written at
    every checkpoint and exchanged between ranks at the start of every epoch.
    """

    def __init__(self, trainer: LLaVATrainer) -> None:
        self._trainer = trainer

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        self._trainer._window.open(state.global_step)
        for stopper in self._stoppers():
            stored = state.stateful_callbacks.get(type(stopper).__name__, {}).get("attributes", {})
            stopper.early_stopping_patience_counter = stored.get("early_stopping_patience_counter", 0)

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        patience = [
            stopper.early_stopping_patience_counter >= stopper.early_stopping_patience for stopper in self._stoppers()
        ]
        if state.global_step >= state.max_steps or any(patience):  # resumed from its last checkpoint
            control.should_training_stop = True
            return
        set_epoch = getattr(self._trainer._epoch_sampler, "set_epoch", None)
        if set_epoch is not None:
            set_epoch(int(state.epoch + 1e-6))
        if getattr(self._trainer.model, "teacher_cache", None) is not None:
            self.on_save(args, state, control)
            self._trainer.accelerator.wait_for_everyone()
            self.on_save(args, state, control)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object) -> None:
        cache = getattr(self._trainer.model, "teacher_cache", None)
        if cache is not None:
            cache.sync()

    on_train_end = on_save

    def _stoppers(self) -> list[EarlyStoppingCallback]:
        return [each for each in self._trainer.callback_handler.callbacks if isinstance(each, EarlyStoppingCallback)]


class _Window:
    """Sums since the last log line, on this rank.

    Args:
        measures: of the task.
        parts: whether a rank's loss is its part of the mean over all ranks, not a mean of its own.
    """

    def __init__(self, measures: Mapping[str, Measure], parts: bool = True) -> None:
        self._parts = parts
        self._of_batch = {name for name, measure in measures.items() if measure.of_batch}
        self.open(0)

    def open(self, step: int) -> None:
        self._step, self._start = step, time.perf_counter()
        self.waited = 0.0  # seconds spent waiting for the data loader
        self._sums: dict[str, Tensor] = {}

    def add(self, losses: Mapping[str, Tensor], tokens: Tensor, computed: Tensor) -> None:
        found = {name: value.detach() for name, value in losses.items() if name != "loss"}
        found |= {name: found[name] * losses["supervised_tokens"] for name in self._of_batch & found.keys()}
        for name, value in {**found, "tokens": tokens, "computed": computed}.items():
            value = value.double() if value.device.type != "mps" else value.float()
            self._sums[name] = self._sums[name] + value if name in self._sums else value

    def close(self, accelerator: Accelerator, step: int) -> dict[str, float]:
        """Means over the window and all ranks, speed, and the shares of padding and waiting; opens the next window."""
        names, steps = sorted(self._sums), max(step - self._step, 1)
        losses = steps if self._parts else steps * accelerator.num_processes
        if not names:
            return {}
        seconds = max(time.perf_counter() - self._start, 1e-9)
        sums = torch.stack([self._sums[name] for name in names])
        waited = sums.new_full((1,), self.waited / seconds)
        *sums, waited = accelerator.reduce(torch.cat([sums, waited]), reduction="sum").tolist()
        found = dict(zip(names, sums, strict=True))
        self.open(step)
        supervised, tokens, computed = (found.pop(name) for name in ("supervised_tokens", "tokens", "computed"))
        logs = {name: x / (max(supervised, 1) if name in self._of_batch else losses) for name, x in found.items()}
        logs["supervised_tokens_per_second"] = supervised / seconds
        logs["tokens_per_second"] = tokens / seconds
        logs["padding_share"] = 1 - tokens / max(computed, 1)
        logs["data_wait_share"] = waited / accelerator.num_processes
        return logs
