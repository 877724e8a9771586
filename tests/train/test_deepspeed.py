"""DeepSpeed's ranks: a NaN on one of them, and shards that another number of processes resumes from."""

import functools
import json
import math
import os
import shutil
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.train.ranks import codes_on_ranks
from tests.train.test_checkpoints import Planted
from tests.train.world import command_line, write_world
from tinyllava_switchkd.launch.launcher import DEEPSPEED
from tinyllava_switchkd.train.reliability import checkpoints, resume, universal
from tinyllava_switchkd.train.reliability.resume import ResumeError
from tinyllava_switchkd.train.train import main

SETTINGS = {"max_steps": 4, "save_steps": 1, "weight_decay": 0.1, "vision_tower_lr": 1e-3, "adam_epsilon": 1e-3}
"""Parameter groups with different settings, and an optimiser whose steps follow the size of the gradient."""


def spoil(rank, step):
    """The loss of one step is NaN on one rank."""
    from tinyllava_switchkd.train.task import SupervisedTask

    forward, calls = SupervisedTask.forward, []

    def spoilt(self, *args, **kwargs):
        losses = forward(self, *args, **kwargs)
        calls.append(1)
        return (
            losses | {"ce": losses["ce"] * math.nan}
            if (os.environ["RANK"], len(calls)) == (str(rank), step)
            else losses
        )

    SupervisedTask.forward = spoilt


def largest(one, two):
    return max(float((one[name] - two[name]).abs().max()) for name in one)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return write_world(tmp_path_factory.mktemp("deepspeed") / "world")


@pytest.fixture(scope="module")
def alone(world, tmp_path_factory):
    """The weights that one process ends with, without DeepSpeed."""
    folder = tmp_path_factory.mktemp("alone") / "run"
    assert main(command_line(world, folder, per_device_train_batch_size=4, **{**SETTINGS, "save_steps": 100})) == 0
    return load_file(folder / "model.safetensors")


@pytest.mark.slow
@pytest.mark.xdist_group("deepspeed")
@pytest.mark.parametrize("zero", [2, 3])
def test_a_bad_step_is_skipped_on_all_ranks_and_another_number_of_ranks_resumes(world, alone, tmp_path, zero):
    """Two ranks, one with a NaN at step 3; then one process resumes from the checkpoint before, without the NaN."""
    run, log = tmp_path / "run", tmp_path / "log"
    settings = {**SETTINGS, "deepspeed": DEEPSPEED / f"zero{zero}.json"}
    line = command_line(world, run, per_device_train_batch_size=2, on_nan="skip", **settings)
    assert codes_on_ranks(2, line, log, functools.partial(spoil, 1, 3)) == [0, 0], Path(f"{log}.0").read_text()[-3000:]
    stored = [load_file(run / f"checkpoint-{step}" / "model.safetensors") for step in (1, 2, 3, 4)]
    assert largest(stored[1], stored[2]) == 0
    assert largest(stored[0], stored[1]) > 1e-4 and largest(stored[2], stored[3]) > 1e-4
    (event,) = [json.loads(text) for text in (run / "non_finite.jsonl").read_text().splitlines()]
    assert (event["step"], event["action"], event["what"]) == (3, "skip", "ce")
    assert [bool(rank["terms"]) for rank in event["samples"]] == [False, True]
    history = json.loads((run / "trainer_state.json").read_text())["log_history"]
    assert [entry.get("skipped_steps", 0) for entry in history if "loss" in entry] == [0, 0, 1, 1]

    for step in (3, 4):
        shutil.rmtree(run / f"checkpoint-{step}")
    (run / "trainer_state.json").unlink()
    line = command_line(world, run, per_device_train_batch_size=4, **settings)
    assert codes_on_ranks(1, line, log) == [0], Path(f"{log}.0").read_text()[-3000:]
    assert "Converting" in Path(f"{log}.0").read_text()
    assert largest(alone, load_file(run / "model.safetensors")) < 1e-5
    assert not (run / checkpoints.CONVERTED).exists()


