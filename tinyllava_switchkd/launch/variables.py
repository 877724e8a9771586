"""The environment variables of scripts/train and scripts/eval: what there is, and what is not is told.

A variable that nobody reads is worse than an error, for a run of days then has other settings than was asked for. So an
unknown name behind a stage's prefix (``DISTILL_LERNING_RATE``) or ``EVAL_``, and any name that is nearly a known one or
what one would guess for it, is refused.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from .values import (
    Check,
    anything,
    boolean,
    flags,
    folder_name,
    max_steps,
    number,
    one_of,
    steps,
    whole,
    word,
)

STAGE_PREFIXES = ("PRETRAIN", "FINETUNE", "DISTILL")

_EVALUATION_PREFIX = "EVAL"

ALLOWED = "ALLOW_VARIABLES"
"""Names, separated by spaces, that are nobody's mistake although they look like one."""


@dataclass(frozen=True)
class Variable:
    """One environment variable.

    Attributes:
        check: of its value.
        setting: the recipe's setting that it sets; most are flags of the training entry. "" if it is about the machine.
        of_a_stage: whether it may have a stage's prefix and then holds for that stage alone.
        recipe_only: whether it is read when a recipe of several stages runs; a single stage has it as an argument.
    """

    check: Check = anything
    setting: str = ""
    of_a_stage: bool = False
    recipe_only: bool = False


TUNED = one_of("frozen", "full", "lora", "qlora")

MACHINE = {
    "DEVICE": Variable(one_of("cpu", "cuda")),
    "GPUS": Variable(),
    "PYTHON": Variable(),
    "DRY_RUN": Variable(),
    "EXTRA_ARGS": Variable(flags, of_a_stage=True),
    ALLOWED: Variable(),
}
"""What training and evaluation share."""

