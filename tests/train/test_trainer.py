"""The trainer: exact normalisation, logs, parameter groups, order of samples, checkpoints of only the student."""

import time
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

from tests.train.toy import largest_difference, logged, toy_arguments, toy_task, toy_trainer, weights
from tinyllava_switchkd.constants import IGNORE_INDEX
from tinyllava_switchkd.distill import Measure
from tinyllava_switchkd.train.trainer import _Window


def trained(tmp_path, distil=False, **kwargs):
    """Weights after SGD (linear in the gradient, so that equal weights mean equal gradients), and the trainer."""
    args = toy_arguments(
        tmp_path, optim="sgd", max_grad_norm=0, lr_scheduler_type="constant", learning_rate=0.1, **kwargs
    )
    trainer = toy_trainer(args, toy_task(distil))
    trainer.train()
    return weights(trainer.model), trainer


@pytest.mark.parametrize("distil", [False, True], ids=["sft", "dft"])
def test_accumulated_micro_batches_equal_one_batch(tmp_path, distil):
    at_once, one = trained(tmp_path, distil, per_device_train_batch_size=4, gradient_accumulation_steps=1)
    bit_by_bit, many = trained(tmp_path, distil, per_device_train_batch_size=1, gradient_accumulation_steps=4)
    untrained = weights(toy_task(distil))
    assert largest_difference(at_once, untrained) > 1e-2
    assert largest_difference(at_once, bit_by_bit) < 1e-5
    for key in ("loss", "ce", "grad_norm", *(("align", "visual_switch", "knee_teacher") if distil else ())):
        assert logged(one, key) == pytest.approx(logged(many, key), rel=1e-4), key


def test_loss_is_divided_by_the_steps_supervised_tokens(tmp_path):
    """The first logged loss is the plain mean over all supervised tokens of the step's samples."""
    _, trainer = trained(tmp_path, per_device_train_batch_size=1, gradient_accumulation_steps=12, max_steps=1)
    task = toy_task()
    total, count = 0.0, 0
    for sample in trainer.train_dataset.samples:
        batch = trainer.data_collator([sample])
        tokens = int((batch["labels"][:, 1:] != IGNORE_INDEX).sum())
        total += task(batch)["loss"].item() * tokens
        count += tokens
    assert logged(trainer, "loss")[0] == pytest.approx(total / count, rel=1e-5)


def test_logs_are_means_over_the_window(tmp_path):
    _, often = trained(tmp_path, distil=True, max_steps=4, logging_steps=1)
    _, once = trained(tmp_path, distil=True, max_steps=4, logging_steps=4)
    for key in ("loss", "ce", "align", "visual_switch"):
        assert logged(once, key) == pytest.approx([sum(logged(often, key)) / 4], rel=1e-5)
        assert len(logged(often, key)) == 4
    for key in ("knee_teacher", "knee_student", "topk_overlap", "tokens_per_second", "supervised_tokens_per_second"):
        assert len(logged(once, key)) == 1 and logged(once, key)[0] > 0
    entry = often.state.log_history[0]
    assert entry["loss"] == pytest.approx(entry["ce"] + entry["align"] + entry["visual_switch"], rel=1e-5)
    assert entry["tokens_per_second"] > entry["supervised_tokens_per_second"]


@pytest.mark.parametrize("across", [True, False])
def test_logs_are_means_over_ranks_that_divide_by_their_own_tokens(across):
    """With `average_tokens_across_devices` a rank's value is its part of the mean, without it a mean of its own."""
    ranks = SimpleNamespace(num_processes=2, reduce=lambda sums, reduction: 2 * sums)
    window = _Window({"ce": Measure("", weight=1.0), "knee": Measure("", of_batch=True)}, across)
    one = torch.tensor(1.0)
    window.add({"loss": one, "ce": 3 * one, "knee": 5 * one, "supervised_tokens": 4 * one}, one, one)
    logs = window.close(ranks, 1)
    assert (logs["ce"], logs["knee"]) == (6 if across else 3, 5)


