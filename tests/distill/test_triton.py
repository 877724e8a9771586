"""The Triton kernels without a GPU: interpreted, compiled ahead of time, and failing gracefully."""

import importlib
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.distill.test_knee import assert_same_order, hard_rows, language_model_like
from tinyllava_switchkd.distill import LossFactory

knee_module = importlib.import_module("tinyllava_switchkd.distill.losses.knee")
ROOT = Path(__file__).parents[2]
needs_triton = pytest.mark.skipif(not importlib.util.find_spec("triton"), reason="triton is not installed")


@needs_triton
def test_interpreted_kernels_agree_with_torch_and_with_pairs():
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "tests.distill.interpreted"]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    if "only 0-dimensional arrays can be converted" in result.stderr:
        pytest.skip("this triton's interpreter does not bear this numpy (triton 3.6 with numpy 2.4)")
    assert result.returncode == 0, result.stderr[-3000:]


@needs_triton
@pytest.mark.parametrize(("capability", "dtype"), [(80, "fp32"), (90, "bf16")])
def test_kernels_compile_for_gpus_that_are_not_here(capability, dtype, tmp_path, monkeypatch):
    """The compiler may refuse code that the interpreter accepts; ptxas comes with triton."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    import triton
    import triton.language as tl
    from triton.backends.compiler import GPUTarget

    from tinyllava_switchkd.distill.losses import knee_triton, pairs_triton

    kinds = dict.fromkeys(("z", "q", "p"), f"*{dtype}") | dict.fromkeys(("low", "high", "scale", "values"), "*fp32")
    kinds |= dict.fromkeys(("counts", "last", "offsets", "columns_out"), "*i32")
    kinds |= dict.fromkeys(("settings", "statistics", "gradient"), "*fp64") | {"indices": "*i64", "ks": "*i64"}
    of_knee = {"BINS": knee_module.BINS, "TILE": knee_triton.TILE, "FLOAT": tl.float32}
    of_loss = {"REVERSE": dtype == "fp32", "GRADIENT": True, "TILE": pairs_triton.TILE}
    for kernel, fixed, warps in (
        (knee_triton.extremes, of_knee, knee_triton.WARPS),
        (knee_triton.count, of_knee, knee_triton.WARPS),
        (knee_triton.collect, of_knee, knee_triton.WARPS),
        (pairs_triton.pair_losses, of_loss, pairs_triton.WARPS),
        (pairs_triton.finish_gradient, of_loss, pairs_triton.WARPS),
    ):
        constants = {name: value for name, value in fixed.items() if name in kernel.arg_names}
        signature = {name: "constexpr" if name in constants else kinds.get(name, "i32") for name in kernel.arg_names}
        source = triton.compiler.ASTSource(kernel, signature, constexprs=constants)
        options = {"num_warps": warps}
        compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
        assert len(compiled.asm["cubin"]) > 1000
        assert compiled.metadata.shared <= 48 * 1024  # what every device allows by default


def test_training_goes_on_where_the_kernels_cannot_run(monkeypatch, caplog):
    """Without a GPU (or without a compiler) there is one warning, and torch's operations are used."""
    z = hard_rows(5003, torch.float32)
    expected = knee_module.leading(z)
    monkeypatch.setattr(knee_module, "BACKEND", "triton")
    monkeypatch.setattr(knee_module, "_checked", set())
    monkeypatch.setattr(knee_module, "_on_accelerator", lambda logits: True)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert_same_order(knee_module.leading(z), expected)
    [record] = caplog.records
    assert "Triton kernels cannot run" in record.message


@needs_triton
def test_kernels_that_disagree_with_torch_are_not_used(monkeypatch, caplog):
    from tinyllava_switchkd.distill.losses import knee_triton

    def wrong(logits):
        values, *rest = knee_module.candidates(logits, None)
        return values.flip(-1), *rest

    z = hard_rows(5003, torch.float32)
    expected = knee_module.leading(z)
    monkeypatch.setattr(knee_module, "BACKEND", "triton")
    monkeypatch.setattr(knee_module, "_checked", set())
    monkeypatch.setattr(knee_module, "_on_accelerator", lambda logits: True)
    monkeypatch.setattr(knee_triton, "above_knee", wrong)
    assert_same_order(knee_module.leading(z), expected)
    assert "find other logits" in caplog.text


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_kernels_and_torch_agree_on_a_gpu(dtype, monkeypatch):
    pytest.importorskip("triton")
    z = torch.cat([hard_rows(151_936, dtype) for _ in range(3)]).cuda()
    by_kernels = knee_module.leading(z)
    assert knee_module.BACKEND == "triton"
    monkeypatch.setattr(knee_module, "BACKEND", "torch")
    by_torch = knee_module.leading(z)
    assert_same_order(by_kernels, by_torch)
    assert_same_order(knee_module.Order(*(part.cpu() for part in by_kernels)), knee_module.leading(z.cpu()))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", ["dbild_rkl", "dbild_fkl", "bild_rkl"])
def test_losses_agree_on_a_gpu(name, monkeypatch):
    pytest.importorskip("triton")
    teacher = language_model_like(6, 151_936, seed=1)
    student = teacher + language_model_like(6, 151_936, seed=2) / 4
    results = []
    for device, backend in (("cuda", "triton"), ("cuda", "torch"), ("cpu", "torch")):
        monkeypatch.setattr(knee_module, "BACKEND", backend)
        leaf = student.to(device).requires_grad_()
        values = LossFactory(name)()(leaf, teacher.to(device))
        values.sum().backward()
        assert backend == knee_module.BACKEND
        results.append((values.detach().cpu(), leaf.grad.cpu()))
    for values, gradient in results[:2]:
        torch.testing.assert_close(values, results[2][0], rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(gradient, results[2][1], rtol=1e-5, atol=1e-8)
