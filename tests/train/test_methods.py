"""Every method through the entry point: in pre-training and fine-tuning, with a bridge, with held-out data."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.tiny import tiny_llava, write_tiny_tower
from tests.train.toy import ToyDataset, toy_arguments, toy_collator, toy_task, toy_trainer
from tests.train.world import command_line, write_world
from tinyllava_switchkd.distill import MethodFactory, build_distiller
from tinyllava_switchkd.train.adapters import FILE
from tinyllava_switchkd.train.train import main
from tinyllava_switchkd.train.validation import WithFillers, hold_out


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Base models, data, and a teacher with another language model and a wider, coarser tower of another kind."""
    folder = tmp_path_factory.mktemp("methods")
    world = write_world(folder / "world")
    wide = write_tiny_tower(folder / "clip-wide", "clip", hidden=48, patch_size=14)
    world |= {name: str(folder / name) for name in ("teacher", "other_teacher")}
    parts = {"model_name_or_path": world["teacher_llm"], "max_steps": 1}
    assert main(command_line(world, world["teacher"], **parts)) == 0
    assert main(command_line(world, world["other_teacher"], **parts, vision_tower=wide)) == 0
    return world


def log_of(folder):
    return json.loads((Path(folder) / "trainer_state.json").read_text())["log_history"]


@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
@pytest.mark.parametrize("method", MethodFactory.list())
def test_every_method_distils_in_pretraining_and_in_fine_tuning(world, tmp_path, method, stage):
    """DPT and DFT differ only by flags."""
    arguments = command_line(world, tmp_path, stage, teacher_path=world["teacher"], distill_method=method)
    assert main(arguments) == 0
    names = {term.name for term in MethodFactory(method)().terms}
    assert names <= log_of(tmp_path)[0].keys()
    student = load_file(tmp_path / "model.safetensors")
    assert all(name.split(".")[0] in ("language_model", "vision_tower", "connector") for name in student)
    base = load_file(Path(world["llm"]) / "model.safetensors")
    frozen = all(torch.equal(student[f"language_model.{name}"], value) for name, value in base.items())
    assert frozen == (stage == "pretrain")
    assert (tmp_path / FILE).is_file() == (method == "align_kd")


@pytest.mark.parametrize("kind", ["bridge", "align_kd", "lora and bridge"])
def test_trained_parts_beside_the_student_are_resumed(world, tmp_path, kind):
    """A run stopped after its first checkpoint ends like the uninterrupted one, including the adapters."""
    changes = {"teacher_path": world["other_teacher"], "max_steps": 3, "save_steps": 1}
    if kind == "align_kd":
        changes |= {"teacher_path": world["teacher"], "distill_method": "align_kd"}
    if "lora" in kind:
        changes |= {"training_recipe": "lora", "tune_type_llm": "lora", "lora_r": 2, "tune_type_connector": "full"}
    through, stopped = tmp_path / "through", tmp_path / "stopped"
    assert main(command_line(world, through, **changes)) == 0
    begun = load_file(through / "checkpoint-1" / FILE)
    ended = load_file(through / FILE)
    assert any("bridge" in name for name in ended) == ("bridge" in kind)
    assert all(not torch.equal(begun[name], ended[name]) for name in ended)
    shutil.copytree(through, stopped)
    for name in ("checkpoint-2", "checkpoint-3"):
        shutil.rmtree(stopped / name)
    (stopped / "trainer_state.json").unlink()
    shutil.rmtree(stopped / "distill")
    assert main(command_line(world, stopped, **changes)) == 0
    again = load_file(stopped / FILE)
    assert ended.keys() == again.keys() and all(torch.equal(ended[name], again[name]) for name in ended)


