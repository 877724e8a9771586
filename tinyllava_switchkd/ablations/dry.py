"""The cost of a table before anything is downloaded or trained: memory and hours of every training.

Both models of every training are built on torch's meta device and checked against each other as at the start of a run.
Their memory is computed by the function behind ``--estimate``.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tinyllava_switchkd.ablations.tables import Flags
from tinyllava_switchkd.distill import build_distiller
from tinyllava_switchkd.distill.methods import Method, MethodFactory
from tinyllava_switchkd.io import read_json
from tinyllava_switchkd.model.configuration import TinyLlavaConfig
from tinyllava_switchkd.model.modeling import TinyLlavaForConditionalGeneration
from tinyllava_switchkd.train.preflight.estimate import Estimate, estimate

PEAK, PEAK_OF = 989e12, "H100 SXM, bfloat16 without sparsity, NVIDIA's data sheet"
"""Operations per second of one GPU."""
SHARE, SHARE_OF = 0.36, "align + switch in docs/benchmarks.md, `python -m benchmarks.step --repeats 3`, on a CPU"
"""Fraction of a machine's matrix throughput that a distillation step reaches; no GPU has been measured yet."""
TEXT_TOKENS = {"pretrain": 32, "finetune": 300, "distill": 300}
"""Assumed mean number of text tokens per sample, not a count; used to estimate hours."""

Config = dict[str, Any]


def qwen2(width: int, layers: int, heads: int, groups: int, inner: int, vocabulary: int, tied: bool) -> Config:
    """Configuration of a Qwen2 language model."""
    return {
        "model_type": "qwen2",
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "intermediate_size": inner,
        "vocab_size": vocabulary,
        "tie_word_embeddings": tied,
    }


def siglip(width: int, layers: int, heads: int, inner: int, image: int, patch: int) -> Config:
    """Configuration of a SigLIP vision tower."""
    return {
        "model_type": "siglip_vision_model",
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "intermediate_size": inner,
        "image_size": image,
        "patch_size": patch,
    }


CONFIGS = {
    "Qwen/Qwen2.5-0.5B": qwen2(896, 24, 14, 2, 4864, 151_936, True),
    "Qwen/Qwen2.5-1.5B": qwen2(1536, 28, 12, 2, 8960, 151_936, True),
    "Qwen/Qwen2.5-3B": qwen2(2048, 36, 16, 2, 11_008, 151_936, True),
    "Qwen/Qwen2.5-7B": qwen2(3584, 28, 28, 4, 18_944, 152_064, False),
    "google/siglip-so400m-patch14-384": siglip(1152, 27, 16, 4304, 384, 14),
    "google/siglip-base-patch16-224": siglip(768, 12, 12, 3072, 224, 16),
}
"""Configurations of the paper's models, copied from the hub so that no network is needed."""


@dataclass(frozen=True)
class Planned:
    """One training.

    Attributes:
        name: name to print.
        stage: pretrain, finetune or distill.
        flags: flags of the training entry.
        student, teacher: language model and tower of each; teacher is None without distillation.
        gpus: number of GPUs that share the batch; 0 on a CPU.
        samples: number of training samples.
        seconds: measured time; None if it was not run, then the time on GPUs is estimated from operations.
    """

    name: str
    stage: str
    flags: Flags
    student: tuple[str, str]
    teacher: tuple[str, str] | None
    gpus: int
    samples: int
    seconds: float | None = None

    @cached_property
    def models(self) -> tuple[TinyLlavaForConditionalGeneration, TinyLlavaForConditionalGeneration | None]:
        """Student and teacher on the meta device."""
        return build(self.student, self.flags), None if self.teacher is None else build(self.teacher, self.flags)


def build(models: tuple[str, str], flags: Flags) -> TinyLlavaForConditionalGeneration:
    """Build a model on the meta device."""
    llm, tower = (CONFIGS.get(name) or read_json(Path(name) / "config.json") for name in models)
    config = TinyLlavaConfig(
        text_config=llm,
        vision_config=tower.get("vision_config", tower),
        vision_model_name_or_path=models[1],
        llm_model_name_or_path=models[0],
        connector_type=str(flags["connector_type"]),
        vision_feature_layer=int(str(flags["mm_vision_select_layer"])),
        vision_feature_select_strategy=str(flags.get("mm_vision_select_feature", "patch")),
        tokenizer_model_max_length=int(str(flags["model_max_length"])),
    )
    with torch.device("meta"):
        model = TinyLlavaForConditionalGeneration(config)
    return model


def freeze(model: nn.Module, flags: Flags) -> nn.Module:
    """Freeze the parts of a model that the flags freeze."""
    parts = {"llm": model.language_model, "connector": model.connector, "vision_tower": model.vision_tower}
    for name, part in parts.items():
        part.requires_grad_(str(flags.get(f"tune_type_{name}", "full")) != "frozen")
    return model


