"""Environment variables: wrong values and misspelt names are errors that name the remedy."""

from __future__ import annotations

import pytest

from tinyllava_switchkd.launch.variables import EVALUATION, MACHINE, TRAINING, nearest, read

USUAL = """
HOME PATH SHELL USER LANG TERM HOSTNAME PWD OLDPWD SHLVL EDITOR TMPDIR VIRTUAL_ENV CONDA_PREFIX PYTHONPATH
PYTHON_VERSION PYTHONUNBUFFERED CUDA_VISIBLE_DEVICES CUDA_HOME CUDA_VERSION NVIDIA_VISIBLE_DEVICES NCCL_DEBUG
NCCL_SOCKET_IFNAME OMP_NUM_THREADS MKL_NUM_THREADS HF_HOME HF_TOKEN HF_HUB_OFFLINE HF_ENDPOINT
TOKENIZERS_PARALLELISM WANDB_API_KEY WANDB_PROJECT RANK LOCAL_RANK WORLD_SIZE LOCAL_WORLD_SIZE SLURM_JOB_ID
SLURM_NNODES SLURM_NODEID SLURM_GPUS SLURM_NTASKS SLURM_PROCID LD_LIBRARY_PATH DS_ACCELERATOR
GPU_DEVICE_ORDINAL KUBERNETES_PORT NODE_NAME NUM_NODES LS_COLORS DISPLAY SSH_CLIENT LOGNAME MAIL DEBUG VERBOSE
CI GITHUB_ACTIONS PYTEST_VERSION XDG_RUNTIME_DIR DBUS_SESSION_BUS_ADDRESS PIP_CACHE_DIR UV_CACHE_DIR
QUICKSTART_OUT TINYLLAVA_PYTHON
"""

WRONG_VALUES = [
    ("GLOBAL_BATCH_SIZE", "0"),
    ("GLOBAL_BATCH_SIZE", "-128"),
    ("GLOBAL_BATCH_SIZE", "12.5"),
    ("GLOBAL_BATCH_SIZE", "128 "),
    ("GLOBAL_BATCH_SIZE", "9" * 30),
    ("SAVE_TOTAL_LIMIT", "9" * 5000),
    ("PER_DEVICE_BATCH_SIZE", "-1"),
    ("PER_DEVICE_BATCH_SIZE", "eight"),
    ("PRETRAIN_PER_DEVICE_BATCH_SIZE", "0"),
    ("GRAD_ACCUM", "0"),
    ("FINETUNE_GRAD_ACCUM", "-2"),
    ("DEVICE", "gpu"),
    ("DEVICE", "CUDA"),
    ("DEVICE", "cuda:1"),
    ("DEVICE", "mps"),
    ("LAUNCHER", "accelerate"),
    ("LAUNCHER", "bash"),
    ("PRECISION", "int4"),
    ("PRECISION", "16"),
    ("LEARNING_RATE", "-1e-3"),
    ("LEARNING_RATE", "nan"),
    ("LEARNING_RATE", "inf"),
    ("LEARNING_RATE", "2e-5x"),
    ("DISTILL_LEARNING_RATE", "1_0"),
    ("CONNECTOR_LR", "-1"),
    ("VISION_TOWER_LR", "full"),
    ("EPOCHS", "0"),
    ("EPOCHS", "-1"),
    ("MAX_STEPS", "0"),
    ("MAX_STEPS", "-2"),
    ("MAX_STEPS", "1e3"),
    ("WARMUP", "-0.1"),
    ("WEIGHT_DECAY", "-0.1"),
    ("SEED", "-1"),
    ("SEED", "4294967296"),
    ("TUNE_LLM", "yes"),
    ("TUNE_LLM", "partially-tune"),
    ("TUNE_VISION_TOWER", "Frozen"),
    ("TUNE_CONNECTOR", "none"),
    ("GRADIENT_CHECKPOINTING", "maybe"),
    ("GROUP_BY_MODALITY", "2"),
    ("SAVE_STEPS", "0"),
    ("SAVE_STEPS", "1.5"),
    ("LOGGING_STEPS", "-1"),
    ("SAVE_TOTAL_LIMIT", "0"),
    ("NUM_WORKERS", "-1"),
    ("LORA_R", "0"),
    ("LORA_ALPHA", "0"),
    ("TEMPERATURE", "0"),
    ("TEMPERATURE", "-3"),
    ("ALIGN_WEIGHT", "-1"),
    ("SWITCH_WEIGHT", "infinity"),
    ("TEACHER_BITS", "2"),
    ("MASTER_PORT", "0"),
    ("MASTER_PORT", "65536"),
    ("NNODES", "0"),
    ("NODE_RANK", "-1"),
    ("SELECT_LAYER", "last"),
    ("SELECT_FEATURE", "cls"),
    ("MODEL_MAX_LENGTH", "0"),
    ("EVAL_STEPS", "0"),
    ("VERSION", "../../x"),
    ("VERSION", ".."),
    ("VERSION", "a/b"),
    ("VERSION", "a\\b"),
    ("VERSION", "a\nb"),
    ("VERSION", " base"),
    ("VERSION", "-base"),
    ("VERSION", "x" * 300),
    ("DISTILL_LOSS", "two words"),
    ("EXTRA_ARGS", "seed 3"),
    ("OUTPUT_ROOT", "two\nlines"),
]