TRAINING = {
    "LAUNCHER": Variable(one_of("deepspeed", "torchrun", "python")),
    "ZERO": Variable(setting="zero", of_a_stage=True),
    "PRECISION": Variable(one_of("bf16", "fp16", "fp32"), "precision"),
    "MASTER_PORT": Variable(whole(1, 65535)),
    "MASTER_ADDR": Variable(word),
    "HOSTFILE": Variable(),
    "NNODES": Variable(whole(1)),
    "NODE_RANK": Variable(whole(0)),
    "OUTPUT_ROOT": Variable(),
    "GLOBAL_BATCH_SIZE": Variable(whole(1), "global_batch_size", True),
    "PER_DEVICE_BATCH_SIZE": Variable(whole(1), "per_device_batch_size", True),
    "GRAD_ACCUM": Variable(whole(1), "grad_accum", True),
    "LEARNING_RATE": Variable(number(0), "learning_rate", True),
    "CONNECTOR_LR": Variable(number(0), "mm_projector_lr", True),
    "VISION_TOWER_LR": Variable(number(0), "vision_tower_lr", True),
    "EPOCHS": Variable(number(0, strictly=True), "num_train_epochs", True),
    "MAX_STEPS": Variable(max_steps, "max_steps", True),
    "WARMUP": Variable(number(0), "warmup_steps", True),
    "WEIGHT_DECAY": Variable(number(0), "weight_decay", True),
    "SEED": Variable(whole(0, 2**32 - 1), "seed", True),
    "TUNE_LLM": Variable(TUNED, "tune_type_llm", True),
    "TUNE_VISION_TOWER": Variable(
        one_of("frozen", "full", "partially-tune", "lora", "qlora"), "tune_type_vision_tower", True
    ),
    "TUNE_CONNECTOR": Variable(TUNED, "tune_type_connector", True),
    "GRADIENT_CHECKPOINTING": Variable(boolean, "gradient_checkpointing", True),
    "SAVE_STEPS": Variable(steps, "save_steps", True),
    "NUM_WORKERS": Variable(whole(0), "dataloader_num_workers", True),
    "SAVE_TOTAL_LIMIT": Variable(whole(1), "save_total_limit"),
    "LOGGING_STEPS": Variable(steps, "logging_steps"),
    "REPORT_TO": Variable(setting="report_to"),
    "ATTN_IMPLEMENTATION": Variable(word, "attn_implementation"),
    "IMAGE_ASPECT_RATIO": Variable(word, "image_aspect_ratio"),
    "SELECT_LAYER": Variable(whole(-1000), "mm_vision_select_layer"),
    "SELECT_FEATURE": Variable(one_of("patch", "cls_patch"), "mm_vision_select_feature"),
    "GROUP_BY_MODALITY": Variable(boolean, "group_by_modality_length"),
    "LORA_R": Variable(whole(1), "lora_r"),
    "LORA_ALPHA": Variable(number(0, strictly=True), "lora_alpha"),
    "TEACHER_PATH": Variable(setting="teacher_path"),
    "TEACHER_BITS": Variable(one_of("16", "8", "4"), "teacher_bits"),
    "TEACHER_CACHE": Variable(setting="teacher_cache"),
    "TEACHER_CACHE_DTYPE": Variable(one_of("bf16", "fp32"), "teacher_cache_dtype"),
    "FILL_TEACHER_CACHE": Variable(boolean, "fill_teacher_cache"),
    "DISTILL_METHOD": Variable(word, "distill_method"),
    "DISTILL_LOSS": Variable(word, "distill_loss"),
    "TEMPERATURE": Variable(number(0, strictly=True), "temperature"),
    "ALIGN_WEIGHT": Variable(number(0), "align_weight"),
    "SWITCH_WEIGHT": Variable(number(0), "switch_weight"),
    "PRETRAINED_PATH": Variable(setting="pretrained_model_path"),
    "EVAL_DATA": Variable(setting="eval_data_path", of_a_stage=True),
    "EVAL_STEPS": Variable(steps, "eval_steps", True),
    "TRAIN_RECIPE": Variable(word, "training_recipe"),
    "MODEL_MAX_LENGTH": Variable(whole(1), "model_max_length"),
    "TEACHER_LLM": Variable(recipe_only=True),
    "STUDENT_LLM": Variable(recipe_only=True),
    "VISION_TOWER": Variable(setting="vision_tower", recipe_only=True),
    "CONNECTOR": Variable(word, "connector_type", recipe_only=True),
    "CONV_VERSION": Variable(word, "conv_version", recipe_only=True),
    "VERSION": Variable(folder_name, recipe_only=True),
    "DATA_ROOT": Variable(recipe_only=True),
    "PRETRAIN_DATA": Variable(recipe_only=True),
    "PRETRAIN_IMAGES": Variable(recipe_only=True),
    "FINETUNE_DATA": Variable(recipe_only=True),
    "FINETUNE_IMAGES": Variable(recipe_only=True),
}

EVALUATION = {
    "EVAL_DIR": Variable(),
    "RESULTS_DIR": Variable(),
    "BATCH_SIZE": Variable(lambda text: None if text == "auto" else whole(1)(text)),
    "LIMIT": Variable(whole(1)),
    "SPLIT": Variable(folder_name),
    "CONV_MODE": Variable(word),
}

_NEVER_MEANT = {"PYTHON", "LIMIT", "SPLIT", "DRY_RUN", ALLOWED}
"""Known names that much else is nearly called like."""

_BATCH = "GLOBAL_BATCH_SIZE (samples of a step) or PER_DEVICE_BATCH_SIZE"
_GUESSED = {
    True: {
        **dict.fromkeys(("BATCH", "BATCH_SIZE", "GLOBAL_BATCH", "TRAIN_BATCH_SIZE", "MICRO_BATCH_SIZE"), _BATCH),
        "PER_DEVICE_TRAIN_BATCH_SIZE": "PER_DEVICE_BATCH_SIZE",
        "GRADIENT_ACCUMULATION_STEPS": "GRAD_ACCUM",
        "LR": "LEARNING_RATE",
        "NUM_EPOCHS": "EPOCHS",
        "NUM_TRAIN_EPOCHS": "EPOCHS",
        "TEACHER": "TEACHER_PATH or TEACHER_LLM",
    },
    False: {"BATCH": "BATCH_SIZE", "LIMITS": "LIMIT", "RESULTS": "RESULTS_DIR"},
}
"""Names that one would guess for a training (True) or an evaluation, and what they are called."""