def method_of(flags: Flags) -> Method:
    """The distillation method of a training."""
    kind = MethodFactory(str(flags.get("distill_method", "switch_kd")))
    names = {flag: field.name for flag, field in kind.settings().items()}
    known = {names.get(name, name): value for name, value in flags.items() if name in {*names, *_LOSS_SETTINGS}}
    return kind.create(**{name: _number(value) for name, value in known.items()})


_LOSS_SETTINGS = ("knee_window", "knee_on", "pairs", "top_k")


def _number(value: object) -> object:
    try:
        number = float(str(value))
    except ValueError:
        return value
    return int(number) if str(value).isdigit() else number


def memory(planned: Planned) -> Estimate:
    """Memory per device.

    Raises:
        ValueError: student and teacher do not match.
    """
    flags = planned.flags
    student, teacher = planned.models
    switch = False
    if teacher is not None:
        method = method_of(flags)
        # before parts are frozen, because it would compare the weights of two frozen towers
        build_distiller(student.train(), teacher.requires_grad_(False), method)
        switch = method.switch
    freeze(student.train(), flags)
    half = str(flags.get("bf16", "False")) == "True"
    zero = str(flags.get("zero", ""))
    return estimate(
        student,
        teacher,
        batch_size=int(str(flags["per_device_train_batch_size"])),
        text_tokens=max(int(str(flags["model_max_length"])) - student.num_image_tokens, 2),
        gpus=max(planned.gpus, 1),
        zero_stage=3 if "zero3" in zero else 2 if "zero2" in zero else 0,
        mixed_precision=half,
        master_weights=half,
        checkpointing=str(flags.get("gradient_checkpointing", "False")) == "True",
        switch=switch,
    )


def operations(planned: Planned) -> float:
    """Floating-point operations per sample: per weight and token, 2 in the forward pass, 2 for the gradient of the
    input, and 2 for the gradient of the weight."""
    student, teacher = planned.models
    length = student.num_image_tokens + TEXT_TOKENS[planned.stage]
    again = 2 if str(planned.flags.get("gradient_checkpointing", "False")) == "True" else 0
    language, tower = _weights(student.language_model), _weights(student.vision_tower)
    patches = student.vision_tower.num_tokens("cls_patch")
    learns = [str(planned.flags.get(f"tune_type_{part}", "full")) != "frozen" for part in ("llm", "vision_tower")]
    total = (4 + 2 * learns[0] + again) * language * length + (2 + (4 + again) * learns[1]) * tower * patches
    if teacher is not None:
        language = _weights(teacher.language_model)
        total += 2 * language * length + 2 * _weights(teacher.vision_tower) * teacher.vision_tower.num_tokens(
            "cls_patch"
        )
        total += (4 + again) * language * length if method_of(planned.flags).switch else 0
    return total


def _weights(model: nn.Module) -> int:
    """Number of weights applied to every token, without the embedding table and a tower's pooling head."""
    linear = [part for name, part in model.named_modules() if isinstance(part, nn.Linear) and ".head." not in name]
    return sum(weight.numel() for part in linear for weight in part.parameters())


def hours(planned: Planned) -> float | None:
    """Hours, measured or estimated; None if it would run on a CPU and has not been measured."""
    if planned.seconds is not None:
        return planned.seconds / 3600
    if not planned.gpus:
        return None
    return planned.samples * operations(planned) / (PEAK * SHARE * planned.gpus) / 3600


def report(trainings: Iterable[Planned], seeds: int, rests_on: str) -> str:
    """One line per training, the total over all seeds (teachers are trained once), and the data."""
    trainings = list(trainings)
    rows = [(planned.name, memory(planned).peak / 2**30, hours(planned)) for planned in trainings]
    width = max(len(name) for name, *_ in rows)
    lines = [f"{'training':<{width}}  GiB per device     hours"]
    lines += [f"{name:<{width}}  {size:14.2f}  {_hours(spent):>8}" for name, size, spent in rows]
    once = sum(spent or 0 for name, _, spent in rows if name.startswith("teacher"))
    each = sum(spent or 0 for *_, spent in rows) - once
    total = f"Teachers once, all else for {seeds} seed{'s' * (seeds > 1)}: {_hours(once + seeds * each)} hours"
    missing = sum(spent is None for *_, spent in rows)
    total += f", without {missing} that {'has' if missing == 1 else 'have'} not been timed." if missing else "."
    read = {Path(str(planned.flags["data_path"])).name: planned.samples for planned in trainings if planned.samples}
    data = [f"Data, one epoch each: {', '.join(f'{name} ({count:,} samples)' for name, count in read.items())}."]
    return "\n".join([*lines, "", total, *(data if read else []), rests_on])


def _hours(value: float | None) -> str:
    return "?" if value is None else f"{value:.3f}" if value < 1 else f"{value:.1f}"
