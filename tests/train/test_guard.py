"""NaN and infinity: the first one stops the run, which names term and samples and keeps the good checkpoint."""

import json
import math
import os

import pytest
import torch
from torch import nn

from tests.train.toy import largest_difference, logged, toy_arguments, toy_task, toy_trainer
from tests.train.world import command_line, write_world
from tinyllava_switchkd.train.reliability import checkpoints
from tinyllava_switchkd.train.reliability.guard import EVENTS, NonFiniteError
from tinyllava_switchkd.train.task import SupervisedTask
from tinyllava_switchkd.train.train import main


class Spoilt(nn.Module):
    """A distillation task with one result replaced at the given calls (forward passes, counted from 1)."""

    def __init__(self, task, term, value, calls):
        super().__init__()
        self.task, self.term, self.value, self.calls, self.count = task, term, value, calls, 0
        task.forward_of_task = task.forward
        task.forward = self.spoil

    def spoil(self, batch, **kwargs):
        losses = dict(self.task.forward_of_task(batch, **kwargs))
        self.count += 1
        if self.count in self.calls:
            if self.term == "gradient":
                losses["loss"] = _BadGradient.apply(losses["loss"])
            else:
                losses[self.term] = losses[self.term] * self.value
        return losses


class _BadGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, value):
        return value.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * math.inf


def spoilt_trainer(folder, term="align", value=math.nan, calls=(3,), **kwargs):
    task = toy_task(distil=True)
    Spoilt(task, term, value, calls)
    kwargs = {"max_steps": 6, "save_strategy": "steps", "save_steps": 1, "save_total_limit": 1, **kwargs}
    trainer = toy_trainer(toy_arguments(folder, **kwargs), task)
    for index, sample in enumerate(trainer.train_dataset.samples):
        sample["id"] = f"sample {index}"
    return trainer


def events(folder):
    return [json.loads(line) for line in (folder / EVENTS).read_text().splitlines()]


@pytest.mark.parametrize("logging", [1, 100])
@pytest.mark.parametrize(
    ("term", "value"), [("loss", math.nan), ("align", math.nan), ("ce", math.inf), ("gradient", math.nan)]
)
def test_the_first_one_stops_the_run(tmp_path, term, value, logging):
    """Also if the loss itself is finite, and if nothing is logged for a hundred steps."""
    trainer = spoilt_trainer(tmp_path, term, value, logging_steps=logging)
    seen = []
    collate = trainer.data_collator
    trainer.data_collator = lambda samples: (seen.append([s["id"] for s in samples]), collate(samples))[1]
    with pytest.raises(NonFiniteError, match="step 3") as raised:
        trainer.train()
    assert ("gradient's norm" if term == "gradient" else term) in str(raised.value)
    (event,) = events(tmp_path)
    assert (event["step"], event["action"]) == (3, "stop")
    assert event["samples"][0]["ids"] == seen[2]
    assert [folder.name for folder in checkpoints.checkpoints(tmp_path)] == ["checkpoint-2"]
    assert checkpoints.damage(tmp_path / "checkpoint-2") is None


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="the device that is always full is Linux's")
@pytest.mark.parametrize("on_nan", ["stop", "skip"])
def test_with_a_full_disk_the_samples_are_named_on_the_screen(tmp_path, on_nan, caplog):
    (tmp_path / EVENTS).symlink_to("/dev/full")
    trainer = spoilt_trainer(tmp_path, on_nan=on_nan)
    if on_nan == "stop":
        with pytest.raises(NonFiniteError) as raised:
            trainer.train()
        said = str(raised.value)
    else:
        trainer.train()
        said = caplog.text
    assert "step 3: align" in said and "its samples are sample " in said and "No space left on device" in said
    assert checkpoints.damage(checkpoints.checkpoints(tmp_path)[0]) is None


def test_only_the_bad_micro_batch_is_named(tmp_path):
    trainer = spoilt_trainer(tmp_path, calls=(3,), gradient_accumulation_steps=2, per_device_train_batch_size=1)
    with pytest.raises(NonFiniteError, match="step 2: align"):
        trainer.train()
    assert len(events(tmp_path)[0]["samples"][0]["ids"]) == 1


