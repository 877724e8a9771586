"""The four groups of training arguments: those of TinyLLaVA v1 (``utils/arguments.py``) and those of Switch-KD.

Names and defaults are v1's, without the flags that nothing read. `argv` still accepts those on the command line, and
the flags that Hugging Face has removed since. Every group checks itself when it is constructed; `argv` checks what
concerns several groups.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, make_dataclass
from typing import NamedTuple, Optional

import torch
import transformers

from tinyllava_switchkd.distill.flags import method_settings, settings
from tinyllava_switchkd.distill.methods import Method, MethodFactory
from tinyllava_switchkd.distill.teacher_cache import check_method
from tinyllava_switchkd.runtime import world_size
from tinyllava_switchkd.train.command_line.deepspeed_config import check_deepspeed
from tinyllava_switchkd.train.command_line.settings import check_settings, check_teacher_cache, check_tuning, weightless


@dataclass
class ModelArguments:
    """The student's parts. With ``--pretrained_model_path`` most of these come from the checkpoint."""

    cache_dir: str | None = field(default=None, metadata={"help": "Folder for downloads from the hub."})
    model_name_or_path: str = field(
        default="TinyLlama/TinyLlama-1.1B-Chat-v1.0", metadata={"help": "The language model: a hub id or a folder."}
    )
    tokenizer_name_or_path: str | None = field(
        default=None, metadata={"help": "The tokenizer, if it is not the language model's own."}
    )
    attn_implementation: str | None = field(
        default=None,
        metadata={
            "help": "sdpa, flash_attention_2 or eager; default sdpa, or flash with --packing if it is installed."
        },
    )
    vision_tower: str = field(default="", metadata={"help": "The vision tower: a hub id, a folder, or kind:name."})
    vision_tower2: str = field(default="", metadata={"help": "The second tower of a mixture (mof)."})
    connector_type: str = field(default="linear", metadata={"help": "The connector, e.g. mlp2x_gelu or ldpv2."})
    mm_vision_select_layer: int = field(default=-1, metadata={"help": "Hidden state of the tower to use."})
    mm_vision_select_feature: str = field(
        default="patch", metadata={"help": "patch drops the first visual token (as in TinyLLaVA), cls_patch keeps it."}
    )
    resampler_hidden_size: int = field(default=768, metadata={"help": "Width of the resampler connector."})
    num_queries: int = field(default=128, metadata={"help": "Visual tokens of the resampler and qformer connectors."})
    num_resampler_layers: int = field(default=3, metadata={"help": "Layers of the resampler connector."})
    model_max_length: int = field(
        default=512, metadata={"help": "Longest sequence in tokens, including image tokens; longer ones are cut."}
    )
    tokenizer_padding_side: str = field(
        default="right", metadata={"help": "Padding side that the checkpoint records; training pads on the right."}
    )

    def __post_init__(self) -> None:
        check_settings(self)


@dataclass
class DataArguments:
    """The data: training samples, held-out samples and images."""

    data_path: str | None = field(default=None, metadata={"help": "Training samples: a JSON file in LLaVA's format."})
    image_folder: str | None = field(default=None, metadata={"help": "Folder that the image paths are relative to."})
    image_aspect_ratio: str = field(
        default="square",
        metadata={"help": "square: only the image processor; pad: first pad to a square in the mean colour."},
    )
    template: str = field(default="pretrain", metadata={"help": "Conversation template."})
    is_multimodal: bool = field(
        default=True, metadata={"help": "Whether a batch without images gets an empty one, which trains nothing."}
    )
    image_backend: str = field(
        default="pil", metadata={"help": "pil resizes exactly as TinyLLaVA v1; torchvision is faster."}
    )
    on_bad_image: str = field(
        default="raise", metadata={"help": "For an unreadable image, raise stops the run; skip ignores the sample."}
    )
    eval_data_path: str | None = field(
        default=None,
        metadata={"help": "Held-out samples, evaluated every --eval_steps; a JSON file as for --data_path."},
    )
    eval_share: float | None = field(
        default=None, metadata={"help": "Share of the training samples to hold out instead, chosen by id and --seed."}
    )

    keep_in_memory: bool = field(
        default=False, metadata={"help": "Keep every prepared sample in memory, for a small data set with many epochs."}
    )
    allow_outside_images: bool = field(
        default=False,
        metadata={"help": "Read images outside the image folder (absolute paths, .. and links to other folders)."},
    )

    def __post_init__(self) -> None:
        check_settings(self)
        if self.eval_share is not None and self.eval_data_path is not None:
            raise ValueError("--eval_share and --eval_data_path both name held-out data; give one of them.")


