"""Settings that silently ruin a run: out of range, infinite, NaN, or contradicting DeepSpeed's file."""

from __future__ import annotations

import dataclasses
import json
import sys

import pytest

from tinyllava_switchkd.train.command_line.arguments import (
    DataArguments,
    ModelArguments,
    TrainingArguments,
    distill_arguments,
)
from tinyllava_switchkd.train.command_line.argv import parse_arguments
from tinyllava_switchkd.train.command_line.deepspeed_config import check_deepspeed, warn_of_builds
from tinyllava_switchkd.train.command_line.settings import ALLOWED, check_settings

NEEDED = ["--data_path", "d", "--output_dir", "o", "--vision_tower", "t", "--report_to", "none", "--use_cpu", "True"]
WITH_TEACHER = ["--teacher_path", "t"]

BAD = {
    "learning_rate": ["nan", "inf", "-0.0001", "2e5"],
    "mm_projector_lr": ["nan", "inf", "-0.1"],
    "weight_decay": ["nan", "inf", "-0.1", "1000"],
    "adam_beta1": ["nan", "inf", "-0.1", "1", "1.5"],
    "adam_beta2": ["nan", "-0.9", "1.0", "99.9"],
    "adam_epsilon": ["nan", "inf", "0", "-0.00000001"],
    "max_grad_norm": ["nan", "inf", "-1"],
    "num_train_epochs": ["nan", "inf", "0", "-1"],
    "max_steps": ["0", "-2", "99999999999999"],
    "warmup_steps": ["nan", "inf", "-1", "1.5"],
    "logging_steps": ["nan", "inf", "0", "-5", "1.5"],
    "save_steps": ["nan", "inf", "0", "-10", "2.5"],
    "save_total_limit": ["0", "-1"],
    "per_device_train_batch_size": ["0", "-4"],
    "gradient_accumulation_steps": ["0", "-1"],
    "seed": ["-1", "4294967296"],
    "data_seed": ["-1"],
    "dataloader_num_workers": ["-1", "100000"],
    "dataloader_prefetch_factor": ["0", "-2"],
    "ddp_timeout": ["0", "-1"],
    "lora_r": ["0", "-8"],
    "lora_dropout": ["nan", "1", "-0.1", "inf"],
    "tune_vision_tower_from_layer": ["-1"],
    "num_queries": ["0", "-1"],
    "num_resampler_layers": ["0"],
    "resampler_hidden_size": ["0"],
    "model_max_length": ["0", "-1"],
    "mm_vision_select_layer": ["99999999"],
    "chunk_size": ["0", "-1"],
    "temperature": ["nan", "inf", "0", "-3"],
    "align_weight": ["nan", "inf", "-1"],
    "switch_weight": ["nan", "-0.5"],
}


@pytest.mark.parametrize("name, value", [(name, value) for name, values in BAD.items() for value in values])
def test_a_setting_out_of_range_is_refused_with_its_value(name, value):
    teacher = WITH_TEACHER if name in ("temperature", "align_weight", "switch_weight") else []
    with pytest.raises(ValueError) as error:
        parse_arguments([*NEEDED, *teacher, f"--{name}={value}"])
    message = str(error.value)
    assert name in message and "must be" in message and "\n" not in message
    spellings = {value, str(float(value)), f"{float(value):g}"}
    assert any(spelling in message for spelling in spellings)


def test_the_lock_of_a_killed_build_causes_a_warning(tmp_path, monkeypatch, caplog):
    """torch would wait for its lock for ever."""
    for variable, value, inner in (("TORCH_EXTENSIONS_DIR", tmp_path / "own", "cpu_adam"), ("HOME", tmp_path, None)):
        monkeypatch.delenv("TORCH_EXTENSIONS_DIR", raising=False)
        monkeypatch.setenv(variable, str(value))
        folder = value / (inner or ".cache/torch_extensions/py311_cpu/shm")
        folder.mkdir(parents=True)
        caplog.clear()
        warn_of_builds()
        assert not caplog.text
        (folder / "lock").touch()
        warn_of_builds()
        assert str(folder / "lock") in caplog.text and "remove that file" in caplog.text


@pytest.mark.parametrize("value", ["inf", "nan", "-inf"])
@pytest.mark.parametrize("name", ["optim_args", "lr_scheduler_kwargs"])
def test_a_number_within_a_setting_is_finite_too(name, value):
    words = f"a=1, eps={value}" if name == "optim_args" else json.dumps({"a": 1, "deep": [{"eps": float(value)}]})
    with pytest.raises(ValueError, match=f"--{name} has {value} for '(deep.)?eps'; it must be a finite number"):
        parse_arguments([*NEEDED, f"--{name}={words}"])


@pytest.mark.parametrize("name", ["learning_rate", "save_steps", "seed", "max_grad_norm"])
@pytest.mark.parametrize("value", ["1e-4", None, True, [1]])
def test_a_setting_of_another_type_is_refused(name, value):
    group = dataclasses.make_dataclass("Group", [(name, float, 1.0)])(value)
    with pytest.raises(ValueError, match=name):
        check_settings(group)