def test_the_next_stage_continues_with_the_adapters_of_the_one_before(world, tmp_path, caplog):
    first, second = tmp_path / "first", tmp_path / "second"
    settings = {"teacher_path": world["teacher"], "distill_method": "align_kd", "max_steps": 1}
    assert main(command_line(world, first, "pretrain", **settings)) == 0
    changes = {**settings, "pretrained_model_path": first, "learning_rate": 0.0}
    assert main(command_line(world, second, **changes)) == 0
    before, after = load_file(first / FILE), load_file(second / FILE)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_the_adapters_of_another_method_are_not_used(world, tmp_path, capsys):
    """After pre-training with Align-KD, the switch fits its bridge. A bridge between other models is refused."""
    first, second = tmp_path / "first", tmp_path / "second"
    assert main(command_line(world, first, "pretrain", teacher_path=world["teacher"], distill_method="align_kd")) == 0
    changes = {"pretrained_model_path": first, "teacher_path": world["other_teacher"], "max_steps": 1}
    assert main(command_line(world, second, **changes)) == 0
    said = capsys.readouterr().err
    assert "of another method (attention_heads, features), which are not used" in said and "a bridge starts" in said
    assert {name.split(".")[0] for name in load_file(second / FILE)} == {"bridge"}
    (first / FILE).write_bytes((second / FILE).read_bytes())
    tensors = load_file(first / FILE)
    save_file({name: value[:1].clone() for name, value in tensors.items()}, first / FILE)
    assert main(command_line(world, tmp_path / "third", **changes)) == 1
    assert "use the same method and teacher as that run, or remove the file" in capsys.readouterr().err


def test_held_out_losses_are_those_of_training(tmp_path):
    """On one batch of the same samples, without dropout, training and validation report the same numbers."""
    trainer = toy_trainer(toy_arguments(tmp_path, learning_rate=0.0, max_steps=1, per_device_train_batch_size=12),
                          toy_task(distil=True))  # fmt: skip
    trainer.train()
    row = next(entry for entry in trainer.state.log_history if "align" in entry)
    for batch_size in (5, 12):
        trainer.args.per_device_eval_batch_size = batch_size
        metrics = trainer.evaluate(ToyDataset(12))
        assert set(metrics) == {f"eval_{name}" for name in ("loss", *trainer.model.measures)}
        for name in trainer.model.measures:
            assert metrics[f"eval_{name}"] == pytest.approx(row[name], rel=1e-4), name
        assert metrics["eval_loss"] == pytest.approx(row["loss"], rel=1e-4)
    assert all(p.grad is None or not p.grad.any() for p in trainer.model.parameters())


@pytest.mark.parametrize("method", MethodFactory.list())
def test_a_filler_of_a_ranks_last_batch_teaches_nothing(method):
    """Also methods that look at images without labels."""
    data = WithFillers(ToyDataset(3))
    task = build_distiller(toy_task().student, tiny_llava(seed=100), method)
    collate = toy_collator(task.student)
    alone, filled = (task(collate([data[index] for index in chosen])) for chosen in ([1], [1, 5]))
    assert alone.keys() == filled.keys()
    for name, value in alone.items():
        assert torch.isclose(filled[name].double(), value.double(), rtol=1e-5), name


def test_samples_are_held_out_by_their_ids(tmp_path):
    class Records:
        def __init__(self, names):
            self.names = names

        def id_of(self, index):
            return self.names[index]

    class Whole:
        def __init__(self, names):
            self.records, self.lengths = Records(names), list(range(len(names)))

        def __len__(self):
            return len(self.records.names)

        def encode(self, index):
            return {"id": self.records.names[index]}

    names = [f"sample {number}" for number in range(400)]
    train, held = hold_out(Whole(names), 0.1, seed=0)
    assert len(train) + len(held) == 400 and 20 < len(held) < 60 and not set(train.indices) & set(held.indices)
    assert held.lengths == held.indices
    assert [held.encode(number)["id"] for number in range(len(held))] == [names[index] for index in held.indices]
    chosen = {names[index] for index in held.indices}
    _, again = hold_out(Whole(names[::-1]), 0.1, seed=0)
    assert {names[::-1][index] for index in again.indices} == chosen
    _, other = hold_out(Whole(names), 0.1, seed=1)
    assert {names[index] for index in other.indices} != chosen
    with pytest.raises(ValueError, match="held out"):
        hold_out(Whole(names[:2]), 0.001, seed=0)


