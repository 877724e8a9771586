"""Checkpoints are sealed, rotated by step, skipped when damaged and never executed."""

import errno
import json
import os
import pickle
import shutil

import pytest
import torch
from transformers import TrainerState

from tests.train.toy import toy_arguments, toy_trainer
from tests.train.world import command_line, write_world
from tinyllava_switchkd.io import digest
from tinyllava_switchkd.train.reliability import checkpoints, resume
from tinyllava_switchkd.train.reliability.checkpoints import CheckpointError
from tinyllava_switchkd.train.train import main

SAVING = {"save_strategy": "steps", "save_steps": 1}


def names(folder):
    return [path.name for path in checkpoints.checkpoints(folder)]


@pytest.mark.parametrize("limit", [1, 2])
def test_rotation_uses_steps_and_not_dates(tmp_path, limit):
    """With checkpoints dated in the future, damaged ones, and one of a step that the run has not reached."""
    for step in (1, 2):
        toy_trainer(toy_arguments(tmp_path, max_steps=step, **SAVING)).train(
            resume_from_checkpoint=None if step == 1 else str(tmp_path / "checkpoint-1")
        )
    for name in ("checkpoint-1", "checkpoint-2"):
        os.utime(tmp_path / name, (2e9, 2e9))
    shutil.copytree(tmp_path / "checkpoint-2", tmp_path / "checkpoint-90")
    trainer = toy_trainer(toy_arguments(tmp_path, max_steps=5, save_total_limit=limit, **SAVING))
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert names(tmp_path) == ["checkpoint-90", *(f"checkpoint-{step}" for step in (5, 4)[:limit])]
    assert all(checkpoints.damage(tmp_path / name) is None for name in names(tmp_path)[1:])
    assert set(checkpoints.read_record(tmp_path)) == set(names(tmp_path)[1:])


def test_the_manifest_lists_every_file(tmp_path):
    toy_trainer(toy_arguments(tmp_path, max_steps=1, **SAVING)).train()
    folder = tmp_path / "checkpoint-1"
    manifest = checkpoints.read_manifest(folder)
    files = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert manifest["files"].keys() == files - {checkpoints.MANIFEST}
    assert {"model.safetensors", "optimizer.pt", "trainer_state.json"} <= files
    assert (manifest["step"], manifest["world_size"]) == (1, 1)
    assert all(entry["sha256"] == digest(folder / name) for name, entry in manifest["files"].items())
    assert not (tmp_path / checkpoints.WRITING).exists()


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    """A run of the entry point after two of four steps (with LoRA, for all kinds of files), and its world."""
    folder = tmp_path_factory.mktemp("begun")
    world = write_world(folder / "world", samples=4)
    settings = {"training_recipe": "lora", "tune_type_llm": "lora", "lora_r": 2, "save_steps": 1}
    line = command_line(world, folder / "run", **settings)
    assert main(line) == 0
    (folder / "run" / "trainer_state.json").unlink()
    return world, folder / "run", settings


FILES = [
    "adapter_model.safetensors",
    "language_model/pytorch_model.bin",
    "connector/pytorch_model.bin",
    "optimizer.pt",
    "scheduler.pt",
    "rng_state.pth",
    "trainer_state.json",
    "config.json",
    "manifest.json",
]


