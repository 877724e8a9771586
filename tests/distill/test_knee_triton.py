"""The knee's Triton kernels where there is no GPU: interpreted, compiled ahead of time, and failing gracefully."""

import importlib
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from .test_knee import assert_same_order, hard_rows

knee_module = importlib.import_module("tinyllava_switchkd.distill.knee")
ROOT = Path(__file__).parents[2]
needs_triton = pytest.mark.skipif(not importlib.util.find_spec("triton"), reason="triton is not installed")


@needs_triton
def test_interpreted_kernels_give_the_order_of_torch():
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "tests.distill.interpreted_knee"]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-3000:]


@needs_triton
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_kernels_compile_for_gpus_that_are_not_here(capability, dtype, tmp_path, monkeypatch):
    """What the interpreter lets pass the compiler may refuse; ptxas comes with triton."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    import triton
    import triton.language as tl
    from triton.backends.compiler import GPUTarget

    from tinyllava_switchkd.distill import knee_triton

    fixed = {"TILE": knee_triton.TILE, "BINS": knee_module.BINS, "FLOAT": tl.float32}
    pointers = {"z": f"*{dtype}", **dict.fromkeys(("low", "high", "scale", "values"), "*fp32")}
    pointers |= dict.fromkeys(("counts", "last", "offsets", "columns_out"), "*i32")
    for kernel in (knee_triton.extremes, knee_triton.count, knee_triton.collect):
        constants = {name: value for name, value in fixed.items() if name in kernel.arg_names}
        kinds = pointers | dict.fromkeys(constants, "constexpr")
        signature = {name: kinds.get(name, "i32") for name in kernel.arg_names}
        source = triton.compiler.ASTSource(kernel, signature, constexprs=constants)
        options = {"num_warps": knee_triton.WARPS}
        compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
        assert len(compiled.asm["cubin"]) > 1000
        assert compiled.metadata.shared <= 48 * 1024  # what every device grants without asking


def test_training_goes_on_where_the_kernels_cannot_run(monkeypatch, caplog):
    """Here for want of a GPU; on a GPU for want of a compiler, say. One warning, and torch does the work."""
    z = hard_rows(5003, torch.float32)
    expected = knee_module.leading(z)
    monkeypatch.setattr(knee_module, "BACKEND", "triton")
    monkeypatch.setattr(knee_module, "_checked", set())
    monkeypatch.setattr(knee_module, "_on_accelerator", lambda logits: True)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert_same_order(knee_module.leading(z), expected)
    assert [record.message for record in caplog.records if "Triton kernels cannot run" in record.message] != []
    assert len(caplog.records) == 1


@needs_triton
def test_kernels_that_disagree_with_torch_are_not_used(monkeypatch, caplog):
    from tinyllava_switchkd.distill import knee_triton

    def wrong(logits):
        head = list(knee_module._head(logits, None))
        head[0] = head[0].flip(-1)
        return tuple(head)

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