def test_the_best_checkpoint_by_held_out_data_is_taken(world, tmp_path):
    """A learning rate that ruins the model: the first evaluation stays the best, and training stops early."""
    arguments = command_line(
        world, tmp_path, teacher_path=world["teacher"], eval_share=0.4, eval_strategy="steps", eval_steps=1,
        save_steps=1, load_best_model_at_end=True, metric_for_best_model="eval_ce", early_stopping_patience=2,
        learning_rate=0.3, max_steps=8, save_total_limit=1, lr_scheduler_type="constant",
    )  # fmt: skip
    assert main(arguments) == 0
    log = [entry for entry in log_of(tmp_path) if "eval_ce" in entry]
    assert {"eval_loss", "eval_align", "eval_visual_switch", "eval_knee_teacher"} <= log[0].keys()
    best = min(log, key=lambda entry: entry["eval_ce"])
    assert len(log) == log.index(best) + 3 < 8
    kept = load_file(tmp_path / f"checkpoint-{best['step']}" / "model.safetensors")
    final = load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(kept[name], final[name]) for name in final)


def test_gradient_shares_are_logged_and_a_tiny_term_causes_one_warning(world, tmp_path, caplog):
    arguments = command_line(
        world, tmp_path, teacher_path=world["teacher"], distill_method="logit_kd", align_weight=1e-5,
        log_gradient_shares=1, max_steps=3,
    )  # fmt: skip
    import logging

    package = logging.getLogger("tinyllava_switchkd")
    with caplog.at_level(logging.WARNING):
        package.propagate, before = True, package.propagate
        try:
            handler = caplog.handler
            logging.getLogger("tinyllava_switchkd.train.trainer").addHandler(handler)
            assert main(arguments) == 0
        finally:
            logging.getLogger("tinyllava_switchkd.train.trainer").removeHandler(handler)
            package.propagate = before
    row = log_of(tmp_path)[0]
    for place in ("vision_features", "projector_output", "last_hidden_state"):
        assert row[f"gradient/{place}/ce"] > 100 * row[f"gradient/{place}/align"] > 0
    assert sum("less than 1 % of the gradient" in record.getMessage() for record in caplog.records) == 1


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"distill_method": "magic"}, ["magic", "switch_kd", "llava_kd"]),
        ({"distill_method": "llava_kd", "switch_weight": 2}, ["--switch_weight 2", "switch_kd", "llava_kd"]),
        ({"distill_method": "align_kd", "relation_weight": 2}, ["--relation_weight", "llava_kd", "align_kd"]),
        ({"distill_method": "align_kd", "top": 0}, ["top", "at least 1", "0"]),
        ({"distill_method": "llava_kd", "visual_weight": "inf"}, ["visual_weight", "inf"]),
        ({"distill_method": "llava_kd", "teacher_path": "other_teacher"}, ["visual tokens", "leave out these terms"]),
        ({"bridge": "maybe"}, ["maybe", "auto, none"]),
        ({"teacher_path": "other_teacher", "bridge": "none"}, ["width", "32", "48", "--bridge auto"]),
        ({"eval_strategy": "steps", "eval_steps": 1}, ["--eval_strategy steps", "--eval_data_path"]),
        ({"eval_share": 0.5}, ["--eval_strategy steps"]),
        ({"eval_share": 1.5, "eval_strategy": "epoch"}, ["--eval_share", "1.5"]),
        ({"eval_data_path": "nowhere.json", "eval_strategy": "epoch"}, ["nowhere.json", "does not exist"]),
        (
            {"eval_share": 0.4, "eval_strategy": "epoch", "save_strategy": "epoch", "load_best_model_at_end": True,
             "metric_for_best_model": "accuracy"},
            ["accuracy", "eval_ce", "eval_visual_switch"],
        ),
        ({"early_stopping_patience": 1}, ["--early_stopping_patience 1", "--load_best_model_at_end"]),
        ({"log_gradient_shares": -1}, ["--log_gradient_shares", "-1"]),
    ],
)  # fmt: skip
def test_bad_settings_are_refused_before_anything_is_written(world, tmp_path, capsys, changes, words):
    changes = {"teacher_path": "teacher", **changes}
    changes["teacher_path"] = world[changes["teacher_path"]]
    out = tmp_path / "out"
    assert main(command_line(world, out, **changes)) == 1
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert message.startswith("error: ") and all(word in message for word in words), message
    assert not out.exists()