def test_defaults_and_common_values_are_in_range():
    for group in (ModelArguments, DataArguments, TrainingArguments, distill_arguments()):
        for field in dataclasses.fields(group):
            if field.name in ALLOWED and field.default is not None:
                assert field.default in ALLOWED[field.name], field.name
    values = "--warmup_steps=0.03 --save_steps=0.1 --logging_steps=1 --max_steps=-1 --max_grad_norm=0 --seed=0"
    parse_arguments([*NEEDED, *values.split(), "--weight_decay=0", "--adam_beta1=0", "--save_total_limit=1"])


def test_every_range_is_of_a_setting_that_exists():
    groups = (ModelArguments, DataArguments, TrainingArguments, distill_arguments())
    assert set(ALLOWED) <= {field.name for group in groups for field in dataclasses.fields(group)}


ZERO2 = {"zero_optimization": {"stage": 2}}
GOOD = [
    {},
    ZERO2,
    {"train_micro_batch_size_per_gpu": "auto", "gradient_clipping": 1.0, "bf16": {"enabled": "auto"}, **ZERO2},
    {"zero_optimization": {"stage": 3, "offload_param": {"device": "cpu"}, "stage3_max_live_parameters": 1e9}},
    {"optimizer": {"type": "AdamW", "params": {"lr": "auto", "betas": "auto"}}, **ZERO2},
]
WRONG = [
    ({"zero_optimization": 2}, "'zero_optimization' is 2"),
    ({"zero_optimization": None}, "'zero_optimization' is None"),
    ({"zero_optimization": {"stage": "2"}}, "stage' is '2'"),
    ({"zero_optimization": {"stage": 4}}, "stage' is 4"),
    ({"zero_optimization": {"stage": -1}}, "stage' is -1"),
    ({"zero_optimization": {"stage": 2.5}}, "stage' is 2.5"),
    ({"zero_optimization": {"stage": True}}, "stage' is True"),
    ({"zero_optimization": {"stage": None}}, "stage' is None"),
    ({"zero_optimization": {"stage": [2]}}, "stage' is [2]"),
    ({"zero_optimization": {"stage": 2, "stages": 2}}, "did you mean 'stage'"),
    ({"zero_optimization": {"stage": 2, "reduce_bucket_siz": 1}}, "did you mean 'reduce_bucket_size'"),
    ({"zero_optimization": {"stage": 2, "reduce_bucket_size": -5}}, "reduce_bucket_size' is -5"),
    ({"zero_optimization": {"stage": 2, "sub_group_size": float("nan")}}, "sub_group_size' is nan"),
    ({"zero_optimization": {"stage": 2, "overlap_comm": "yes please"}}, "overlap_comm' is 'yes please'"),
    ({"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "gpu"}}}, "offload_optimizer.device' is 'gpu'"),
    ({"zero_optimization": {"stage": 2, "offload_optimizer": 5}}, "offload_optimizer' is 5"),
    ({"zero_optimization": {"stage": 2, "offload_param": {"device": "cpu"}}}, "needs stage 3"),
    ({"zero_optimization": {"stage": 0, "offload_optimizer": {"device": "cpu"}}}, "needs stage 1"),
    ({"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}}, "nvme_path"),
    ({"zero_optimisation": {"stage": 2}}, "did you mean 'zero_optimization'"),
    ({"gradient_accumulation_step": 2}, "did you mean 'gradient_accumulation_steps'"),
    ({"fp16": True}, "'fp16' is True"),
    ({"fp16": {"enabled": "true"}}, "'fp16.enabled' is 'true'"),
    ({"bf16": {"enabled": 1}}, "'bf16.enabled' is 1"),
    ({"bf16": "auto"}, "'bf16' is 'auto'"),
    ({"fp16": {"enabled": True}, "bf16": {"enabled": True}}, "both true"),
    ({"bf16": {"enabled": True}}, "enabled=True there, bf16|bf16_full_eval=False here"),
    ({"train_micro_batch_size_per_gpu": 0}, "train_micro_batch_size_per_gpu' is 0"),
    ({"train_micro_batch_size_per_gpu": "4"}, "train_micro_batch_size_per_gpu' is '4'"),
    ({"train_micro_batch_size_per_gpu": 3}, "=3 there, per_device_train_batch_size=8 here"),
    ({"gradient_accumulation_steps": -1}, "gradient_accumulation_steps' is -1"),
    ({"gradient_accumulation_steps": 2}, "=2 there, gradient_accumulation_steps=1 here"),
    ({"train_batch_size": 12.5}, "train_batch_size' is 12.5"),
    ({"train_batch_size": 7}, "train_batch_size (calculated)=8 here"),
    ({"gradient_clipping": -1}, "gradient_clipping' is -1"),
    ({"gradient_clipping": "1"}, "gradient_clipping' is '1'"),
    ({"gradient_clipping": float("inf")}, "gradient_clipping' is inf"),
    ({"gradient_clipping": 0.5}, "=0.5 there, max_grad_norm=1.0 here"),
    ({"optimizer": "AdamW"}, "'optimizer' is 'AdamW'"),
    ({"optimizer": {"params": {}}}, "optimizer.type' is None"),
    ({"optimizer": {"type": "AdamW", "params": [1]}}, "optimizer.params' is [1]"),
    ({"optimizer": {"type": "AdamW", "params": {"lr": "1e-4"}}}, "optimizer.params.lr=1e-4 there"),
    ({"optimizer": {"type": "AdamW", "params": {"lr": 1.0}}}, "=1.0 there, learning_rate=5e-05 here"),
    ({"optimizer": {"type": "AdamW", "params": {"betas": [0.9]}}}, "betas=[0.9] there"),
    ({"optimizer": {"type": "AdamW", "params": {"betas": [0.5, 0.6]}}}, "adam_beta1+adam_beta2=[0.9, 0.999] here"),
    ({"scheduler": {"type": 3}}, "scheduler.type' is 3"),
    ({"scheduler": {"type": "WarmupLR", "params": {"warmup_max_lr": -1}}}, "warmup_max_lr=-1 there"),
    ({"steps_per_print": 0}, "steps_per_print' is 0"),
    ({"fp16": {"loss_scale": float("nan")}, **ZERO2}, "'fp16.loss_scale' is nan"),
    ({"aio": {"block_sizes": [float("inf")]}, **ZERO2}, "'aio.block_sizes' is inf"),
    ({"gradient_clipping": True, **ZERO2}, "gradient_clipping' is True"),
    ({"gradient_clipping": None, **ZERO2}, "gradient_clipping' is None"),
    ({"gradient_accumulation_steps": True, **ZERO2}, "gradient_accumulation_steps' is True"),
    ({"zero_optimization": {"stage": "auto"}}, "stage' is 'auto'"),
]


@pytest.fixture(scope="module")
def training(tmp_path_factory):
    return TrainingArguments(output_dir=str(tmp_path_factory.mktemp("out")), use_cpu=True, report_to="none")


@pytest.mark.parametrize("config", GOOD, ids=str)
def test_good_deepspeed_configurations(training, config, tmp_path):
    (tmp_path / "ds.json").write_text(json.dumps(config))
    for form in (config, json.dumps(config), str(tmp_path / "ds.json")):
        check_deepspeed(form, training)


@pytest.mark.parametrize(
    "ignored", [{"vision_tower_lr": 0.0}, {"mm_projector_lr": 1e-3}, {"weight_decay": 0.1}], ids=str
)
def test_an_optimiser_of_deepspeeds_has_no_groups_of_parameters(tmp_path, ignored):
    """Ours has one learning rate per part, and no decay of norms and biases."""
    parts = {"tune_type_vision_tower": "full"}
    training = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none", **parts, **ignored)
    check_deepspeed(ZERO2, training)
    (name,) = ignored
    with pytest.raises(ValueError, match=f"'optimizer' .*, unlike --{name} {ignored[name]}; leave"):
        check_deepspeed({"optimizer": {"type": "AdamW", "params": {"lr": "auto"}}, **ZERO2}, training)


@pytest.mark.parametrize("name", ["zero2", "zero2_offload", "zero3"])
def test_our_own_deepspeed_configurations(training, name):
    check_deepspeed(f"scripts/train/{name}.json", training)


def test_no_deepspeed(training, monkeypatch):
    monkeypatch.setitem(sys.modules, "deepspeed.runtime.zero.config", None)
    with pytest.raises(ImportError, match=r"needs DeepSpeed .*pip install"):
        check_deepspeed(ZERO2, training)


@pytest.mark.parametrize("config, words", WRONG, ids=lambda value: str(value)[:60])
def test_wrong_deepspeed_configurations(training, config, words, tmp_path):
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError) as error:
        check_deepspeed(str(path), training)
    message = str(error.value)
    assert words in message and str(path) in message and "\n" not in message


@pytest.mark.parametrize(
    "content, words",
    [
        ("", "not valid JSON"),
        ("{", "not valid JSON"),
        ("[]", "holds a JSON list"),
        ("2", "holds a JSON int"),
        ("null", "holds a JSON NoneType"),
        ("[" * 100_000, "nested too deeply"),
        ('{"a": "\xff"}'.encode("latin-1"), "not UTF-8"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_files_that_are_not_a_configuration(content, words, tmp_path):
    path = tmp_path / "ds.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=words):
        parse_arguments([*NEEDED, "--deepspeed", str(path)])


@pytest.mark.parametrize("name", ["nowhere/zero2.json", "zero2"])
def test_a_configuration_that_does_not_exist(name):
    with pytest.raises(FileNotFoundError, match=r"--deepspeed .*zero2.*does not exist; scripts/train has zero2\.json"):
        parse_arguments([*NEEDED, "--deepspeed", name])
