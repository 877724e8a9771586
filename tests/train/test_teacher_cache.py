"""--teacher_cache through the entry point: the same student, also when resumed; impossible settings are refused."""

import errno
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.train.ranks import main_on_ranks
from tests.train.world import command_line, write_world
from tinyllava_switchkd.distill import Distiller, teacher_cache
from tinyllava_switchkd.train.reliability.checkpoints import NO_ROOM
from tinyllava_switchkd.train.train import main


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("teacher_cache")
    world = write_world(folder / "world", samples=6)
    world["teacher"] = str(folder / "teacher")
    parts = {"model_name_or_path": world["teacher_llm"], "max_steps": 1, "save_strategy": "no"}
    assert main(command_line(world, world["teacher"], **parts)) == 0
    return world


def line(world, output, **changes):
    settings = {"teacher_path": world["teacher"], "max_steps": -1, "num_train_epochs": 2, "save_strategy": "no"}
    # one sample per batch: no padding, so equal to the bit in any order
    return command_line(world, output, **{**settings, "per_device_train_batch_size": 1, **changes})


def same(one, other):
    one, other = (load_file(Path(folder) / "model.safetensors") for folder in (one, other))
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_a_run_is_the_same_and_the_next_runs_no_teacher(world, tmp_path, monkeypatch):
    run, passes = Distiller._run_teacher, []
    monkeypatch.setattr(Distiller, "_run_teacher", lambda *args: passes.append(1) or run(*args))
    cache = {"teacher_cache": tmp_path / "cache"}
    assert main(line(world, tmp_path / "plain")) == 0
    assert len(passes) == 12
    assert main(line(world, tmp_path / "filling", **cache)) == 0
    assert len(passes) == 12 + 6
    assert same(tmp_path / "plain", tmp_path / "filling")
    changes = {"temperature": 2.0, "seed": 3, "num_train_epochs": 1}  # another loss in another order
    assert main(line(world, tmp_path / "other", **cache, **changes)) == 0
    assert len(passes) == 12 + 6
    assert main(line(world, tmp_path / "other plain", **changes)) == 0
    assert same(tmp_path / "other", tmp_path / "other plain")


def test_a_filled_cache_lets_the_first_epoch_run_no_teacher(world, tmp_path, monkeypatch, capsys):
    """Also held-out samples; filling again computes nothing."""
    passes = []
    run, look = Distiller._run_teacher, teacher_cache.look
    monkeypatch.setattr(Distiller, "_run_teacher", lambda *args: passes.append("own") or run(*args))
    monkeypatch.setattr(teacher_cache, "look", lambda *args, **kwargs: passes.append("fill") or look(*args, **kwargs))
    settings = {"num_train_epochs": 1, "eval_share": 0.4, "eval_strategy": "epoch"}
    cache = {"teacher_cache": tmp_path / "cache"}
    assert main(line(world, tmp_path / "filled", **settings, **cache, fill_teacher_cache=True)) == 0
    assert passes == ["fill"] * 6 and not (tmp_path / "filled").exists()
    assert "holds 6 samples" in capsys.readouterr().err
    assert main(line(world, tmp_path / "filled", **settings, **cache, fill_teacher_cache=True)) == 0
    assert main(line(world, tmp_path / "filled", **settings, **cache)) == 0
    assert passes == ["fill"] * 6
    assert main(line(world, tmp_path / "plain", **settings)) == 0
    assert same(tmp_path / "plain", tmp_path / "filled")
    half = {**settings, "bf16": True}  # under torch's autocast, as in the trainer
    finished = tmp_path / "filled"  # filling does not touch the output folder
    assert main(line(world, finished, **half, **cache, fill_teacher_cache=True)) == 0
    passes.clear()
    assert main(line(world, tmp_path / "half", **half, **cache)) == 0 and not passes
    assert main(line(world, tmp_path / "plain half", **half)) == 0
    assert same(tmp_path / "plain half", tmp_path / "half")