@pytest.mark.parametrize("damaged", FILES)
@pytest.mark.parametrize("how", ["zeros", "cut", "gone", "added"])
def test_a_damaged_checkpoint_is_skipped_and_named(begun, tmp_path, caplog, damaged, how):
    _, run, _ = begun
    shutil.copytree(run, tmp_path / "run")
    file = tmp_path / "run" / "checkpoint-2" / damaged
    content = bytearray(file.read_bytes())
    if how == "zeros":
        first = next(index for index, byte in enumerate(content) if index >= len(content) // 2 and byte)
        content[first] = 0
        file.write_bytes(content)
    elif how == "cut":
        file.write_bytes(content[:-1])
    elif how == "gone":
        file.unlink()
    else:
        file = file.with_name("more.pt")
        file.write_bytes(b"x")
    assert resume.find_checkpoint(tmp_path / "run") == str(tmp_path / "run" / "checkpoint-1")
    assert "checkpoint-2" in caplog.text and file.name in caplog.text


@pytest.mark.parametrize("claimed", [2**62, 2**40])
def test_a_header_that_claims_too_much_takes_no_memory(begun, tmp_path, caplog, claimed):
    """The checkpoint is sealed, but not by this run."""
    _, run, _ = begun
    shutil.copytree(run, tmp_path / "run")
    (tmp_path / "run" / checkpoints.RECORD).unlink()
    folder = tmp_path / "run" / "checkpoint-2"
    (folder / "adapter_model.safetensors").write_bytes(claimed.to_bytes(8, "little") + b"{}")
    checkpoints.seal(folder, 2, 1)
    assert resume.find_checkpoint(tmp_path / "run") == str(tmp_path / "run" / "checkpoint-1")
    assert "its weights are missing or cut off" in caplog.text


STRANGE = {
    "trainer_state.json: a text for a step": ("trainer_state.json", {"global_step": "x"}),
    "trainer_state.json: a step beyond all": ("trainer_state.json", {"global_step": 10**18}),
    "trainer_state.json: an unknown field": ("trainer_state.json", {"more": 1}),
    "index: lists": ("model.safetensors.index.json", {"weight_map": {"a": ["x"]}}),
    "index: outside": ("model.safetensors.index.json", {"weight_map": {"a": "../x.safetensors"}}),
    "index: no map": ("model.safetensors.index.json", {"weight_map": 5}),
}


@pytest.mark.parametrize("kind", STRANGE)
def test_a_sealed_checkpoint_of_another_origin_is_skipped(begun, tmp_path, caplog, kind):
    """Complete by its manifest, but not in the run's record: copied from elsewhere."""
    _, run, _ = begun
    shutil.copytree(run, tmp_path / "run")
    (tmp_path / "run" / checkpoints.RECORD).unlink()
    name, fields = STRANGE[kind]
    file = tmp_path / "run" / "checkpoint-2" / name
    file.write_text(json.dumps((json.loads(file.read_text()) if file.exists() else {}) | fields))
    checkpoints.seal(file.parent, 2, 1)
    assert resume.find_checkpoint(tmp_path / "run") == str(tmp_path / "run" / "checkpoint-1")
    assert "checkpoint-2 is incomplete" in caplog.text


def test_an_invalid_fingerprint_and_a_pipe_are_refused_in_one_sentence(begun, tmp_path, capsys):
    world, run, settings = begun
    shutil.copytree(run, tmp_path / "run")
    (tmp_path / "run" / checkpoints.RECORD).unlink()
    (tmp_path / "run" / "checkpoint-2" / "fingerprint.json").write_text('{"teacher_path": [1], "world_size": "2"}')
    checkpoints.seal(tmp_path / "run" / "checkpoint-2", 2, 1)
    line = command_line(world, tmp_path / "run", **settings)
    assert main(line) == 1
    assert "does not hold a run's arguments" in capsys.readouterr().err
    os.mkfifo(tmp_path / "run" / "trainer_state.json")
    assert main(line) == 1
    assert "holds trainer_state.json, a pipe or a device; remove it" in capsys.readouterr().err


def test_nothing_is_written_through_a_link(begun, tmp_path, capsys):
    """Neither a checkpoint, through a link in place of its temporary folder, nor the lock."""
    world, run, settings = begun
    shutil.copytree(run, tmp_path / "run")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "run" / checkpoints.WRITING).symlink_to(tmp_path / "elsewhere")
    line = command_line(world, tmp_path / "run", **settings, max_steps=3)
    (tmp_path / "mine").write_text("mine")
    for make in (
        lambda lock: lock.symlink_to(tmp_path / "mine"),
        lambda lock: lock.mkdir(),
        os.mkfifo,
    ):
        lock = tmp_path / "run" / "run.lock"
        make(lock)
        assert main(line) == 1
        said = capsys.readouterr().err
        assert "run.lock is a link or a folder" in said or "holds run.lock, a pipe" in said
        lock.rmdir() if lock.is_dir() else lock.unlink()
    assert (tmp_path / "mine").read_text() == "mine"
    seen = []
    rename = checkpoints.publish
    checkpoints.publish = lambda *args: (seen.append(os.listdir(tmp_path / "elsewhere")), rename(*args))[1]
    try:
        assert main(line) == 0
    finally:
        checkpoints.publish = rename
    assert seen == [[]] and not (tmp_path / "run" / checkpoints.WRITING).exists()


