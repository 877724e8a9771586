"""Packed samples give the same losses as padded ones."""

import pytest
import torch

from tests.distill.conftest import make_batch
from tests.distill.test_switch import assert_same_gradients, gradients
from tests.tiny import tiny_llava
from tinyllava_switchkd.distill import build_distiller
from tinyllava_switchkd.train.task import SupervisedTask


@pytest.mark.parametrize("llm", ["qwen2", "qwen3", "llama", "phi", "gemma", "stablelm"])
def test_packed_samples_do_not_see_each_other(llm, batch):
    student = tiny_llava(llm, seed=1).requires_grad_(True)
    padded, packed = SupervisedTask(student), SupervisedTask(student, packing=True)
    assert torch.isclose(packed(batch)["loss"], padded(batch)["loss"], rtol=1e-5)
    assert_same_gradients(gradients(packed, batch), gradients(padded, batch), 2e-5)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_all_three_pathways_are_packed(student, teacher, batch, checkpointing):
    padded = build_distiller(student, teacher)
    expected, expected_losses = gradients(padded, batch), padded(batch)
    packed = build_distiller(student, teacher, packing=True, gradient_checkpointing=checkpointing)
    lengths = []
    for model in (student, teacher):
        decoder = model.language_model.get_decoder()
        decoder.register_forward_pre_hook(
            lambda _, args, kwargs: lengths.append(tuple(kwargs["inputs_embeds"].shape[:2])), with_kwargs=True
        )
    assert_same_gradients(gradients(packed, batch), expected, 2e-5)
    images, tokens = student.num_image_tokens, int(batch["attention_mask"].sum())
    everything = tokens + 4 * (images - 1)
    assert lengths == [(1, everything), (1, everything), (1, everything - 5)]  # the text-only sample has 5 tokens
    for name, value in packed(batch).items():
        assert torch.allclose(value.float(), expected_losses[name].float(), rtol=1e-4), name


def test_left_padding_and_a_sample_alone(student):
    right = make_batch("ippaaa", "pa")
    left = {**right}
    for key in ("input_ids", "labels", "attention_mask"):
        left[key] = right[key].clone()
        left[key][1] = right[key][1].roll(4)
    packed = SupervisedTask(student, packing=True)
    assert torch.isclose(packed(left)["loss"], packed(right)["loss"], rtol=1e-5)
    alone = make_batch("ippaaa")
    assert torch.isclose(packed(alone)["loss"], SupervisedTask(student)(alone)["loss"], rtol=1e-5)


def test_text_only_batch(student, teacher):
    batch = make_batch("ppaa", "paaa")
    padded, packed = build_distiller(student, teacher), build_distiller(student, teacher, packing=True)
    assert torch.isclose(packed(batch)["loss"], padded(batch)["loss"], rtol=1e-5)
