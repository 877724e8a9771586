"""Resuming: the state of a run is recognised, and a resumed run ends like an uninterrupted one."""

import json
import shutil
import struct
from pathlib import Path

import pytest
import torch
from transformers import EarlyStoppingCallback, TrainerCallback

from tests.train.toy import ToyDataset, largest_difference, logged, toy_arguments, toy_task, toy_trainer, weights
from tests.train.world import command_line, write_world
from tinyllava_switchkd.io import write_json
from tinyllava_switchkd.train.reliability import checkpoints, resume, signals
from tinyllava_switchkd.train.train import Run, main


class StopAt(TrainerCallback):
    """Ends a run early, as a crash after a checkpoint would, without changing its schedule."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == self.step


@pytest.mark.parametrize(("distil", "accumulate"), [(False, 1), (True, 1), (True, 2)])
def test_a_resumed_run_gives_the_same_weights(tmp_path, distil, accumulate):
    """Two epochs of six steps, stopped in the middle of the second; the epochs have different orders."""
    kwargs = {
        "max_steps": -1,
        "num_train_epochs": 2,
        "gradient_accumulation_steps": accumulate,
        "group_by_modality_length": True,
        "save_strategy": "steps",
        "save_steps": 8 // accumulate,
        "optim": "adamw_torch",
        "weight_decay": 0.1,
        "vision_tower_lr": 1e-3,
        "warmup_steps": 0.2,
        "lr_scheduler_type": "cosine",
    }
    through = toy_trainer(toy_arguments(tmp_path / "through", **kwargs), toy_task(distil))
    through.train()
    assert through.state.global_step == 12 // accumulate

    stopped = toy_trainer(
        toy_arguments(tmp_path / "stopped", **kwargs), toy_task(distil), callbacks=[StopAt(8 // accumulate)]
    )
    stopped.train()
    checkpoint = resume.find_checkpoint(tmp_path / "stopped")
    assert Path(checkpoint).name == f"checkpoint-{8 // accumulate}"
    resumed = toy_trainer(toy_arguments(tmp_path / "stopped", **kwargs), toy_task(distil, seed=7))  # other weights
    resumed.train(resume_from_checkpoint=checkpoint)
    assert resumed.state.global_step == 12 // accumulate
    assert largest_difference(weights(through.model), weights(resumed.model)) < 1e-7
    assert logged(resumed, "ce") == pytest.approx(logged(through, "ce"), abs=1e-6)


def seal(folder, world=1):
    """Seal and record a checkpoint, as a run does once all files are written."""
    manifest = checkpoints.seal(folder, int(folder.name.split("-")[1]), world)
    record = checkpoints.read_record(folder.parent)
    write_json(folder.parent / checkpoints.RECORD, {**record, folder.name: manifest})


@pytest.fixture
def run(tmp_path):
    """A folder with two checkpoints that look complete."""
    for step in (5, 10):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        header = json.dumps({"w": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
        (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + b"\0" * 4)
        (folder / "trainer_state.json").write_text(json.dumps({"global_step": step, "max_steps": 20}))
        for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
            torch.save({}, folder / name)
        seal(folder)
    (tmp_path / "checkpoint-latest").mkdir()
    return tmp_path


def test_the_latest_checkpoint_is_found(run):
    assert resume.find_checkpoint(run) == str(run / "checkpoint-10")
    assert resume.find_checkpoint(run / "nothing") is None


FILES = ["trainer_state.json", "model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth"]


@pytest.mark.parametrize("damage", ["missing", "cut off"])
@pytest.mark.parametrize("broken", FILES)
def test_an_incomplete_checkpoint_is_skipped_with_a_warning(run, caplog, broken, damage):
    file = run / "checkpoint-10" / broken
    if damage == "cut off":
        file.write_bytes(file.read_bytes()[:-1])
    else:
        file.unlink()
    assert resume.find_checkpoint(run) == str(run / "checkpoint-5")
    assert "checkpoint-10 is incomplete" in caplog.text


def test_a_sharded_checkpoint_needs_all_its_files(run):
    folder = run / "checkpoint-10"
    (folder / "model.safetensors").rename(folder / "model-1.safetensors")
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"w": "model-1.safetensors"}}))
    seal(folder)
    assert resume.what_is_missing(folder) is None
    index.write_text(json.dumps({"weight_map": {"w": "model-1.safetensors", "v": "model-2.safetensors"}}))
    seal(folder)
    assert "weights" in resume.what_is_missing(folder)


def test_deepspeeds_state_counts_as_the_optimisers(run):
    folder = run / "checkpoint-10"
    (folder / "optimizer.pt").unlink()
    (folder / "latest").write_text("global_step10")
    seal(folder)
    assert "no optimiser state" in resume.what_is_missing(folder)
    (folder / "global_step10").mkdir()
    (folder / "global_step10" / "zero_pp_rank_0_mp_rank_00_optim_states.pt").write_bytes(b"x")
    seal(folder)
    assert "cut off" in resume.what_is_missing(folder)
    torch.save({}, folder / "global_step10" / "zero_pp_rank_0_mp_rank_00_optim_states.pt")
    seal(folder)
    assert resume.what_is_missing(folder) is None


def test_another_number_of_processes(run):
    """Without shards any number of processes can resume; DeepSpeed's shards are converted."""
    folder = run / "checkpoint-10"
    assert resume.find_checkpoint(run, world_size=2) == str(folder) and not resume.needs_conversion(folder, 2)
    (folder / "latest").write_text("global_step10")
    (folder / "global_step10").mkdir()
    torch.save({}, folder / "global_step10" / "zero_pp_rank_0_mp_rank_00_optim_states.pt")
    seal(folder)
    assert resume.find_checkpoint(run, world_size=2) == str(folder)
    assert resume.needs_conversion(folder, 2) and not resume.needs_conversion(folder, 1)


