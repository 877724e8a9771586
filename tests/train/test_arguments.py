"""Arguments: v1's names and defaults, the flags of old scripts, and contradictions refused by name and value."""

import logging
import os

import pytest

from tinyllava_switchkd.train.command_line.arguments import (
    DataArguments,
    ModelArguments,
    TrainingArguments,
    distill_arguments,
)
from tinyllava_switchkd.train.command_line.argv import IGNORED, parse_arguments, translate_argv
from tinyllava_switchkd.train.preflight import checks

REQUIRED = ["--data_path", "d.json", "--vision_tower", "v", "--output_dir", "out", "--use_cpu", "True"]


V1_FINETUNE = """
--is_multimodal True --conv_version phi --mm_vision_select_layer -2 --image_aspect_ratio square
--attn_implementation sdpa --fp16 False --training_recipe common --tune_type_llm full
--tune_type_vision_tower frozen --tune_vision_tower_from_layer 0 --tune_type_connector full
--group_by_modality_length True --num_train_epochs 1 --per_device_train_batch_size 8
--per_device_eval_batch_size 4 --gradient_accumulation_steps 4 --evaluation_strategy no --save_strategy steps
--save_steps 50000 --save_total_limit 1 --learning_rate 2e-5 --weight_decay 0. --warmup_ratio 0.03
--lr_scheduler_type cosine --logging_steps 1 --tf32 False --model_max_length 2048
--gradient_checkpointing True --dataloader_num_workers 8 --lazy_preprocess True --tokenizer_use_fast False
--run_name base --logging_dir logs --save_safetensors True --local_rank=0
"""  # TinyLLaVA v1, scripts/train/finetune.sh


def parse(*argv):
    return parse_arguments([*REQUIRED, "--report_to", "none", *argv])


def test_names_and_defaults_are_v1s():
    model, data, training, distill, _ = parse()
    assert model.model_name_or_path == "TinyLlama/TinyLlama-1.1B-Chat-v1.0"
    assert (model.connector_type, model.mm_vision_select_layer) == ("linear", -1)
    assert model.mm_vision_select_feature == "patch"
    assert (model.resampler_hidden_size, model.num_queries, model.num_resampler_layers) == (768, 128, 3)
    assert (model.model_max_length, model.tokenizer_padding_side) == (512, "right")
    assert (data.image_aspect_ratio, data.template, data.is_multimodal) == ("square", "pretrain", True)
    assert (training.training_recipe, training.tune_type_llm) == ("common", "frozen")
    assert (training.tune_type_vision_tower, training.tune_type_connector) == ("frozen", "full")
    assert (training.tune_vision_tower_from_layer, training.optim, training.bits) == (10, "adamw_torch", 16)
    assert (training.lora_r, training.lora_alpha, training.lora_dropout, training.lora_bias) == (64, 16, 0.05, "none")
    assert TrainingArguments.__dataclass_fields__["report_to"].default == "tensorboard"
    method = distill.method()
    assert (method.name, method.loss, method.temperature) == ("switch_kd", "dbild", 3)
    assert (method.align_weight, method.switch_weight) == (1, 1)


def test_the_argument_line_of_a_v1_script_is_accepted(caplog, monkeypatch):
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", "")
    with caplog.at_level(logging.WARNING):
        model, _, training, _, given = parse(*V1_FINETUNE.split())
    assert model.mm_vision_select_layer == -2
    assert training.warmup_steps == 0.03 and training.get_warmup_steps(1000) == 30
    assert training.eval_strategy == "no" and training.gradient_checkpointing
    assert {"mm_vision_select_layer", "warmup_steps"} <= given.keys() and "lora_r" not in given
    assert os.environ["TENSORBOARD_LOGGING_DIR"] == "logs"
    for old in ("evaluation_strategy", "warmup_ratio", "lazy_preprocess", "tokenizer_use_fast", "logging_dir"):
        assert sum(f"--{old} " in record.getMessage() for record in caplog.records) == 1, old


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (["--evaluation_strategy", "no"], ["--eval_strategy", "no"]),
        (["--warmup_ratio=0.1"], ["--warmup_steps", "0.1"]),
        (["--warmup_ratio", "0.1", "--warmup_steps", "5"], ["--warmup_steps", "5"]),
        (["--group_by_length", "True"], ["--train_sampling_strategy", "group_by_length"]),
        (["--group_by_length", "False"], []),
        (["--no_cuda"], ["--use_cpu"]),
        (["--connector_lr", "1e-4"], ["--mm_projector_lr", "1e-4"]),
        (["--learning_rate", "1e-4"], ["--learning_rate", "1e-4"]),
        (["--lazy_preprocess"], []),
    ],
)
def test_translations(old, new):
    assert translate_argv(old) == new