def test_a_folder_without_a_manifest_is_not_a_checkpoint(begun, tmp_path, caplog):
    """Also with a pickle as written by older versions."""
    _, run, _ = begun
    shutil.copytree(run, tmp_path / "run")
    (tmp_path / "run" / "checkpoint-2" / "manifest.json").unlink()
    (tmp_path / "run" / "checkpoint-2" / "training_args.bin").write_bytes(b"")
    assert resume.find_checkpoint(tmp_path / "run") == str(tmp_path / "run" / "checkpoint-1")
    assert "manifest.json is missing" in caplog.text


def test_new_weights_among_old_files_are_not_a_checkpoint(begun, tmp_path):
    """An interrupted save under an old name: the files of one step beside those of another."""
    _, run, _ = begun
    shutil.copytree(run, tmp_path / "run")
    for name in ("adapter_model.safetensors", "trainer_state.json", "manifest.json"):
        shutil.copy(tmp_path / "run" / "checkpoint-1" / name, tmp_path / "run" / "checkpoint-2")
    assert resume.find_checkpoint(tmp_path / "run") == str(tmp_path / "run" / "checkpoint-1")


def test_the_run_goes_on_from_the_checkpoint_before(begun, tmp_path, capsys):
    world, run, settings = begun
    shutil.copytree(run, tmp_path / "run")
    file = tmp_path / "run" / "checkpoint-2" / "optimizer.pt"
    file.write_bytes(file.read_bytes()[:-100])
    assert main(command_line(world, tmp_path / "run", **{**settings, "max_steps": 2})) == 0
    said = capsys.readouterr().err
    assert "optimizer.pt is cut off" in said and "Resuming from" in said and "Traceback" not in said
    assert checkpoints.damage(tmp_path / "run" / "checkpoint-2") is None  # written again
    assert digest(tmp_path / "run" / "adapter_model.safetensors") == digest(run / "adapter_model.safetensors")


class Planted:
    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


PICKLED = ["optimizer.pt", "scheduler.pt", "rng_state.pth", "connector/pytorch_model.bin"]


