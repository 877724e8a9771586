"""Output folders that are refused, and numbers with which no run is possible."""

from types import SimpleNamespace

import pytest

from tests.train.toy import toy_arguments
from tests.train.world import command_line, write_world
from tinyllava_switchkd.train.preflight.checks import check_batch, few_steps
from tinyllava_switchkd.train.train import main


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return write_world(tmp_path_factory.mktemp("world") / "world", samples=4)


def refused(capsys, argv):
    assert main(argv) == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    return line


@pytest.mark.parametrize("read", ["model_name_or_path", "vision_tower"])
@pytest.mark.parametrize("overwrite", [False, True])
def test_inputs_of_the_run_are_not_overwritten(world, capsys, read, overwrite):
    folder = world["llm" if read == "model_name_or_path" else "tower"]
    line = refused(capsys, command_line(world, folder + "/", overwrite_output_dir=overwrite))
    assert f"--{read}" in line and "choose another" in line


def test_a_base_model_is_not_overwritten_when_starting_from_a_checkpoint(world, tmp_path, capsys):
    """The base model is named but not read, as in the scripts."""
    assert main(command_line(world, tmp_path / "first", max_steps=1)) == 0
    line = command_line(world, world["llm"], pretrained_model_path=tmp_path / "first", overwrite_output_dir=True)
    assert "is also the folder of --model_name_or_path" in refused(capsys, line)


def test_weights_of_another_origin_are_not_overwritten(world, tmp_path, capsys):
    (tmp_path / "model.safetensors").write_bytes(b"precious")
    assert "model.safetensors" in refused(capsys, command_line(world, tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]
    assert (tmp_path / "model.safetensors").read_bytes() == b"precious"
    assert main(command_line(world, tmp_path, max_steps=1, overwrite_output_dir=True)) == 0
    assert (tmp_path / "model.safetensors").read_bytes() != b"precious"


@pytest.mark.parametrize(
    "changes",
    [{"learning_rate": -1}, {"per_device_train_batch_size": 0}, {"gradient_accumulation_steps": 0}],
    ids=lambda changes: next(iter(changes)),
)
def test_impossible_numbers_are_refused(world, tmp_path, capsys, changes):
    line = refused(capsys, command_line(world, tmp_path / "out", **changes))
    assert f"--{next(iter(changes))} is" in line and "at least" in line and not (tmp_path / "out").exists()


def test_swapped_parts_are_refused(world, tmp_path, capsys):
    line = refused(capsys, command_line(world, tmp_path / "out", model_name_or_path=world["tower"]))
    assert world["tower"] in line and "no language model" in line


@pytest.mark.parametrize(
    ("samples", "changes", "steps"),
    [
        (1000, {}, 8),
        (1000, {"num_train_epochs": 7}, None),
        (1000, {"max_steps": 3}, None),
        (6273, {}, None),
        (6272, {}, 49),
    ],
)
def test_a_run_of_a_few_steps_causes_a_warning(samples, changes, steps):
    """By hand: ceil(1000 / 128) = 8 steps an epoch; 49 x 128 = 6,272."""
    training = SimpleNamespace(
        **{
            "per_device_train_batch_size": 8,
            "gradient_accumulation_steps": 4,
            "world_size": 4,
            "num_train_epochs": 1,
            "max_steps": -1,
            **changes,
        }
    )
    told = few_steps(training, samples)
    assert told is None if steps is None else f"make only {steps} optimiser steps of 128" in told


def test_fewer_samples_than_a_batch_that_is_dropped_are_refused(tmp_path):
    training = toy_arguments(tmp_path, per_device_train_batch_size=8, dataloader_drop_last=True)
    check_batch(training, 8)
    with pytest.raises(ValueError, match=r"7 samples, fewer than a batch of 8, .*--dataloader_drop_last"):
        check_batch(training, 7)