WRONG_NAMES = [
    ("PRETRAIN_LERNING_RATE", "PRETRAIN_LEARNING_RATE"),
    ("PRETRAIN_LR", "PRETRAIN_SEED"),  # no similar name; the message still names one with its prefix
    ("FINETUNE_EPOCH", "FINETUNE_EPOCHS"),
    ("FINETUNE_IMAGE", "FINETUNE_IMAGES"),
    ("DISTILL_LOS", "DISTILL_LOSS"),
    ("DISTILL_METHODS", "DISTILL_METHOD"),
    ("DISTILL_BATCH", "DISTILL_"),
    ("LEARNINGRATE", "LEARNING_RATE"),
    ("learning_rate", "LEARNING_RATE"),
    ("LEARNIGN_RATE", "LEARNING_RATE"),
    ("LR", "LEARNING_RATE"),
    ("BATCH_SIZE", "GLOBAL_BATCH_SIZE"),
    ("EPOCH", "EPOCHS"),
    ("MAX_STEP", "MAX_STEPS"),
    ("GPU", "GPUS"),
    ("DEVICES", "DEVICE"),
    ("TEMPRATURE", "TEMPERATURE"),
    ("SWITCH_WEIGTH", "SWITCH_WEIGHT"),
    ("WARM_UP", "WARMUP"),
    ("TEACHER_PAHT", "TEACHER_PATH"),
    ("OUTPUT_ROOTS", "OUTPUT_ROOT"),
    ("HOST_FILE", "HOSTFILE"),
    ("BATCH", "GLOBAL_BATCH_SIZE"),
    ("GLOBAL_BATCH", "GLOBAL_BATCH_SIZE"),
    ("TRAIN_BATCH_SIZE", "PER_DEVICE_BATCH_SIZE"),
    ("GRADIENT_ACCUMULATION_STEPS", "GRAD_ACCUM"),
    ("lr", "LEARNING_RATE"),
    ("TEACHER", "TEACHER_PATH"),
    ("DISTILL_TEMPERATURE", "mean TEMPERATURE"),
    ("FINETUNE_PRECISION", "mean PRECISION"),
    ("EVAL_EVERY", "EVAL_STEPS"),
    ("EPOHCS", "EPOCHS"),
    ("SEDE", "SEED"),
    ("DEVIXE", "DEVICE"),
    ("ZRO", "ZERO"),
    ("NNODEX", "NNODES"),
    ("LORA_A", "LORA_R"),
]

WRONG_NAMES_OF_AN_EVALUATION = [
    ("EVAL_BATCH_SIZE", "mean BATCH_SIZE"),
    ("EVAL_LIMIT", "mean LIMIT"),
    ("EVAL_FOLDER", "mean EVAL_DIR"),
    ("EVAL_DIRR", "mean EVAL_DIR"),
    ("BATCH", "mean BATCH_SIZE"),
    ("LIMITS", "mean LIMIT"),
    ("RESULTS", "mean RESULTS_DIR"),
]


@pytest.mark.parametrize(("name", "value"), WRONG_VALUES)
def test_wrong_values(name, value):
    with pytest.raises(ValueError) as refused:
        read({name: value}, training=True)
    message = str(refused.value)
    assert message.startswith(f"{name} is {value!r}; it must be ") and "\n" not in message


@pytest.mark.parametrize(("name", "meant"), WRONG_NAMES)
def test_wrong_names(name, meant):
    with pytest.raises(ValueError) as refused:
        read({name: "1"}, training=True)
    message = str(refused.value)
    assert message.startswith(f"There is no variable {name}; did you mean ")
    assert meant.split("_")[0] in message if name == "PRETRAIN_LR" else meant in message
    assert read({name: "1", "ALLOW_VARIABLES": f"OTHER {name}"}, training=True) == {"ALLOW_VARIABLES": f"OTHER {name}"}


@pytest.mark.parametrize(("name", "meant"), WRONG_NAMES_OF_AN_EVALUATION)
def test_wrong_names_of_an_evaluation(name, meant):
    with pytest.raises(ValueError, match=f"There is no variable {name}; did you {meant}"):
        read({name: "1"}, training=False)


def test_usual_environment_is_accepted():
    assert read(dict.fromkeys(USUAL.split(), "1"), training=True) == {}
    assert read(dict.fromkeys(USUAL.split(), "1"), training=False) == {}


def test_training_accepts_variables_of_evaluation_and_vice_versa():
    assert read(dict.fromkeys(EVALUATION.keys() - {"BATCH_SIZE"}, "1"), training=True) == {}
    assert read(dict.fromkeys(TRAINING, "1"), training=False) == {}
    for name, value in (
        ("BATCH_SIZE", "0"),
        ("LIMIT", "-1"),
        ("SPLIT", "../val"),
        ("BATCHSIZE", "4"),
        ("DEVICE", "gpu"),
    ):
        with pytest.raises(ValueError, match=name):
            read({name: value}, training=False)


def test_right_values():
    good = {
        "GLOBAL_BATCH_SIZE": "128",
        "LEARNING_RATE": "2e-5",
        "FINETUNE_MAX_STEPS": "-1",
        "WARMUP": "0.03",
        "SAVE_STEPS": "0.1",
        "SELECT_LAYER": "-2",
        "SELECT_FEATURE": "cls_patch",
        "VERSION": "my run.2",
        "EXTRA_ARGS": "--packing True",
        "TUNE_VISION_TOWER": "partially-tune",
    }
    assert read(good, training=True) == good
    assert read({"MAX_STEPS": "", "DEVICE": ""}, training=True) == {}
    assert read({"DISTILL_MAX_STEPS": ""}, training=True) == {"DISTILL_MAX_STEPS": ""}


def test_known_names_are_not_mistaken_for_each_other():
    for name in {**MACHINE, **TRAINING}:
        assert nearest(name, [name]) in (name, None)