def test_a_run_is_finished_when_its_state_says_so(run):
    assert not resume.is_finished(run)
    shutil.copy(run / "checkpoint-10" / "trainer_state.json", run)
    assert not resume.is_finished(run)
    (run / "trainer_state.json").write_text(json.dumps({"global_step": 20, "max_steps": 20}))
    assert resume.is_finished(run)
    resume.remove_checkpoints(run)
    assert not resume.is_finished(run) and resume.find_checkpoint(run) is None


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    """A run of the entry point that was stopped after its second checkpoint, and its world."""
    folder = tmp_path_factory.mktemp("begun")
    world = write_world(folder / "world", samples=4)
    assert main(command_line(world, folder / "run", save_steps=1)) == 0
    (folder / "run" / "trainer_state.json").unlink()
    return world, folder / "run"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"connector_type": "linear"}, ["connector_type 'mlp2x_gelu'", "now 'linear'"]),
        ({"model_name_or_path": "teacher_llm"}, ["hidden_size 32", "now 48"]),
        ({"model_name_or_path": "teacher_llm", "allow_changed": "model_name_or_path"}, ["hidden_size 32", "now 48"]),
        ({"tune_type_vision_tower": "frozen"}, ["tune_type_vision_tower 'full'", "now 'frozen'"]),
        ({"training_recipe": "lora", "tune_type_llm": "lora"}, ["tune_type_llm 'full'", "now 'lora'"]),
        ({"vision_tower_lr": 1e-4}, ["vision_tower_lr None", "now 0.0001"]),
        ({"optim": "sgd"}, ["optim 'adamw_torch'", "now 'sgd'", "--allow_changed optim"]),
        ({"optim": "sgd", "allow_changed": "optim"}, ["another --optim"]),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_other_arguments_than_the_run_was_started_with(begun, tmp_path, capsys, changes, words):
    """One sentence with the checkpoint and the remedy; the run's weights do not change."""
    world, run = begun
    shutil.copytree(run, tmp_path / "run")
    before = (run / "model.safetensors").read_bytes()
    changes = {name: world.get(value, value) for name, value in changes.items()}
    assert main(command_line(world, tmp_path / "run", save_steps=1, max_steps=4, **changes)) == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert all(word in line for word in [*words, "checkpoint-2", "--overwrite_output_dir True"])
    assert (tmp_path / "run" / "model.safetensors").read_bytes() == before


