"""A quantised teacher is not moved or cast, and gradients pass through it (bitsandbytes' CPU kernels)."""

import copy
import gc
import math

import pytest
import torch

from tests.distill.test_switch import gradients
from tests.tiny import tiny_llava
from tinyllava_switchkd.distill import build_distiller
from tinyllava_switchkd.model import TinyLlavaForConditionalGeneration
from tinyllava_switchkd.model.quantized import quantization_config

TEXT = {"hidden": 64, "layers": 3}


def test_a_quantised_teacher_is_neither_cast_nor_moved(student, teacher):
    teacher.is_quantized = True
    distiller = build_distiller(student, teacher)
    distiller.to(torch.float64)
    assert next(student.parameters()).dtype == torch.float64
    assert {p.dtype for p in teacher.parameters()} == {torch.float32}
    distiller.to("meta")
    assert student.device.type == "meta" and teacher.device.type == "cpu"


def test_only_the_8_bit_teacher_is_checkpointed_the_reentrant_way(student, teacher):
    def kinds(bits):
        teacher.is_loaded_in_8bit = bits == 8
        distiller = build_distiller(student, teacher)
        distiller.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        models = (student.language_model.model, teacher.language_model.model)
        return [model.layers[0]._gradient_checkpointing_func.keywords["use_reentrant"] for model in models]

    assert (kinds(4), kinds(8)) == ([False, False], [False, True])


def quantised(model, bits):
    tensors = {name: value.clone() for name, value in model.state_dict().items()}
    return TinyLlavaForConditionalGeneration.from_tensors(
        model.config,
        tensors,
        "here",
        dtype=torch.float32,
        quantization_config=quantization_config(bits, torch.float32),
        device_map={"": "cpu"},
    ).eval()


def dequantised(model, like):
    """The same weights in ordinary layers."""
    from peft.utils.integrations import dequantize_bnb_weight

    plain = copy.deepcopy(like)
    for name, module in model.named_modules():
        if type(module).__module__.startswith("bitsandbytes"):
            weight = dequantize_bnb_weight(module.weight, state=getattr(module, "state", None))
            plain.get_submodule(name).weight.data.copy_(weight)
    return plain


def difference(ours, theirs, part="vision_tower"):
    """Norm of the difference of two gradients, divided by the norm of the second."""
    names = [name for name in theirs if part in name]
    return math.sqrt(
        sum(float((ours[n] - theirs[n]).norm()) ** 2 for n in names) / sum(float(theirs[n].norm()) ** 2 for n in names)
    )


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(("bits", "rounding"), [(4, 1e-5), (8, 0.03)])
def test_the_switch_pass_has_the_gradient_of_the_dequantised_teacher(student, batch, bits, rounding, checkpointing):
    """4-bit weights are dequantised before multiplication; in 8 bits activations are rounded, too."""
    pytest.importorskip("bitsandbytes")
    teacher = tiny_llava(seed=2, text=TEXT)
    held = quantised(teacher, bits)

    def gradient_of_switch(teacher, checkpointing=False):
        distiller = build_distiller(student, teacher, gradient_checkpointing=checkpointing)
        distiller.zero_grad()
        tokens, _ = distiller._tokens(batch)
        direction = torch.randn(tokens.switch.shape, generator=torch.Generator().manual_seed(0))
        (tokens.switch * direction).sum().backward()
        return {name: p.grad.clone() for name, p in student.named_parameters() if p.grad is not None}

    ours, theirs = gradient_of_switch(held, checkpointing), gradient_of_switch(dequantised(held, teacher))
    assert ours.keys() == theirs.keys() and all(name.startswith("vision_tower.") for name in ours)
    assert difference(ours, theirs) < rounding
    assert all(p.grad is None and not p.requires_grad for p in held.parameters())


@pytest.mark.parametrize("bits", [4, 8])
def test_the_whole_loss_with_a_quantised_teacher(student, batch, bits):
    pytest.importorskip("bitsandbytes")
    teacher = tiny_llava(seed=2, text=TEXT)
    held = quantised(teacher, bits)
    distiller = build_distiller(student, held)
    losses, expected = distiller(batch), build_distiller(student, dequantised(held, teacher))(batch)
    for name in ("ce", "align", "visual_switch"):
        assert torch.isclose(losses[name], expected[name], rtol=1e-5 if bits == 4 else 0.2), name
    ours = gradients(distiller, batch)
    without = gradients(build_distiller(student, held, switch_weight=0.0), batch)
    assert difference(without, ours) > 0.01  # in the tower, which alone the switch trains
    assert difference(without, ours, "language_model") < 1e-6
    assert not held.training and set(distiller.state_dict()) == {f"student.{name}" for name in student.state_dict()}


def live_bytes():
    """Bytes of all tensors that Python can reach, because bitsandbytes keeps some that autograd's hooks do not see."""
    gc.collect()
    tensors = [thing for thing in gc.get_objects() if isinstance(thing, torch.Tensor)]
    return sum({t.data_ptr(): t.untyped_storage().nbytes() for t in tensors if t.layout == torch.strided}.values())


def test_checkpointing_an_8_bit_teacher_really_saves_memory(student, batch):
    pytest.importorskip("bitsandbytes")
    student.requires_grad_(False)
    student.vision_tower.requires_grad_(True)
    distiller = build_distiller(student, quantised(tiny_llava(seed=2, text={"hidden": 64, "layers": 8}), 8))
    kept = []
    for checkpointing in (False, True):
        if checkpointing:
            distiller.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        before = live_bytes()
        loss = distiller(batch)["loss"]
        kept.append(live_bytes() - before)
        del loss
    assert kept[1] < 0.4 * kept[0], kept