def test_a_full_disk_ends_the_filling_but_not_a_training(world, tmp_path, monkeypatch, capsys):
    cache, write, written = {"teacher_cache": tmp_path / "cache"}, teacher_cache.write_bytes, []

    def full(path, data):
        written.append(path)
        if len(written) > 2:
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        write(path, data)

    monkeypatch.setattr(teacher_cache, "SHARD_BYTES", 1)
    monkeypatch.setattr(teacher_cache, "write_bytes", full)
    assert main(line(world, tmp_path / "run", **cache, fill_teacher_cache=True)) == NO_ROOM
    said = capsys.readouterr().err
    assert "No space left on device" in said and "it holds 2 samples. Make room" in said and "Traceback" not in said
    assert main(line(world, tmp_path / "run", **cache, num_train_epochs=1)) == 0
    assert "Nothing more is written to the teacher cache" in capsys.readouterr().err
    monkeypatch.undo()
    assert main(line(world, tmp_path / "run", **cache, fill_teacher_cache=True, overwrite_output_dir=True)) == 0
    assert "holds 6 samples" in capsys.readouterr().err


def test_two_ranks_fill_and_share_it(world, tmp_path):
    """The ranks fill it together and train, each reading the other's part; the result equals that without a cache."""
    cache = {"teacher_cache": tmp_path / "cache", "max_steps": 3, "ddp_backend": "gloo"}
    lines = [
        line(world, tmp_path / "plain", **{**cache, "teacher_cache": None}),
        line(world, tmp_path / "shared", **cache, fill_teacher_cache=True),
        line(world, tmp_path / "shared", **cache),
    ]
    main_on_ranks(2, lines)
    stored = [load_file(file) for file in (tmp_path / "cache").rglob("*.safetensors")]
    assert sorted(len(one["rows"]) for one in stored) == [3, 3]  # none was computed by both, or twice
    assert same(tmp_path / "plain", tmp_path / "shared")


def test_resuming_does_not_ask_about_a_cache_that_rounds_nothing(world, tmp_path, capsys):
    cache = {"teacher_cache": tmp_path / "cache"}
    settings = {"save_strategy": "steps", "save_steps": 2, "max_steps": 3}
    assert main(line(world, tmp_path / "run", **settings)) == 0
    (tmp_path / "run" / "trainer_state.json").unlink()
    shutil.rmtree(tmp_path / "run" / "checkpoint-3")
    begun = shutil.copytree(tmp_path / "run", tmp_path / "begun")
    assert main(line(world, begun, **settings, **cache, teacher_cache_dtype="bf16")) == 1
    assert "--allow_changed teacher_cache_dtype." in capsys.readouterr().err
    assert main(line(world, begun, **settings, **cache)) == 0
    assert same(begun, tmp_path / "run")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"distill_method": "align_kd"}, ["--teacher_cache stores", "align_kd also needs its projected, attention"]),
        ({"teacher_cache": None, "teacher_cache_dtype": "bf16"}, ["does nothing without --teacher_cache"]),
        ({"teacher_cache": None, "fill_teacher_cache": True}, ["--fill_teacher_cache True names no folder"]),
        ({"teacher_cache_dtype": "int4"}, ["--teacher_cache_dtype is 'int4'"]),
        ({"teacher_path": None}, ["--teacher_cache", "give --teacher_path as well"]),
        ({"teacher_cache": "FILE"}, ["cannot be created"]),
    ],
)
def test_impossible_settings_are_refused_before_anything_runs(world, tmp_path, capsys, changes, words):
    (tmp_path / "file").write_text("mine")
    changes = {"teacher_cache": tmp_path / "cache", **changes}
    if changes["teacher_cache"] == "FILE":
        changes["teacher_cache"] = tmp_path / "file"
    assert main(line(world, tmp_path / "run", **changes)) == 1
    said = capsys.readouterr().err
    assert all(word in said for word in words) and not (tmp_path / "run" / "model.safetensors").exists()
    assert (tmp_path / "file").read_text() == "mine"


def test_the_size_is_logged_first_and_a_full_disk_is_refused(world, tmp_path, monkeypatch, capsys):
    cache = {"teacher_cache": tmp_path / "cache"}
    assert main(line(world, tmp_path / "run", **cache, num_train_epochs=1)) == 0
    said = capsys.readouterr().err
    assert "needs about 0.0 MiB for 6 samples; it has 0 samples" in said
    stored = [load_file(file) for file in (tmp_path / "cache").rglob("*.safetensors")]
    assert sum(len(one["rows"]) for one in stored) == 6
    assert sum(one["hidden"].nbytes for one in stored) == sum(int(one["rows"].sum()) for one in stored) * 48 * 4
    monkeypatch.setattr("shutil.disk_usage", lambda _: shutil._ntuple_diskusage(10, 10, 1))
    assert main(line(world, tmp_path / "new", teacher_cache=tmp_path / "another")) == 1
    assert "the disk has 0.0 MiB left; choose another folder" in capsys.readouterr().err