@pytest.mark.parametrize("packing", [False, True])
def test_padding_and_waiting_are_logged(tmp_path, packing):
    """The share of padding, and of the time that went into waiting for data."""
    args = toy_arguments(tmp_path, max_steps=2, logging_steps=2, packing=packing)
    trainer = toy_trainer(args, toy_task())
    trainer.model.packing = packing
    collator, lengths = trainer.data_collator, []

    def slowly(samples):
        time.sleep(0.3)
        images = toy_task().student.num_image_tokens
        lengths.append([len(s["input_ids"]) + (images - 1 if "images" in s else 0) for s in samples])
        return collator(samples)

    trainer.data_collator = slowly
    start = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - start
    # accelerate fetches a batch ahead: training used only the first two
    tokens, computed = (sum(map(measure, lengths[:2])) for measure in (sum, lambda batch: len(batch) * max(batch)))
    assert tokens < computed
    assert logged(trainer, "padding_share")[0] == pytest.approx(0.0 if packing else 1 - tokens / computed)
    assert 0.5 / seconds < logged(trainer, "data_wait_share")[0] < 1


def test_packing_learns_the_same(tmp_path):
    padded, _ = trained(tmp_path)
    args = toy_arguments(
        tmp_path, optim="sgd", max_grad_norm=0, lr_scheduler_type="constant", learning_rate=0.1, packing=True
    )
    trainer = toy_trainer(args, toy_task().student)  # a bare model becomes a task with the run's settings
    assert trainer.model.packing
    trainer.train()
    assert largest_difference(weights(trainer.model), padded) < 1e-5


def test_parameter_groups(tmp_path):
    args = toy_arguments(tmp_path, mm_projector_lr=1e-4, vision_tower_lr=1e-5, learning_rate=1e-3, weight_decay=0.1)
    trainer = toy_trainer(args)
    groups = trainer.parameter_groups()
    names = {id(p): name for name, p in trainer.model.named_parameters()}
    rates = {}
    for group in groups:
        for parameter in group["params"]:
            name = names[id(parameter)]
            rates[name] = group["lr"]
            vector = name.endswith("bias") or "norm" in name
            assert group["weight_decay"] == (0.0 if vector else 0.1), name
    assert set(rates) == {name for name, p in trainer.model.named_parameters() if p.requires_grad}
    for name, rate in rates.items():
        part = name.split(".")[1]
        assert rate == {"connector": 1e-4, "vision_tower": 1e-5, "language_model": 1e-3}[part], name
    trainer.model.student.vision_tower.requires_grad_(False)
    assert {group["lr"] for group in trainer.parameter_groups()} == {1e-4, 1e-3}


def test_every_group_follows_the_schedule_from_its_own_rate(tmp_path):
    class Rates(TrainerCallback):
        def __init__(self):
            self.seen = []

        def on_pre_optimizer_step(self, args, state, control, optimizer, **kwargs):
            self.seen.append(sorted({group["lr"] for group in optimizer.param_groups}))

    rates = Rates()
    args = toy_arguments(
        tmp_path, mm_projector_lr=1e-4, vision_tower_lr=1e-5, lr_scheduler_type="linear", max_steps=4, warmup_steps=0.5
    )
    trainer = toy_trainer(args, callbacks=[rates])
    trainer.train()
    shares = [0.0, 0.5, 1.0, 0.5]  # two steps of warm-up, then down to zero
    expected = [sorted({share * rate for rate in (1e-5, 1e-4, 1e-2)}) for share in shares]
    assert rates.seen == [pytest.approx(step) for step in expected]
    assert logged(trainer, "learning_rate") == pytest.approx([share * 1e-2 for share in shares])


def test_logging_gradient_shares_changes_nothing(tmp_path):
    """Its additional forward pass draws no number of the training's dropout."""
    results = []
    for every in (0, 1):
        task = toy_task(distil=True)
        task.student.connector.register_forward_hook(lambda _, __, visual: torch.nn.functional.dropout(visual))
        trainer = toy_trainer(toy_arguments(tmp_path, log_gradient_shares=every), task)
        trainer.train()
        results.append(weights(task))
    assert "gradient/last_hidden_state/ce" in trainer.state.log_history[0]
    assert largest_difference(*results) == 0