@pytest.mark.parametrize("resealed", [False, True])
@pytest.mark.parametrize("name", PICKLED)
def test_a_planted_object_is_never_created(begun, tmp_path, capsys, name, resealed):
    """Planted by someone who can write into the checkpoint, or, if `resealed`, into the run's whole folder."""
    world, run, settings = begun
    shutil.copytree(run, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoint-1")
    folder, mark = tmp_path / "run" / "checkpoint-2", tmp_path / "was here"
    torch.save({"state": Planted(f"touch '{mark}'"), "param_groups": []}, folder / name)
    manifest = checkpoints.seal(folder, 2, 1)
    if resealed:
        (tmp_path / "run" / checkpoints.RECORD).write_text(json.dumps({"checkpoint-2": manifest}))
    code = main(command_line(world, tmp_path / "run", **{**settings, "max_steps": 3}))
    said = capsys.readouterr().err
    assert not mark.exists() and "Traceback" not in said
    if resealed:
        assert code == 1 and "error: A file of" in said and "was not opened" in said
    else:
        assert code == 0 and "manifest.json is not the one that this run wrote" in said


def test_deepspeeds_reader_is_restricted_to_tensors(tmp_path):
    """DeepSpeed reads its files without restrictions, but inside `weights_only` only its own classes are allowed."""
    pytest.importorskip("deepspeed")
    from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine
    from deepspeed.runtime.fp16.loss_scaler import LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    engine = TorchCheckpointEngine()
    state = {"loss_scaler": LossScaler(1.0), "zero_stage": ZeroStageEnum(2), "at": fragment_address(3, 4)}
    torch.save({"optimizer_state_dict": state, "ds_version": "1"}, tmp_path / "good.pt")
    torch.save({"optimizer_state_dict": Planted(f"touch '{tmp_path / 'was here'}'")}, tmp_path / "bad.pt")
    before = os.environ.get("TORCH_FORCE_WEIGHTS_ONLY_LOAD")
    with checkpoints.weights_only():
        read = engine.load(str(tmp_path / "good.pt"), "cpu")["optimizer_state_dict"]
        assert read["loss_scaler"].loss_scale == 1.0 and read["at"].numel == 3
        with pytest.raises(pickle.UnpicklingError):
            engine.load(str(tmp_path / "bad.pt"), "cpu")
    assert not (tmp_path / "was here").exists()
    assert os.environ.get("TORCH_FORCE_WEIGHTS_ONLY_LOAD") == before


def test_no_secret_and_no_pickled_arguments_are_written(tmp_path):
    world = write_world(tmp_path / "world", samples=4)
    token = "hf_abcdefghijklmnopqrstuvwxyz"
    line = command_line(world, tmp_path / "run", save_steps=1, max_steps=1, hub_token=token, report_to="tensorboard")
    assert main(line) == 0
    files = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert not [path for path in files if token.encode() in path.read_bytes()]
    assert not [path for path in files if path.name == "training_args.bin"]
    written = json.loads((tmp_path / "run" / "training_args.json").read_text())
    assert written["learning_rate"] == 1e-2 and "hub_token" not in written


def test_the_folder_of_an_old_run_is_recognised(tmp_path):
    """Recognised by a file of older versions, so that the folder may be written to again."""
    world = write_world(tmp_path / "world", samples=4)
    run = tmp_path / "run"
    run.mkdir()
    (run / "training_args.bin").write_bytes(b"")
    (run / "model.safetensors").write_bytes(b"")
    assert main(command_line(world, run, max_steps=1)) == 0


# Room


def test_free_space_is_checked_before_a_save(tmp_path, monkeypatch):
    trainer = toy_trainer(toy_arguments(tmp_path, max_steps=3, save_total_limit=1, **SAVING))
    usage = shutil.disk_usage(tmp_path)

    def disk_usage(path):
        return usage._replace(free=1000 if trainer.state.global_step == 2 else usage.free)

    monkeypatch.setattr(shutil, "disk_usage", disk_usage)
    with pytest.raises(CheckpointError, match=r"step 2 needs about .*kB in .* 1.00kB are free.*from checkpoint-1"):
        trainer.train()
    assert names(tmp_path) == ["checkpoint-1"] and checkpoints.damage(tmp_path / "checkpoint-1") is None


@pytest.mark.parametrize("library", ["torch", "the operating system"])
def test_a_disk_that_fills_up_during_a_save(tmp_path, capsys, monkeypatch, library):
    """One sentence, an intact earlier checkpoint, nothing half written, and the same command continues."""
    world = write_world(tmp_path / "world", samples=4)
    line = command_line(world, tmp_path / "run", save_steps=1, max_steps=3, save_total_limit=1)
    owner, name, error = {
        "torch": (torch, "save", RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0")),
        "the operating system": (TrainerState, "save_to_json", OSError(errno.ENOSPC, "No space left on device")),
    }[library]
    works = getattr(owner, name)

    def fails(*args, **kwargs):
        if (tmp_path / "run" / "checkpoint-1").exists():
            raise error
        return works(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, fails)
        assert main(line) == checkpoints.NO_ROOM
    said = capsys.readouterr().err
    (sentence,) = [text for text in said.splitlines() if text.startswith("error: ")]
    assert str(tmp_path / "run") in sentence and "are free" in sentence and "continues from checkpoint-1" in sentence
    assert "Traceback" not in said
    assert names(tmp_path / "run") == ["checkpoint-1"]
    assert checkpoints.damage(tmp_path / "run" / "checkpoint-1") is None
    assert not (tmp_path / "run" / checkpoints.WRITING).exists()
    assert main(line) == 0 and (tmp_path / "run" / "trainer_state.json").is_file()


def test_a_disk_without_inodes_and_a_card_without_room(tmp_path, capsys, monkeypatch):
    world = write_world(tmp_path / "world", samples=4)
    line = command_line(world, tmp_path / "run", save_steps=1, max_steps=1)
    with monkeypatch.context() as patch:

        def fails(*args, **kwargs):
            raise OSError(errno.ENOSPC, "No space left on device")

        table = os.statvfs(tmp_path)
        none = os.statvfs_result((*table[:5], 1000, 0, 0, *table[8:]))
        patch.setattr(os, "statvfs", lambda path: none)
        patch.setattr(TrainerState, "save_to_json", fails)
        assert main(line) == checkpoints.NO_ROOM
        assert "0 inodes are free" in capsys.readouterr().err
    with monkeypatch.context() as patch:  # everything else is written: the run has succeeded
        patch.setattr("tinyllava_switchkd.train.train.write_model_card", fails)
        assert main(line) == 0
    said = capsys.readouterr().err
    assert "The training's settings could not be added to the model card" in said and "No space left" in said