def read(environment: Mapping[str, str], *, training: bool) -> dict[str, str]:
    """The variables of a training, or of an evaluation, that are set and not empty, checked.

    A stage's own variable stays when it is empty: it then takes back what is set for all stages.

    Raises:
        ValueError: a value that cannot be meant, or a name that nearly is a known one; with the remedy.
    """
    own: dict[str, Variable] = MACHINE | (TRAINING if training else EVALUATION)
    prefixed = {
        f"{stage}_{name}": v for stage in STAGE_PREFIXES for name, v in own.items() if v.of_a_stage and training
    }
    known = prefixed | own
    others = (EVALUATION if training else TRAINING).keys() - _GUESSED[training].keys()
    allowed = {*environment.get(ALLOWED, "").split(), *others}
    values = {}
    for name, value in environment.items():
        if name in known:
            wrong = known[name].check(value) if value else None
            if wrong is not None:
                raise ValueError(f"{name} is {value!r}; it must be {wrong}.{_hint(name, value)}")
            if value or name in prefixed:
                values[name] = value
        elif name not in allowed:
            near = nearest(name, known, training=training)
            if near is not None:
                raise ValueError(
                    f"There is no variable {name}; did you mean {near}? (If it is for something else, set "
                    f'{ALLOWED}="{name}".)'
                )
    return values


def _hint(name: str, value: str) -> str:
    if name == "DEVICE" and value.lower().startswith(("gpu", "cuda")):
        return " Which GPUs is for GPUS, e.g. GPUS=0,1."
    return ""


def nearest(name: str, known: Collection[str], *, training: bool = True) -> str | None:
    """The known variable that a name seems to mean; None if it is none of ours."""
    guessed = _GUESSED[training].get(name.upper())
    if guessed is not None:
        return guessed
    targets = [target for target in known if target not in _NEVER_MEANT]
    flat = {target.replace("_", ""): target for target in reversed(targets)}
    plain = re.sub(r"[_-]", "", name).upper()
    if plain in flat:  # learning_rate, LEARNINGRATE, PRETRAIN__SEED
        return flat[plain]
    if not re.fullmatch(r"[A-Z][A-Z0-9_]*", name):
        return None
    close = [target for target in targets if _is_near(name, target)]
    if close:
        return min(close, key=lambda target: (_edits(name, target), target))
    prefix, _, rest = name.partition("_")
    if not rest or prefix not in ((*STAGE_PREFIXES, _EVALUATION_PREFIX) if training else (_EVALUATION_PREFIX,)):
        return None
    if rest in known:  # one that has no prefix
        return rest
    own = [target for target in targets if target.startswith(f"{prefix}_")]
    similar = difflib.get_close_matches(name, own, n=1, cutoff=0)
    return similar[0] if similar else None


def _is_near(name: str, target: str) -> bool:
    if len(target) < 6 and name[0] != target[0]:
        return False
    return _edits(name, target) <= (1 if len(target) < 10 else 2)


def _edits(one: str, other: str) -> int:
    """Letters to insert, drop, replace or swap with their neighbour, to get from one word to the other; 3 for more."""
    letters, others = set(one), set(other)
    if abs(len(one) - len(other)) > 2 or len(letters - others) > 2 or len(others - letters) > 2:
        return 3  # an edit brings in one letter and takes out one at most
    before: list[int] = []
    row = list(range(len(other) + 1))
    for i, letter in enumerate(one, 1):
        current = [i]
        for j, wanted in enumerate(other, 1):
            cost = min(current[-1] + 1, row[j] + 1, row[j - 1] + (letter != wanted))
            if i > 1 and j > 1 and letter == other[j - 2] and one[i - 2] == wanted:
                cost = min(cost, before[j - 2] + 1)
            current.append(cost)
        before, row = row, current
    return min(row[-1], 3)