@pytest.mark.parametrize("freeze_tower", [False, True])
def test_a_term_that_cannot_reach_the_student_causes_no_warning(tmp_path, caplog, freeze_tower):
    """The switch gives no gradient without images, or if the tower is frozen; a larger weight would not help."""
    task = toy_task(distil=True)
    task.student.vision_tower.requires_grad_(not freeze_tower)
    trainer = toy_trainer(toy_arguments(tmp_path, log_gradient_shares=1, per_device_train_batch_size=1), task)
    kept = [sample for sample in trainer.train_dataset.samples if ("images" in sample) == freeze_tower]
    trainer.train_dataset.samples = kept
    trainer.train()
    assert logged(trainer, "gradient/last_hidden_state/visual_switch") == [0.0] * 3
    assert "of the gradient everywhere" not in caplog.text


def test_only_the_student_is_saved(tmp_path):
    trainer = toy_trainer(toy_arguments(tmp_path, save_strategy="steps", save_steps=3), toy_task(distil=True))
    trainer.train()
    saved = load_file(tmp_path / "checkpoint-3" / "model.safetensors")
    state = trainer.student.state_dict()
    assert set(saved) == set(state) - {"language_model.lm_head.weight"}
    assert all(torch.equal(saved[name], state[name]) for name in saved)


def test_frozen_teacher_does_not_change(tmp_path):
    task = toy_task(distil=True)
    before = {name: value.clone() for name, value in task.teacher.state_dict().items()}
    toy_trainer(toy_arguments(tmp_path), task).train()
    assert all(torch.equal(before[name], value) for name, value in task.teacher.state_dict().items())


def test_modalities_do_not_mix_and_epochs_differ(tmp_path):
    args = toy_arguments(tmp_path, group_by_modality_length=True, max_steps=-1, num_train_epochs=2)
    trainer = toy_trainer(args, size=24)
    orders = []
    collate = trainer.data_collator

    def remember(samples):
        orders.append([id(sample) for sample in samples])
        assert len({"images" in sample for sample in samples}) == 1
        return collate(samples)

    trainer.data_collator = remember
    trainer.train()
    first, second = orders[:12], orders[12:]
    assert len(second) == 12 and first != second
    assert {i for batch in first for i in batch} == {i for batch in second for i in batch}


def test_a_bare_model_trains_with_cross_entropy(tmp_path):
    student = toy_task().student
    trainer = toy_trainer(toy_arguments(tmp_path, max_steps=1), student)
    trainer.train()
    assert logged(trainer, "ce") == pytest.approx(logged(trainer, "loss"), rel=1e-5)


@pytest.mark.parametrize("distil", [False, True], ids=["sft", "dft"])
def test_gradient_checkpointing_changes_nothing(tmp_path, distil):
    plain, _ = trained(tmp_path, distil)
    checkpointed, trainer = trained(tmp_path, distil, gradient_checkpointing=True)
    assert trainer.student.language_model.model.layers[0].gradient_checkpointing
    assert largest_difference(plain, checkpointed) < 1e-6


def test_checkpointing_reaches_layers_behind_frozen_ones(tmp_path):
    """Only the tower's second layer is trained; its input has no gradient, so reentrant checkpointing would fail."""
    with pytest.raises(ValueError, match="sets use_reentrant"):
        toy_arguments(tmp_path, gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": True})
    results = []
    for number, kwargs in enumerate(({}, {"gradient_checkpointing": True})):
        task = toy_task()
        task.student.requires_grad_(False)
        task.student.vision_tower.vision_tower.vision_model.encoder.layers[1].requires_grad_(True)
        trainer = toy_trainer(toy_arguments(tmp_path / str(number), optim="sgd", **kwargs), task)
        before = weights(task)
        trainer.train()
        results.append(weights(task))
        assert largest_difference(before, results[-1]) > 1e-6
    assert largest_difference(*results) < 1e-7