@pytest.mark.slow
@pytest.mark.xdist_group("deepspeed")
@pytest.mark.parametrize("zero", [2, 3])
def test_the_best_checkpoint_of_another_number_of_ranks_is_taken_at_the_end(world, tmp_path, zero):
    """Two ranks write it, one ends the run. The first is "best", because here a higher loss counts as better."""
    run, log = tmp_path / "run", tmp_path / "log"
    settings = {"deepspeed": DEEPSPEED / f"zero{zero}.json", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1}
    settings |= {"eval_data_path": world["pretrain"], "load_best_model_at_end": True, "metric_for_best_model": "ce"}
    for ranks, steps in ((2, 2), (1, 3)):
        shape = {"per_device_train_batch_size": 4 // ranks, "max_steps": steps, "greater_is_better": True}
        assert set(codes_on_ranks(ranks, command_line(world, run, **settings, **shape), log)) == {0}, Path(
            f"{log}.0"
        ).read_text()[-3000:]
        assert largest(load_file(run / "checkpoint-1" / "model.safetensors"), load_file(run / "model.safetensors")) == 0
        (run / "trainer_state.json").unlink()


def shards(tmp_path, name="student.weight", states=("exp_avg", "exp_avg_sq", "step")):
    """The files of two ranks under ZeRO-2 that are checked before anything is converted."""
    folder = tmp_path / "checkpoint-5"
    tag = folder / "global_step5"
    tag.mkdir(parents=True)
    (folder / "latest").write_text(tag.name)
    for rank in range(2):
        torch.save({}, folder / f"rng_state_{rank}.pth")
        state = {"base_optimizer_state": {"state": {0: dict.fromkeys(states, 1)}}, "param_slice_mappings": [{name: 1}]}
        torch.save({"optimizer_state_dict": state}, tag / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")
    torch.save({"module": {name: torch.ones(1)}}, tag / "mp_rank_00_model_states.pt")
    return folder


@pytest.fixture
def converter(monkeypatch):
    """Replaces DeepSpeed's converter; the list of its calls."""
    calls = []
    monkeypatch.setattr("deepspeed.checkpoint.ds_to_universal.main", calls.append)
    return calls


def test_the_converted_checkpoint_lies_beside_the_others(tmp_path, converter):
    """The sealed checkpoint does not change; its other files are linked to."""
    folder = shards(tmp_path)
    before = sorted(path.name for path in folder.rglob("*"))
    assert resume.needs_conversion(folder, 3) and not resume.needs_conversion(folder, 2)
    view = universal.convert(folder, tmp_path)
    ((call,),) = (converter,)
    assert (call.input_folder, call.output_folder) == (str(folder / "global_step5"), str(view / "global_step5"))
    assert isinstance(call, Namespace) and call.num_extract_workers == call.num_merge_workers == 1
    assert universal.is_universal(view) and not universal.is_universal(folder)
    assert (view / "rng_state_1.pth").is_file() and sorted(path.name for path in folder.rglob("*")) == before
    checkpoints.clean(tmp_path)
    assert not view.exists() and sorted(path.name for path in folder.rglob("*")) == before


@pytest.mark.parametrize("name", ["../../out", "/etc/x", "..", "a/../b", "a\\b", "", 7])
def test_a_name_that_is_a_path_writes_nothing(tmp_path, converter, name):
    with pytest.raises(ResumeError, match="has a parameter"):
        universal.convert(shards(tmp_path, name), tmp_path)
    assert not converter


@pytest.mark.parametrize("file", ["zero_pp_rank_1_mp_rank_00_optim_states.pt", "mp_rank_00_model_states.pt"])
def test_converting_creates_no_planted_object(tmp_path, file):
    """With DeepSpeed's own converter, which reads without restrictions."""
    folder, mark = shards(tmp_path), tmp_path / "was here"
    state = torch.load(folder / "global_step5" / file)
    torch.save({**state, "more": Planted(f"touch '{mark}'")}, folder / "global_step5" / file)
    with pytest.raises(ResumeError, match="was not opened"):
        universal.convert(folder, tmp_path)
    assert not mark.exists()


def test_an_optimiser_that_cannot_be_resharded_is_refused_in_one_sentence(tmp_path, converter):
    with pytest.raises(ResumeError, match="as many processes as before"):
        universal.convert(shards(tmp_path, states=("momentum_buffer",)), tmp_path)
    assert not converter


def test_free_space_is_checked_before_a_conversion(tmp_path, converter, monkeypatch):
    folder = shards(tmp_path)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=100))
    with pytest.raises(checkpoints.CheckpointError, match="100B are free"):
        universal.convert(folder, tmp_path)
    assert not converter
