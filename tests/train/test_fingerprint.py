"""Resuming with another command: each change of the maths is named and refused, unless it is allowed."""

import json
import shutil
from pathlib import Path

import pytest

from tests.train.world import command_line, write_world
from tinyllava_switchkd.train.command_line.argv import parse_arguments
from tinyllava_switchkd.train.reliability import checkpoints, fingerprint
from tinyllava_switchkd.train.train import main


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    """A distillation that was stopped after the first of two checkpoints, and its world."""
    folder = tmp_path_factory.mktemp("fingerprint")
    world = write_world(folder / "world", samples=6)
    for name in ("teacher", "other_teacher"):
        seed = {"seed": 1 if name == "teacher" else 2, "model_name_or_path": world["teacher_llm"]}
        assert main(command_line(world, folder / name, max_steps=1, save_strategy="no", **seed)) == 0
        world[name] = str(folder / name)
    shutil.copytree(world["teacher"], folder / "moved")
    world["moved"] = str(folder / "moved")
    records = json.loads(Path(world["finetune"]).read_text())
    (folder / "other.json").write_text(json.dumps(records[::-1]))
    (folder / "same.json").write_text(Path(world["finetune"]).read_text())
    world |= {"other_data": str(folder / "other.json"), "same_data": str(folder / "same.json")}
    assert main(line(world, folder / "run")) == 0
    (folder / "run" / "trainer_state.json").unlink()
    shutil.rmtree(folder / "run" / "checkpoint-2")
    return world, folder / "run"


def line(world, output, **changes):
    settings = {"teacher_path": world["teacher"], "save_steps": 1, "max_steps": 2}
    changes = {name: world.get(value, value) if isinstance(value, str) else value for name, value in changes.items()}
    return command_line(world, output, **{**settings, **changes})


CHANGED = [
    ({"teacher_path": "other_teacher"}, ["teacher_path"]),
    ({"teacher_path": None}, ["teacher_path"]),
    ({"data_path": "other_data"}, ["data_path"]),
    ({"seed": 7}, ["seed"]),
    ({"per_device_train_batch_size": 1}, ["per_device_train_batch_size"]),
    ({"gradient_accumulation_steps": 2}, ["gradient_accumulation_steps"]),
    (
        {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2},
        ["gradient_accumulation_steps", "per_device_train_batch_size"],
    ),
    ({"group_by_modality_length": True}, ["group_by_modality_length"]),
    ({"distill_loss": "rkl"}, ["distill_loss"]),
    ({"temperature": 2.0}, ["temperature"]),
    ({"align_weight": 0.5, "switch_weight": 0.25}, ["align_weight", "switch_weight"]),
    ({"weight_decay": 0.1}, ["weight_decay"]),
    ({"adam_beta2": 0.95}, ["adam_beta2"]),
    ({"lr_scheduler_type": "cosine"}, ["lr_scheduler_type"]),
    ({"max_grad_norm": 0.5}, ["max_grad_norm"]),
    ({"model_max_length": 300}, ["model_max_length"]),
    ({"mm_projector_lr": 1e-3}, ["mm_projector_lr"]),
]


@pytest.mark.parametrize(("changes", "named"), CHANGED, ids=lambda value: "-".join(value))
def test_each_difference_is_named_and_refused(begun, tmp_path, capsys, changes, named):
    world, run = begun
    shutil.copytree(run, tmp_path / "run")
    assert main(line(world, tmp_path / "run", **changes)) == 1
    (sentence,) = [text for text in capsys.readouterr().err.splitlines() if text.startswith("error: ")]
    assert sentence.endswith(f"--allow_changed {' '.join(named)}.") and "checkpoint-1" in sentence
    assert not (tmp_path / "run" / "checkpoint-2").exists()


def test_differences_can_be_allowed(begun, tmp_path, capsys):
    world, run = begun
    shutil.copytree(run, tmp_path / "run")
    changes = {"teacher_path": "other_teacher", "temperature": 2.0}
    assert main(line(world, tmp_path / "run", **changes, allow_changed="temperature")) == 1
    assert "--allow_changed teacher_path." in capsys.readouterr().err
    allowed = [*line(world, tmp_path / "run", **changes), "--allow_changed", "temperature", "teacher_path"]
    assert main(allowed) == 0
    said = capsys.readouterr().err
    assert "Allowed to differ" in said and "temperature 3.0, now 2.0" in said