@pytest.mark.parametrize(("term", "value"), [("align", math.nan), ("gradient", math.nan)])
def test_a_bad_step_is_left_out(tmp_path, term, value):
    """Weights equal those before the step, to the bit; training continues, and the log stays finite."""
    trainer = spoilt_trainer(tmp_path, term, value, on_nan="skip", save_total_limit=None)
    trainer.train()
    stored = {step: _weights(tmp_path / f"checkpoint-{step}") for step in (1, 2, 3, 4)}
    assert largest_difference(stored[2], stored[3]) == 0
    assert largest_difference(stored[1], stored[2]) > 0 and largest_difference(stored[3], stored[4]) > 0
    assert [event["action"] for event in events(tmp_path)] == ["skip"]
    assert all(math.isfinite(value) for entry in trainer.state.log_history for value in entry.values())
    assert logged(trainer, "skipped_steps")[-1] == 1


def test_too_many_bad_steps_in_a_row_stop_the_run(tmp_path):
    trainer = spoilt_trainer(tmp_path, calls=(2, 3, 4, 5, 6), on_nan="skip", max_nan_steps=3)
    with pytest.raises(NonFiniteError, match="step 4, the last of 3 in a row"):
        trainer.train()
    assert [event["action"] for event in events(tmp_path)] == ["skip", "skip", "stop"]


def test_the_guard_changes_nothing_and_reads_the_device_once_per_step(tmp_path, monkeypatch):
    """A run's weights equal those of transformers' own steps; nothing is read from the device in a micro-batch."""
    reads = []
    item, tolist, boolean = torch.Tensor.item, torch.Tensor.tolist, torch.Tensor.__bool__
    trainer = toy_trainer(toy_arguments(tmp_path, gradient_accumulation_steps=4, logging_steps=100, max_steps=2))
    step = trainer.training_step

    def training_step(*args, **kwargs):
        with monkeypatch.context() as patch:
            patch.setattr(torch.Tensor, "__bool__", lambda self: (_note(reads, self), boolean(self))[1])
            patch.setattr(torch.Tensor, "item", lambda self: (_note(reads, self), item(self))[1])
            patch.setattr(torch.Tensor, "tolist", lambda self: (_note(reads, self), tolist(self))[1])
            return step(*args, **kwargs)

    trainer.training_step = training_step
    trainer.train()
    assert not trainer.args.logging_nan_inf_filter
    assert not reads


def _note(reads, tensor):
    if tensor.is_floating_point():
        reads.append(tensor)


def _weights(folder):
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


def test_a_weight_that_is_not_finite_is_never_saved(tmp_path):
    trainer = toy_trainer(toy_arguments(tmp_path, save_strategy="steps", save_steps=1, max_steps=3))
    update = trainer.create_optimizer().step

    def step(*args, **kwargs):
        update(*args, **kwargs)
        if trainer.state.global_step == 1:
            next(p for p in trainer.student.connector.parameters()).data.view(-1)[0] = math.inf

    trainer.optimizer.step = step
    with pytest.raises(NonFiniteError, match="connector"):
        trainer.train()
    assert [folder.name for folder in checkpoints.checkpoints(tmp_path)] == ["checkpoint-1"]


def test_the_command_says_so_and_fails(tmp_path, capsys, monkeypatch):
    """One sentence with step and term, exit code 3, the samples' ids, and no trained model."""
    world = write_world(tmp_path / "world", samples=4)
    forward, calls = SupervisedTask.forward, []

    def spoil(self, *args, **kwargs):
        losses = forward(self, *args, **kwargs)
        calls.append(1)
        return {**losses, "ce": losses["ce"] * math.nan} if len(calls) == 2 else losses

    monkeypatch.setattr(SupervisedTask, "forward", spoil)
    assert main(command_line(world, tmp_path / "run", max_steps=4, save_steps=1)) == 3
    said = capsys.readouterr().err
    (sentence,) = [line for line in said.splitlines() if line.startswith("error: ")]
    assert "Not finite at step 2: ce." in sentence and EVENTS in sentence and "Traceback" not in said
    assert {len(name) for name in events(tmp_path / "run")[0]["samples"][0]["ids"]} == {1}  # "0" to "3"
    assert not (tmp_path / "run" / "trainer_state.json").exists()
    assert [folder.name for folder in checkpoints.checkpoints(tmp_path / "run")] == ["checkpoint-1"]