def test_every_ignored_flag_is_dropped():
    assert translate_argv([token for name in IGNORED for token in (f"--{name}", "x")]) == []


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--tune_type_lm", "full"], ["--tune_type_lm", "did you mean --tune_type_llm"]),
        (["--warmup_ratio", "3"], ["--warmup_ratio", "'3'"]),
        (["--lora_r", "many"], ["lora_r", "many"]),
        (["--tune_type_llm", "all"], ["--tune_type_llm", "'all'", "frozen, full, lora, qlora"]),
        (["--tune_type_connector", "frozen"], ["nothing would be trained"]),
        (["--vision_tower_lr", "1e-5"], ["--vision_tower_lr 1e-05", "--tune_type_vision_tower is frozen"]),
        (["--tune_type_llm", "lora"], ["--tune_type_llm", "'lora'", "'common'"]),
        (["--training_recipe", "lora"], ["--training_recipe lora", "--tune_type_llm lora"]),
        (["--training_recipe", "lora", "--tune_type_llm", "lora", "--lora_dropout", "1"], ["--lora_dropout is 1"]),
        (["--bits", "5"], ["--bits is 5", "4, 8, 16"]),
        (["--image_aspect_ratio", "anyres"], ["anyres", "square, pad"]),
        (["--mm_vision_select_feature", "cls"], ["'cls'", "patch, cls_patch"]),
        (["--temperature", "2"], ["--temperature 2.0", "--teacher_path"]),
        (["--teacher_path", "t", "--temperature", "0"], ["temperature", "positive", "0.0"]),
        (
            ["--teacher_path", "t", "--align_weight", "0", "--switch_weight", "0"],
            ["--align_weight, --switch_weight are all 0", "'t'"],
        ),
        (["--teacher_bits", "4"], ["--teacher_bits 4", "--teacher_path"]),
        (["--teacher_path", "t", "--teacher_bits", "2"], ["--teacher_bits is 2", "16, 8, 4"]),
        (["--teacher_path", "t", "--top_k", "8"], ["--top_k 8", "loss bild_fkl, bild_rkl", "--distill_loss dbild"]),
        (["--label_smoothing_factor", "0.1"], ["--label_smoothing_factor 0.1"]),
        (["--auto_find_batch_size", "True"], ["--auto_find_batch_size True", "batch of a step"]),
        (["--eval_strategy", "steps"], ["--eval_strategy steps", "--eval_share"]),
    ],
)
def test_contradictions_are_refused_with_the_offending_values(argv, words):
    with pytest.raises(ValueError) as error:
        parse(*argv)
    message = str(error.value)
    assert "\n" not in message
    for word in words:
        assert word in message


UNUSED = """
--log_gradient_shares 1 --lora_r 7 --bits 4 --quant_type fp4 --vision_tower2 mof:x --max_nan_steps 3
"""


def test_flags_without_effect_cause_a_warning_each(caplog, monkeypatch):
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", "")  # v1's line sets it

    def warned(*argv):
        caplog.clear()
        parse(*argv)
        return [line.split()[0] for line in caplog.messages if "does nothing without" in line]

    assert sorted(warned(*UNUSED.split())) == sorted(word for word in UNUSED.split() if word.startswith("--"))
    adapters = ["--training_recipe", "qlora", "--tune_type_llm", "qlora"]
    towers = ["--vision_tower", "mof:openai/clip"]
    used = [*UNUSED.split(), "--teacher_path", "t", *adapters, *towers, "--on_nan", "skip"]
    assert not warned(*used) and not warned(*V1_FINETUNE.split()) and not warned("--bits", "16", "--vision_tower2", "")


@pytest.mark.parametrize("missing", ["--data_path", "--vision_tower", "--output_dir"])
def test_missing_arguments_are_named(missing):
    at = REQUIRED.index(missing)
    with pytest.raises(ValueError, match=missing):
        parse_arguments(REQUIRED[:at] + REQUIRED[at + 2 :])


def test_batch_rebalance_is_refused_on_several_ranks(monkeypatch):
    """It divides the samples among the ranks itself."""
    parse("--train_sampling_strategy", "batch_rebalance")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match=r"batch_rebalance .* on 2 processes; use group_by_length"):
        parse("--train_sampling_strategy", "batch_rebalance")


def test_a_process_uses_one_gpu_and_says_so():
    """transformers would divide every batch among all GPUs (DataParallel)."""
    training = parse("--save_only_model", "True").training
    training._n_gpu = 3
    assert training.n_gpu == 1 and training.train_batch_size == training.per_device_train_batch_size
    gpus, weights = checks.remarks(training)
    assert "one of 3 GPUs" in gpus and "torchrun" in gpus
    assert "--save_only_model True" in weights and "from the beginning" in weights


def test_groups_check_themselves_when_constructed():
    with pytest.raises(ValueError, match="model_max_length is 0"):
        ModelArguments(model_max_length=0)
    with pytest.raises(ValueError, match="image_backend"):
        DataArguments(image_backend="cv2")
    with pytest.raises(ValueError, match="chunk_size is 0"):
        distill_arguments()(teacher_path="t", chunk_size=0)


@pytest.mark.parametrize("name", ["template", "conv_version", "conv_mode"])
def test_the_template_has_one_meaning_under_all_its_names(name):
    assert parse(f"--{name}", "phi").data.template == "phi"


def test_settings_of_checkpointing_are_an_object():
    for value in ("[1]", "true", "use_reentrant"):
        with pytest.raises(ValueError, match="must be a JSON object"):
            parse("--gradient_checkpointing_kwargs", value)
    kept = parse("--gradient_checkpointing", "True", "--gradient_checkpointing_kwargs", '{"preserve_rng_state": false}')
    assert kept.training.gradient_checkpointing_kwargs == {"use_reentrant": False, "preserve_rng_state": False}