@dataclass
class TeacherArguments:
    """The teacher and the distillation method. Without a teacher the run trains only on the data."""

    teacher_path: str | None = field(
        default=None, metadata={"help": "Checkpoint of the teacher, which makes the run a distillation."}
    )
    distill_method: str = field(default="switch_kd", metadata={"help": "The distillation method, a registered name."})
    chunk_size: int | None = field(
        default=None,
        metadata={"help": "Tokens whose logits are in memory at once; by default chosen by the vocabulary."},
    )
    teacher_bits: int = field(
        default=16, metadata={"help": "8 or 4 quantises the teacher's language model (bitsandbytes)."}
    )
    bridge: str = field(
        default="auto",
        metadata={"help": "If the vision towers' shapes differ, auto trains a map for the switch; none is an error."},
    )
    teacher_cache: str | None = field(
        default=None,
        metadata={"help": "Folder for the teacher's outputs, so that its own pass runs only once per sample."},
    )
    teacher_cache_dtype: str | None = field(
        default=None, metadata={"help": "bf16 or fp32; by default the teacher's own dtype, which loses nothing."}
    )
    fill_teacher_cache: bool = field(
        default=False,
        metadata={"help": "Fill --teacher_cache with every sample, on all ranks, and stop without training."},
    )

    def __post_init__(self) -> None:
        check_settings(self)
        check_teacher_cache(self)
        if self.teacher_path is None:
            of_teacher = [f for f in fields(self) if f.name not in ("teacher_path", "chunk_size")]
            changed = [f.name for f in of_teacher if getattr(self, f.name) != f.default]
            if changed:
                given = ", ".join(f"--{name} {getattr(self, name)}" for name in changed)
                raise ValueError(f"{given} does nothing without a teacher; give --teacher_path as well.")
        else:
            method = self.method()  # its settings are checked
            if self.teacher_cache is not None:
                check_method(method)

    def method(self) -> Method:
        """The distillation method with the given settings; the others have their defaults.

        Raises:
            ValueError: the method or loss is unknown, or a setting is wrong or belongs to another one.
        """
        own = {f.name for f in fields(TeacherArguments)}
        given = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in own}
        chosen = MethodFactory(self.distill_method)
        method = chosen.create(**method_settings(chosen, {name: v for name, v in given.items() if v is not None}))
        if all(term.weight == 0 for term in method.terms):
            weights = [flag for flag in chosen.settings() if flag.endswith("_weight")]
            raise ValueError(weightless(weights, str(self.teacher_path)))
        return method


def distill_arguments() -> type[TeacherArguments]:
    """`TeacherArguments` with a flag for each setting of the registered methods and losses; None is its default."""
    generated = [
        (one.flag, Optional[one.type], field(default=None, metadata={"help": one.summary}))  # noqa: UP045 (a runtime type)
        for one in settings().values()
    ]
    return make_dataclass("DistillArguments", generated, bases=(TeacherArguments,))