def test_what_a_checkpoint_cannot_be_read_with_cannot_be_allowed(begun, tmp_path):
    """DeepSpeed has its own files for the optimiser; these settings change the shapes of weights."""
    world, run = begun
    described = fingerprint.describe(parse_arguments(line(world, tmp_path)), 1)
    for name, value in {"deepspeed": "ZeRO-2", "lora_r": 8, "num_queries": 4, "resampler_hidden_size": 16}.items():
        with pytest.raises(ValueError, match=f"{name} .*; use them, or start a new run") as raised:
            fingerprint.check(run / "checkpoint-1", {**described, name: value}, [name])
        assert "--allow_changed" not in str(raised.value)
    recorded = {**described, "deepspeed": "ZeRO-2"}
    shutil.copytree(run / "checkpoint-1", tmp_path / "sharded")
    (tmp_path / "sharded" / fingerprint.FILE).write_text(json.dumps(recorded))
    with pytest.raises(ValueError, match="--allow_changed deepspeed"):  # these two have the same files
        fingerprint.check(tmp_path / "sharded", {**recorded, "deepspeed": "ZeRO-1"})
    fingerprint.check(tmp_path / "sharded", {**recorded, "deepspeed": "ZeRO-1"}, ["deepspeed"])


def test_an_allowed_name_must_be_an_argument(begun, tmp_path):
    world, _ = begun
    with pytest.raises(ValueError, match=r"--allow_changed names 'temprature'.*did you mean temperature\?"):
        parse_arguments(line(world, tmp_path, allow_changed="temprature"))


def test_arguments_that_do_not_change_the_maths_may_change(begun, tmp_path):
    """Data and teacher with the same content at other paths; other paths, intervals and length."""
    world, run = begun
    shutil.copytree(run, tmp_path / "run")
    changes = {"teacher_path": "moved", "data_path": "same_data", "logging_steps": 3, "save_steps": 5, "max_steps": 3}
    assert main(line(world, tmp_path / "run", **changes, chunk_size=7, save_total_limit=2)) == 0


def test_logging_memory_patience_and_the_path_of_held_out_data_may_change(begun, tmp_path):
    world, _ = begun
    held_out = {"eval_strategy": "steps", "eval_steps": 1}
    best = {"load_best_model_at_end": True, "metric_for_best_model": "ce", "early_stopping_patience": 3}

    def described(data, **changes):
        argv = line(world, tmp_path, eval_data_path=data, **held_out, **{**best, **changes})
        return fingerprint.describe(parse_arguments(argv))

    free = {
        "log_gradient_shares": 1,
        "keep_in_memory": True,
        "allow_outside_images": True,
        "early_stopping_patience": 5,
    }
    before = described(world["finetune"])
    assert fingerprint.differences(before, described(world["same_data"], **free)) == {}
    changed = fingerprint.differences(before, described(world["other_data"]))
    assert changed == {"eval_data_path": "the content of --eval_data_path has changed"}


def test_a_checkpoint_from_before_0_2_names_its_template(begun, tmp_path, capsys):
    world, run = begun
    shutil.copytree(run, tmp_path / "run")
    folder = tmp_path / "run" / "checkpoint-1"
    said = json.loads((folder / "fingerprint.json").read_text())
    del said["template"]
    said["conv_version"] = "phi"
    (folder / "fingerprint.json").write_text(json.dumps(said))
    (folder.parent / checkpoints.RECORD).write_text(json.dumps({folder.name: checkpoints.seal(folder, 1, 1)}))
    assert main(line(world, tmp_path / "run")) == 1
    assert "template 'phi', now 'qwen2_base'" in capsys.readouterr().err


def test_a_finished_run_with_other_arguments_is_refused(begun, tmp_path, capsys):
    """Otherwise a chain would continue from a stage that ran with other arguments."""
    world, _ = begun
    assert main(line(world, tmp_path / "run", max_steps=1)) == 0
    assert main(line(world, tmp_path / "run", max_steps=1)) == 0
    assert main(line(world, tmp_path / "run", max_steps=1, temperature=1.0)) == 1
    assert "temperature 3.0, now 1.0" in capsys.readouterr().err


def test_with_another_number_of_processes_the_batch_of_a_step_is_compared(begun, tmp_path):
    world, _ = begun
    described = fingerprint.describe(parse_arguments(line(world, tmp_path)), 1)
    assert described["per_device_train_batch_size"] == 2
    shared = {**described, "world_size": 2, "per_device_train_batch_size": 1}
    assert fingerprint.differences(described, shared) == {}
    assert list(fingerprint.differences(described, {**described, "world_size": 2})) == ["step_samples"]


def test_a_teachers_digest_covers_the_scale_of_its_adapters(tmp_path):
    """The same LoRA weights with another lora_alpha are another teacher."""
    for name, text in (
        ("config.json", "{}"),
        ("adapter_model.safetensors", ""),
        ("adapter_config.json", '{"lora_alpha": 8}'),
    ):
        (tmp_path / name).write_text(text)
    before = fingerprint.teacher_digest(str(tmp_path))
    (tmp_path / "adapter_config.json").write_text('{"lora_alpha": 800}')
    assert fingerprint.teacher_digest(str(tmp_path)) != before
