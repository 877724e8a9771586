"""The chunked pass with the settings of real runs: mixed precision, adapters, all kinds of heads."""

import pytest
import torch
import torch.nn.functional as F

from tests.distill.conftest import set_recompute
from tests.distill.test_switch import assert_same_gradients, dense, gradients
from tests.tiny import VOCAB_SIZE, tiny_llava
from tinyllava_switchkd.distill import build_distiller


def dense_gradients(distiller, batch):
    distiller.zero_grad()
    dense(distiller, batch)[0]["loss"].backward()
    return {name: p.grad.clone() for name, p in distiller.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_mixed_precision_computes_the_loss_in_float32(student, teacher, batch, recompute, checkpointing, monkeypatch):
    """A float32 student under bfloat16 autocast and a bfloat16 teacher.

    The result is at least as close to float32 throughout as the dense computation with the same rounding.
    """
    expected = gradients(build_distiller(student, teacher), batch)
    seen = []
    cross_entropy = F.cross_entropy
    monkeypatch.setattr(F, "cross_entropy", lambda z, *args, **kw: (seen.append(z), cross_entropy(z, *args, **kw))[1])
    mixed = build_distiller(student, teacher.to(torch.bfloat16), chunk_size=4, gradient_checkpointing=checkpointing)
    mixed.loss.register_forward_pre_hook(lambda module, logits: seen.extend(logits))
    set_recompute(monkeypatch, mixed, recompute)
    mixed.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        losses = mixed(batch)
    losses["loss"].backward()
    assert {z.dtype for z in seen} == {torch.float32}
    ours = {name: p.grad.clone() for name, p in mixed.named_parameters() if p.grad is not None}
    mixed.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        parts = dense(mixed, batch)[0]
    parts["loss"].backward()
    rounded = {name: p.grad.clone() for name, p in mixed.named_parameters() if p.grad is not None}
    for name in ("loss", "ce", "align", "visual_switch"):
        assert losses[name].dtype == torch.float32
        assert torch.isclose(losses[name].double(), parts[name], rtol=1e-5), name
    assert ours.keys() == expected.keys() and {grad.dtype for grad in ours.values()} == {torch.float32}
    for part in ("vision_tower", "connector", "language_model"):
        names = [name for name in expected if f"student.{part}." in name]
        mine, theirs, truth = (torch.cat([g[name].flatten() for name in names]) for g in (ours, rounded, expected))
        assert (mine - theirs).norm() < 0.02 * truth.norm(), part
        assert (mine - truth).norm() < 1.2 * (theirs - truth).norm() < 0.1 * truth.norm(), part


@pytest.mark.parametrize("chunk_size", [3, 1000])
def test_adapters_have_the_gradient_of_the_dense_computation(student, teacher, batch, chunk_size):
    """The head is frozen, so chunks keep only gradients of hidden states."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"])
    torch.manual_seed(0)
    peft.get_peft_model(student, config)
    for name, parameter in student.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)  # zero at first, which would leave lora_A without a gradient
    distiller = build_distiller(student, teacher, chunk_size=chunk_size)
    computed = gradients(distiller, batch)
    assert computed and all(".lora_" in name for name in computed)
    assert {name.split(".")[1] for name in computed} == {"language_model", "vision_tower"}
    assert_same_gradients(computed, dense_gradients(distiller, batch), 2e-5)


@pytest.mark.parametrize(
    ("tied", "rows", "teacher_rows"), [(True, 0, 16), (True, 16, 0), (False, 0, 0), (False, 16, 0), (False, 0, 16)]
)
def test_heads_of_every_kind_have_the_gradient_of_the_dense_computation(batch, tied, rows, teacher_rows):
    student = tiny_llava(seed=1, vocab=VOCAB_SIZE + rows, text={"tie_word_embeddings": tied}).train()
    student.freeze_unused_parameters()
    distiller = build_distiller(student, tiny_llava(seed=2, vocab=VOCAB_SIZE + teacher_rows), chunk_size=5)
    assert_same_gradients(gradients(distiller, batch), dense_gradients(distiller, batch), 2e-5)
