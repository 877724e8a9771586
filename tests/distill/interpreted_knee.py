"""Run by test_knee_triton.py in a process of its own: the kernels, interpreted on the CPU, against torch's operations.

Triton decides on import whether to interpret, so that no other test may have imported it.
"""

import importlib
import os
import sys

os.environ["TRITON_INTERPRET"] = "1"

import torch

from tests.distill.test_knee import assert_same_order, hard_rows, language_model_like

module = importlib.import_module("tinyllava_switchkd.distill.knee")


def compare(z: torch.Tensor, programs: int) -> None:
    kernels.PROGRAMS = programs
    module.BACKEND = "triton"
    by_kernels = module.leading(z)
    assert module.BACKEND == "triton", "the kernels failed and torch stepped in"
    module.BACKEND = "torch"
    assert_same_order(by_kernels, module.leading(z))


def main() -> None:
    global kernels
    torch.set_num_threads(1)
    module._on_accelerator = lambda logits: True
    kernels = importlib.import_module("tinyllava_switchkd.distill.knee_triton")
    module._check_kernels(torch.zeros(1))  # what a first use on a GPU does; below, each dtype's own check is left out
    module._checked |= {(torch.device("cpu"), dtype) for dtype in (torch.float32, torch.float64, torch.bfloat16)}
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        compare(hard_rows(5003, dtype), programs=4)  # a part has both tiles: the second is nearly empty
    compare(hard_rows(8192, torch.float16), programs=64)  # no tail; a part is a tile
    compare(language_model_like(2, 32_000), programs=6)
    compare(language_model_like(1, 152_064), programs=5)
    wide = language_model_like(3, 6000)
    compare(wide[:, :5500], programs=3)
    compare(wide.T.contiguous().T, programs=3)  # neither stride is 1: read from a copy


if __name__ == "__main__":
    main()
    sys.exit(0)
