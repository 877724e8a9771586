"""Quantisation: refusals, counted bytes, and (if bitsandbytes is installed) the quantised modules."""

import sys
import types

import pytest
import torch
from torch import nn

from tests.tiny import tiny_llava, tiny_tokenizer
from tinyllava_switchkd.model import load_pretrained_model, save_pretrained_model
from tinyllava_switchkd.model.quantized import (
    check_quantization,
    is_quantized,
    keep_differentiable,
    linears_to_quantize,
    weight_bytes,
)


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setattr("tinyllava_switchkd.model.quantized.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"--teacher_bits 4 needs the package bitsandbytes: pip install .*qlora"):
        check_quantization("--teacher_bits 4", "cpu")


def test_a_device_without_kernels_is_named(monkeypatch):
    package = types.SimpleNamespace(supported_torch_devices={"cuda", "xpu"})
    monkeypatch.setitem(sys.modules, "bitsandbytes", package)
    monkeypatch.setattr("tinyllava_switchkd.model.quantized.find_spec", lambda name: name)
    check_quantization("load_4bit", "cuda:1")
    with pytest.raises(ValueError, match="load_4bit is not possible on cpu: bitsandbytes has kernels for cuda, xpu"):
        check_quantization("load_4bit", torch.device("cpu"))


def test_only_the_decoders_linear_layers_are_to_be_quantised():
    model = tiny_llava()
    names = {id(module): name for name, module in model.named_modules()}
    chosen = {names[id(linear)] for linear in linears_to_quantize(model)}
    layer = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
    layer += ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
    assert chosen == {f"language_model.model.layers.{i}.{name}" for i in range(2) for name in layer}


def test_weights_are_counted_on_a_model_without_any():
    with torch.device("meta"):
        model = tiny_llava(text={"hidden": 256})
    parameters = sum(p.numel() for p in model.parameters())
    assert weight_bytes(model, 2) == 2 * parameters
    assert weight_bytes(model, 2, 4) < weight_bytes(model, 2, 8) < weight_bytes(model, 2)


def test_a_repacked_model_is_refused_for_distillation():
    """bitsandbytes' kernel for CPUs with bfloat16 has no backward pass; it repacks weights when it is first used."""
    model = nn.Sequential(nn.Linear(2, 2))
    model[0].support_avx512bf16_for_cpu = True
    keep_differentiable(model)
    assert not model[0].support_avx512bf16_for_cpu
    model[0].support_avx512bf16_for_cpu = True
    model[0].weight.quant_state = types.SimpleNamespace(packing_format_for_cpu=True)
    with pytest.raises(ValueError, match="load it again for distillation"):
        keep_differentiable(model)


def stored_bytes(model: nn.Module) -> int:
    """Bytes of a model's parameters and of bitsandbytes' additional tensors."""
    tensors: list[torch.Tensor | None] = []
    for module in model.modules():
        for parameter in module._parameters.values():
            tensors += [None if parameter is None else parameter.data, getattr(parameter, "SCB", None)]
            for state in (getattr(parameter, "quant_state", None),):
                outer = getattr(state, "state2", None)
                tensors += [getattr(state, name, None) for name in ("absmax", "code", "offset")]
                tensors += [getattr(outer, name, None) for name in ("absmax", "code")]
    storages = {t.data_ptr(): t.untyped_storage().nbytes() for t in tensors if t is not None}
    return sum(storages.values())


@pytest.mark.parametrize("bits", [8, 4])
def test_a_checkpoint_is_loaded_quantised(tmp_path, bits):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    plain = tiny_llava(text={"hidden": 64, "layers": 3})
    save_pretrained_model(plain, tiny_tokenizer(), plain.vision_tower.image_processor, tmp_path)
    model, *_ = load_pretrained_model(tmp_path, device="cpu", load_8bit=bits == 8, load_4bit=bits == 4)
    kinds = (bitsandbytes.nn.Linear8bitLt, bitsandbytes.nn.Linear4bit)
    quantised = {name for name, module in model.named_modules() if isinstance(module, kinds)}
    names = {id(module): name for name, module in plain.named_modules()}
    assert quantised == {names[id(linear)] for linear in linears_to_quantize(plain)}
    assert is_quantized(model) and not is_quantized(plain)
    assert torch.equal(model.language_model.lm_head.weight, plain.language_model.lm_head.weight)
    assert stored_bytes(model) == weight_bytes(plain, 4, bits) < 0.6 * weight_bytes(plain, 4)
