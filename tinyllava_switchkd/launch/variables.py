"""The environment variables of scripts/train and scripts/eval.

A misspelt variable would be ignored, and a run of days would have the wrong settings. So these names are refused:
unknown ones with a stage's prefix (``DISTILL_LERNING_RATE``) or ``EVAL_``, and those that resemble a known name or are
an obvious guess for one.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

from tinyllava_switchkd.launch.values import anything, boolean, flags, folder_name, word
from tinyllava_switchkd.train.command_line.settings import ALLOWED, OneOf, Range

STAGE_PREFIXES = ("PRETRAIN", "FINETUNE", "DISTILL")

_EVALUATION_PREFIX = "EVAL"

EXEMPT = "ALLOW_VARIABLES"
"""Names, separated by spaces, that are not refused although they resemble a known one."""


@dataclass(frozen=True)
class Variable:
    """One environment variable.

    Attributes:
        setting: the recipe's setting that it sets, most of them flags of the training entry; "" if there is none.
        of_a_stage: whether it may have a stage's prefix and then applies to that stage only.
        check: check of its value, for settings that are not in `ALLOWED`.
        recipe_only: whether only whole recipes read it; a single stage takes it as an argument.
    """

    setting: str = ""
    of_a_stage: bool = False
    check: Callable[[str], str | None] = anything
    recipe_only: bool = False

    def wrong(self, text: str) -> str | None:
        """What the value must be, or None if it is valid."""
        return ALLOWED[self.setting].wrong(text) if self.setting in ALLOWED else self.check(text)


_COUNT = Range(1, 2**31 - 1, whole=True).wrong
_WEIGHT = Range(0, 1e9).wrong

MACHINE = {
    "DEVICE": Variable(check=OneOf("cpu", "cuda").wrong),
    "GPUS": Variable(),
    "PYTHON": Variable(),
    "DRY_RUN": Variable(),
    "EXTRA_ARGS": Variable(of_a_stage=True, check=flags),
    EXEMPT: Variable(),
}
"""Variables of both training and evaluation."""

TRAINING = {
    "LAUNCHER": Variable(check=OneOf("deepspeed", "torchrun", "python").wrong),
    "ZERO": Variable("zero", True),
    "PRECISION": Variable("precision", check=OneOf("bf16", "fp16", "fp32").wrong),
    "MASTER_PORT": Variable(check=Range(1, 65535, whole=True).wrong),
    "MASTER_ADDR": Variable(check=word),
    "HOSTFILE": Variable(),
    "NNODES": Variable(check=_COUNT),
    "NODE_RANK": Variable(check=Range(0, 2**31 - 1, whole=True).wrong),
    "OUTPUT_ROOT": Variable(),
    "GLOBAL_BATCH_SIZE": Variable("global_batch_size", True, _COUNT),
    "PER_DEVICE_BATCH_SIZE": Variable("per_device_batch_size", True, _COUNT),
    "GRAD_ACCUM": Variable("grad_accum", True, _COUNT),
    "LEARNING_RATE": Variable("learning_rate", True),
    "CONNECTOR_LR": Variable("mm_projector_lr", True),
    "VISION_TOWER_LR": Variable("vision_tower_lr", True),
    "EPOCHS": Variable("num_train_epochs", True),
    "MAX_STEPS": Variable("max_steps", True),
    "WARMUP": Variable("warmup_steps", True),
    "WEIGHT_DECAY": Variable("weight_decay", True),
    "SEED": Variable("seed", True),
    "TUNE_LLM": Variable("tune_type_llm", True),
    "TUNE_VISION_TOWER": Variable("tune_type_vision_tower", True),
    "TUNE_CONNECTOR": Variable("tune_type_connector", True),
    "GRADIENT_CHECKPOINTING": Variable("gradient_checkpointing", True, boolean),
    "SAVE_STEPS": Variable("save_steps", True),
    "NUM_WORKERS": Variable("dataloader_num_workers", True),
    "SAVE_TOTAL_LIMIT": Variable("save_total_limit"),
    "LOGGING_STEPS": Variable("logging_steps"),
    "REPORT_TO": Variable("report_to"),
    "ATTN_IMPLEMENTATION": Variable("attn_implementation", check=word),
    "IMAGE_ASPECT_RATIO": Variable("image_aspect_ratio"),
    "SELECT_LAYER": Variable("mm_vision_select_layer"),
    "SELECT_FEATURE": Variable("mm_vision_select_feature"),
    "GROUP_BY_MODALITY": Variable("group_by_modality_length", check=boolean),
    "LORA_R": Variable("lora_r"),
    "LORA_ALPHA": Variable("lora_alpha"),
    "TEACHER_PATH": Variable("teacher_path"),
    "TEACHER_BITS": Variable("teacher_bits"),
    "TEACHER_CACHE": Variable("teacher_cache"),
    "TEACHER_CACHE_DTYPE": Variable("teacher_cache_dtype"),
    "FILL_TEACHER_CACHE": Variable("fill_teacher_cache", check=boolean),
    "DISTILL_METHOD": Variable("distill_method", check=word),
    "DISTILL_LOSS": Variable("distill_loss", check=word),
    "TEMPERATURE": Variable("temperature", check=Range(0, 1e9, without_low=True).wrong),
    "ALIGN_WEIGHT": Variable("align_weight", check=_WEIGHT),
    "SWITCH_WEIGHT": Variable("switch_weight", check=_WEIGHT),
    "PRETRAINED_PATH": Variable("pretrained_model_path"),
    "EVAL_DATA": Variable("eval_data_path", True),
    "EVAL_STEPS": Variable("eval_steps", True),
    "TRAIN_RECIPE": Variable("training_recipe", check=word),
    "MODEL_MAX_LENGTH": Variable("model_max_length"),
    "TEACHER_LLM": Variable(recipe_only=True),
    "STUDENT_LLM": Variable(recipe_only=True),
    "VISION_TOWER": Variable("vision_tower", recipe_only=True),
    "CONNECTOR": Variable("connector_type", check=word, recipe_only=True),
    "CONV_VERSION": Variable("template", check=word, recipe_only=True),
    "VERSION": Variable(check=folder_name, recipe_only=True),
    "DATA_ROOT": Variable(recipe_only=True),
    "PRETRAIN_DATA": Variable(recipe_only=True),
    "PRETRAIN_IMAGES": Variable(recipe_only=True),
    "FINETUNE_DATA": Variable(recipe_only=True),
    "FINETUNE_IMAGES": Variable(recipe_only=True),
}

EVALUATION = {
    "EVAL_DIR": Variable(),
    "RESULTS_DIR": Variable(),
    "BATCH_SIZE": Variable(check=lambda text: None if text == "auto" else _COUNT(text)),
    "LIMIT": Variable(check=_COUNT),
    "SPLIT": Variable(check=folder_name),
    "CONV_MODE": Variable(check=word),
}

_NEVER_MEANT = {"PYTHON", "LIMIT", "SPLIT", "DRY_RUN", EXEMPT}
"""Known names that many unrelated variables resemble."""

_BATCH = "GLOBAL_BATCH_SIZE (samples per step) or PER_DEVICE_BATCH_SIZE"
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
"""Obvious guesses for a training (True) or an evaluation (False) -> the right name."""


def read(environment: Mapping[str, str], *, training: bool) -> dict[str, str]:
    """The checked variables of a training, or of an evaluation, that are set and not empty.

    A variable with a stage's prefix is kept even if it is empty: it then cancels the variable for all stages.

    Raises:
        ValueError: a value is invalid, or a name looks like a mistake.
    """
    own: dict[str, Variable] = MACHINE | (TRAINING if training else EVALUATION)
    prefixed = {
        f"{stage}_{name}": v for stage in STAGE_PREFIXES for name, v in own.items() if v.of_a_stage and training
    }
    known = prefixed | own
    others = (EVALUATION if training else TRAINING).keys() - _GUESSED[training].keys()
    allowed = {*environment.get(EXEMPT, "").split(), *others}
    values = {}
    for name, value in environment.items():
        if name in known:
            wrong = known[name].wrong(value) if value else None
            if wrong is not None:
                hint = " To choose GPUs, set GPUS, e.g. GPUS=0,1." if name == "DEVICE" else ""
                raise ValueError(f"{name} is {value!r}; it must be {wrong}.{hint}")
            if value or name in prefixed:
                values[name] = value
        elif name not in allowed:
            near = nearest(name, known, training=training)
            if near is not None:
                raise ValueError(
                    f"There is no variable {name}; did you mean {near}? (If another program uses it, set "
                    f'{EXEMPT}="{name}".)'
                )
    return values


def nearest(name: str, known: Collection[str], *, training: bool = True) -> str | None:
    """The known variable that a name seems to mean; None if it seems unrelated."""
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
    close = difflib.get_close_matches(name, targets, n=1, cutoff=0.85)
    close += [target for target in targets if _is_one_slip(name, target)]  # in short names beyond the cutoff
    if close:
        return close[0]
    prefix, _, rest = name.partition("_")
    if not rest or prefix not in ((*STAGE_PREFIXES, _EVALUATION_PREFIX) if training else (_EVALUATION_PREFIX,)):
        return None
    if rest in known:  # a variable that takes no prefix
        return rest
    own = [target for target in targets if target.startswith(f"{prefix}_")]
    similar = difflib.get_close_matches(name, own, n=1, cutoff=0)
    return similar[0] if similar else None


def _is_one_slip(name: str, target: str) -> bool:
    """Whether one letter after the first is missing, added or wrong, or two neighbours are swapped."""
    place = next((place for place, (ours, theirs) in enumerate(zip(name, target, strict=False)) if ours != theirs), -1)
    if place < 1:
        return place < 0 and abs(len(name) - len(target)) == 1
    rest, wanted = name[place:], target[place:]
    swapped = rest[:2] == wanted[1::-1] and rest[2:] == wanted[2:]
    return swapped or rest[1:] == wanted[1:] or rest[1:] == wanted or rest == wanted[1:]