def test_resuming_by_true_and_with_another_learning_rate(begun, tmp_path, capsys):
    """True means the latest checkpoint; the old schedule continues, with a warning, and is what the run records."""
    world, run = begun
    shutil.copytree(run, tmp_path / "run")
    changes = {"max_steps": 3, "learning_rate": 1e-5, "resume_from_checkpoint": "True"}
    assert main(command_line(world, tmp_path / "run", **changes)) == 0
    said = capsys.readouterr().err
    assert "Resuming from" in said and "--learning_rate 1e-05 is not used: the run continues with 0.01" in said
    assert json.loads((tmp_path / "run" / "training_args.json").read_text())["learning_rate"] == 0.01
    for file in ("recipe.yaml", "README.md"):
        text = (tmp_path / "run" / file).read_text()
        assert "0.01" in text and "1e-05" not in text


def with_best(folder, callbacks=(), **kwargs):
    """A trainer that takes the first of three checkpoints as the best one, since the loss decreases."""
    every_step = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    best = {"load_best_model_at_end": True, "metric_for_best_model": "ce", "greater_is_better": True}
    arguments = toy_arguments(folder, **every_step, **best, **kwargs)
    return toy_trainer(arguments, eval_dataset=ToyDataset(4), callbacks=list(callbacks))


def test_the_best_checkpoint_is_checked_and_only_its_weights_are_read(tmp_path, monkeypatch):
    """With DeepSpeed, too: its reader would execute pickles, and needs the ranks that wrote the shards."""
    trainer = with_best(tmp_path)
    trainer.train()
    best, kept = Path(trainer.state.best_model_checkpoint), weights(trainer.model)
    assert best.name == "checkpoint-1"
    trainer.model.load_state_dict(toy_task(seed=7).state_dict())
    monkeypatch.setattr(trainer, "is_deepspeed_enabled", True)
    trainer._load_best_model()
    assert largest_difference(kept, weights(trainer.model)) == 0
    (best / "model.safetensors").write_bytes((tmp_path / "checkpoint-2" / "model.safetensors").read_bytes())
    with pytest.raises(resume.ResumeError, match="is damaged"):
        trainer._load_best_model()
    trainer.interrupted = True
    trainer._load_best_model()


def test_a_signal_keeps_its_checkpoint_beside_the_best_one(tmp_path, monkeypatch):
    """transformers removes all but the best one when training ends with a limit of one."""
    trainer = with_best(tmp_path, save_total_limit=1)
    monkeypatch.setattr(signals, "received", lambda: "SIGTERM" if trainer.state.global_step else None)
    trainer.train()
    assert trainer.interrupted and trainer.state.global_step == 2
    assert [folder.name for folder in checkpoints.checkpoints(tmp_path)] == ["checkpoint-2", "checkpoint-1"]


def test_a_checkpoint_that_cannot_be_read_is_refused_in_one_sentence(tmp_path, monkeypatch):
    trainer = toy_trainer(toy_arguments(tmp_path))
    monkeypatch.setattr(trainer.recipe, "read_student", lambda *args: int("of another method."))
    with pytest.raises(resume.ResumeError, match=r"cannot continue from there \(.*\); use the arguments"):
        trainer._load_from_checkpoint("there")


def test_a_checkpoint_of_the_last_step_only_gives_the_result(tmp_path):
    """The run was killed between its last checkpoint and its result, in the middle of an epoch."""
    settings = {"save_strategy": "steps", "save_steps": 1, "max_steps": 2}
    first = toy_trainer(toy_arguments(tmp_path, **settings))
    first.train()
    again = toy_trainer(toy_arguments(tmp_path, **settings), toy_task(seed=7))
    again.train(resume_from_checkpoint=resume.find_checkpoint(tmp_path))
    assert again.state.global_step == 2 and largest_difference(weights(first.model), weights(again.model)) == 0