@dataclass
class TrainingArguments(transformers.TrainingArguments):
    """`transformers.TrainingArguments` with TinyLLaVA's recipes and tune types, and this package's flags."""

    training_recipe: str = field(default="common", metadata={"help": "common, lora or qlora."})
    tune_type_llm: str = field(default="frozen", metadata={"help": "frozen, full, lora or qlora."})
    tune_type_vision_tower: str = field(
        default="frozen", metadata={"help": "frozen, full, partially-tune, lora or qlora."}
    )
    tune_vision_tower_from_layer: int = field(
        default=10, metadata={"help": "First encoder layer that partially-tune trains."}
    )
    tune_type_connector: str = field(default="full", metadata={"help": "frozen, full, lora or qlora."})
    optim: str = field(default="adamw_torch", metadata={"help": "Optimizer, by transformers' name."})
    remove_unused_columns: bool = field(default=False, metadata={"help": "Must be False: the data set has no columns."})
    bits: int = field(default=16, metadata={"help": "qlora: 8 or 4 bits for the frozen weights (16 means 8)."})
    double_quant: bool = field(default=True, metadata={"help": "qlora with 4 bits: quantise the constants too."})
    quant_type: str = field(default="nf4", metadata={"help": "qlora with 4 bits: nf4 or fp4."})
    lora_r: int = field(default=64, metadata={"help": "Rank of the LoRA matrices."})
    lora_alpha: int = field(default=16, metadata={"help": "Scale of the LoRA update (alpha / r)."})
    lora_dropout: float = field(default=0.05, metadata={"help": "Dropout in front of the LoRA matrices."})
    lora_bias: str = field(default="none", metadata={"help": "Biases trained with LoRA: none, all or lora_only."})
    mm_projector_lr: float | None = field(default=None, metadata={"help": "Learning rate of the connector."})
    vision_tower_lr: float | None = field(default=None, metadata={"help": "Learning rate of the vision tower."})
    group_by_modality_length: bool = field(
        default=False, metadata={"help": "Make batches of one modality and of similar lengths."}
    )
    packing: bool = field(
        default=False,
        metadata={"help": "Concatenate a batch's samples instead of padding them; meant for flash attention."},
    )
    pretrained_model_path: str | None = field(
        default=None, metadata={"help": "Start from this checkpoint (the previous stage's output)."}
    )
    overwrite_output_dir: bool = field(
        default=False, metadata={"help": "Start a new run even if the output folder has checkpoints or a finished run."}
    )
    log_gradient_shares: int = field(
        default=0,
        metadata={"help": "With a teacher: log each term's gradient at three places every N steps (0: never)."},
    )
    early_stopping_patience: int | None = field(
        default=None, metadata={"help": "Stop after N evaluations without a better --metric_for_best_model."}
    )
    estimate: bool = field(
        default=False, metadata={"help": "Print the memory that the run needs on each device, and stop."}
    )
    report_to: None | str | list[str] = field(  # noqa: RUF036 (HfArgumentParser wants this order)
        default="tensorboard", metadata={"help": "Where metrics go: tensorboard, wandb, none, ..."}
    )
    on_nan: str = field(
        default="stop",
        metadata={"help": "If a loss, term or gradient is not finite, stop ends the run and skip skips the step."},
    )
    max_nan_steps: int = field(
        default=10, metadata={"help": "With --on_nan skip, end the run after N bad steps in a row."}
    )
    allow_changed: list[str] | None = field(
        default=None, metadata={"help": "Arguments that may differ from those that the resumed run was started with."}
    )

    def __post_init__(self) -> None:
        check_settings(self)
        check_tuning(self)
        self._check_unsupported()
        if self.deepspeed is not None:
            check_deepspeed(self.deepspeed, self)  # before transformers reads it
        if self.greater_is_better is None and self.metric_for_best_model is not None:
            # transformers treats every name without "loss" at its end as a score; ours are losses, except the overlap
            self.greater_is_better: bool | None = self.metric_for_best_model.endswith("overlap")
        super().__post_init__()
        asked = self.gradient_checkpointing_kwargs or {}
        if not isinstance(asked, dict):
            raise ValueError(f"--gradient_checkpointing_kwargs is {asked!r}; it must be a JSON object.")
        chosen = {"use_reentrant": False, **asked}
        if chosen["use_reentrant"]:
            raise ValueError(
                "--gradient_checkpointing_kwargs sets use_reentrant, which gives no gradient to layers behind frozen "
                "ones; leave it out."
            )
        for name in ("gradient_checkpointing_kwargs", "activation_checkpointing_kwargs"):
            if hasattr(self, name):
                setattr(self, name, chosen)

    @property
    def device(self) -> torch.device:
        """This process's device; the CPU is without an index, because torch 2.11 loads no state onto "cpu:0"."""
        device = super().device
        return torch.device("cpu") if device.type == "cpu" else device

    @property
    def n_gpu(self) -> int:
        """The GPUs of this process, at most one; transformers would divide every batch among all (DataParallel)."""
        return min(super().n_gpu, 1)

    @property
    def compute_dtype(self) -> torch.dtype:
        """The dtype of computations: bfloat16, float16 or float32."""
        if self.bf16:
            return torch.bfloat16
        return torch.float16 if self.fp16 else torch.float32

    def tune_type(self, part: str) -> str:
        """The tune type of a part: ``"llm"``, ``"vision_tower"`` or ``"connector"``."""
        return getattr(self, f"tune_type_{part}")

    def _check_unsupported(self) -> None:
        """Refuse transformers' options that this trainer would silently ignore."""
        for name, why in {
            "label_smoothing_factor": "the task computes the loss",
            "neftune_noise_alpha": "the embeddings are the student's own",
            "use_liger_kernel": "logits are already made for supervised tokens only",
            "fsdp": "shard with --deepspeed zero3.json",
            "remove_unused_columns": "the data set has no columns",
            "auto_find_batch_size": "it would change the batch of a step",
        }.items():
            if getattr(self, name):
                raise ValueError(f"--{name} {getattr(self, name)} is not supported: {why}.")
        if self.train_sampling_strategy == "batch_rebalance" and world_size() > 1:
            raise ValueError(
                f"--train_sampling_strategy batch_rebalance is not supported on {world_size()} processes; use "
                "group_by_length."
            )


class Arguments(NamedTuple):
    """All arguments of a run."""

    model: ModelArguments
    data: DataArguments
    training: TrainingArguments
    distill: TeacherArguments
    given: Mapping[str, Sequence[str]]
    """The arguments on the command line: name -> words after it."""