def test_a_run_that_stopped_early_is_finished(tmp_path):
    """If it is interrupted before that, its patience goes on; if after, only the result is written."""
    patience = {"max_steps": 6, "early_stopping_patience": 2}

    def trainer():
        return with_best(tmp_path, callbacks=[EarlyStoppingCallback(2)], **patience)

    stopped = trainer()
    stopped.train()
    assert stopped.state.global_step == 3
    for checkpoint in ("checkpoint-2", "checkpoint-3"):
        again = trainer()
        again.train(resume_from_checkpoint=str(tmp_path / checkpoint))
        assert again.state.global_step == 3
    assert not resume.is_finished(tmp_path)
    again.save_result()
    assert resume.is_finished(tmp_path)


def test_the_same_command_goes_on_when_the_chosen_checkpoint_has_been_removed(begun, tmp_path, capsys):
    """Rotation removes it; a command that names another missing one is still refused."""
    world, run = begun
    shutil.copytree(run, tmp_path / "run")
    chosen = {"save_steps": 1, "save_total_limit": 1, "resume_from_checkpoint": tmp_path / "run" / "checkpoint-1"}
    assert main(command_line(world, tmp_path / "run", max_steps=3, **chosen)) == 0
    assert [folder.name for folder in checkpoints.checkpoints(tmp_path / "run")] == ["checkpoint-3"]
    (tmp_path / "run" / "trainer_state.json").unlink()
    assert main(command_line(world, tmp_path / "run", max_steps=4, **chosen)) == 0
    (tmp_path / "run" / "trainer_state.json").unlink()
    chosen["resume_from_checkpoint"] = tmp_path / "run" / "checkpoint-2"
    assert main(command_line(world, tmp_path / "run", max_steps=4, **chosen)) == 1
    assert "checkpoint-2 does not exist" in capsys.readouterr().err


def test_a_requeued_job_does_not_overwrite_what_it_has_begun(begun, tmp_path, monkeypatch):
    """Another job, or the first start of this one, begins a new run."""
    world, run = begun
    shutil.copytree(run, tmp_path / "run")
    settings = {"save_steps": 1, "overwrite_output_dir": True}

    def kept_after(steps, job, restarts):
        monkeypatch.setenv("SLURM_JOB_ID", job)
        monkeypatch.setenv("SLURM_RESTART_COUNT", restarts)
        before = tmp_path / "run" / "checkpoint-1" / "before"
        before.touch()
        checkpoints.seal(before.parent, 1, 1)
        manifest = checkpoints.digest(before.parent / checkpoints.MANIFEST)
        record = tmp_path / "run" / checkpoints.RECORD
        record.write_text(json.dumps({**checkpoints.read_record(record.parent), "checkpoint-1": manifest}))
        (tmp_path / "run" / "trainer_state.json").unlink(missing_ok=True)
        assert main(command_line(world, tmp_path / "run", max_steps=steps, **settings)) == 0
        return before.exists()

    assert not kept_after(1, "7", "1")  # begun by hand
    assert kept_after(2, "7", "1") and kept_after(2, "7", "2")
    assert not kept_after(1, "7", "0") and not kept_after(1, "8", "1")


def test_a_run_that_overwrites_says_how_it_continues(tmp_path):
    trainer = toy_trainer(toy_arguments(tmp_path, overwrite_output_dir=True))
    assert (
        Run(trainer, None, None).resume_hint().startswith("the same command without --overwrite_output_dir continues")
    )


def test_a_moved_run_keeps_its_best_checkpoint(tmp_path):
    with_best(tmp_path / "before", max_steps=2).train()
    (tmp_path / "before").rename(tmp_path / "after")
    trainer = with_best(tmp_path / "after", max_steps=3)
    trainer.train(resume_from_checkpoint=str(tmp_path / "after" / "checkpoint-2"))
    assert trainer.state.best_model_checkpoint == str(tmp_path / "after" / "checkpoint-1")
