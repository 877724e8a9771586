"""Run by test_triton.py in a process of its own: the Triton kernels, interpreted on the CPU, against torch and pairs.

Triton decides on import whether to interpret, so that no other test may have imported it.
"""

import importlib
import os

os.environ["TRITON_INTERPRET"] = "1"

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.distill import oracle
from tests.distill.test_knee import assert_same_order, hard_rows, language_model_like
from tinyllava_switchkd.distill import LossFactory

knee_module = importlib.import_module("tinyllava_switchkd.distill.losses.knee")
knee_kernels = importlib.import_module("tinyllava_switchkd.distill.losses.knee_triton")
loss_kernels = importlib.import_module("tinyllava_switchkd.distill.losses.pairs_triton")
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def compare_orders(z: torch.Tensor, programs: int) -> None:
    knee_kernels.PROGRAMS = programs
    knee_module.BACKEND = "triton"
    by_kernels = knee_module.leading(z)
    assert knee_module.BACKEND == "triton", "the kernels failed and torch stepped in"
    knee_module.BACKEND = "torch"
    assert_same_order(by_kernels, knee_module.leading(z))


def compare_with_pairs(name: str, student: torch.Tensor, teacher: torch.Tensor, atol: float = 1e-10) -> None:
    """Compare value and gradient of finite tokens with enumerated pairs, and of all tokens with torch's operations."""
    leaf, same, theirs = (student.clone().requires_grad_() for _ in range(3))
    knee_module.BACKEND = "triton"
    by_kernels = LossFactory(name)(temperature=0.7)(leaf, teacher)
    by_kernels.sum().backward()
    assert knee_module.BACKEND == "triton", "the kernels failed and torch stepped in"
    knee_module.BACKEND = "torch"
    by_torch = LossFactory(name)(temperature=0.7)(same, teacher)
    by_torch.sum().backward()
    torch.testing.assert_close(by_kernels, by_torch, rtol=1e-10, atol=1e-12, equal_nan=True)
    columns = slice(2, None)  # a row with a NaN has a NaN gradient at the logits that lead it, padding or not
    torch.testing.assert_close(leaf.grad[:, columns], same.grad[:, columns], rtol=1e-9, atol=1e-12, equal_nan=True)
    clean = (student.isfinite() & teacher.isfinite()).all(1)
    expected = oracle.logit_difference_loss(theirs[clean], teacher[clean], 0.7, name.endswith("rkl"))
    torch.testing.assert_close(by_kernels[clean], expected, rtol=1e-10, atol=1e-10)
    expected.sum().backward()
    torch.testing.assert_close(leaf.grad[clean], theirs.grad[clean], rtol=1e-9, atol=atol)


class Waits(TorchDispatchMode):
    """Counts operations that would make the host wait for the GPU."""

    number = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.number += func._schema.name in {f"aten::{name}" for name in ("_local_scalar_dense", "nonzero", "bincount")}
        return func(*args, **(kwargs or {}))


def count_waits(student: torch.Tensor, teacher: torch.Tensor) -> int:
    knee_module.BACKEND = "triton"
    with Waits() as waits:
        LossFactory("dbild")()(student.clone().requires_grad_(), teacher).sum().backward()
    return waits.number


def main() -> None:
    torch.set_num_threads(1)
    knee_module._on_accelerator = lambda tensor: True
    for kernels in (knee_kernels, loss_kernels):
        kernels.check(torch.zeros(1))  # what a first use on a GPU does; below, each dtype's own check is left out
        name = kernels.__name__.rpartition(".")[2]
        knee_module._checked |= {(name, torch.device("cpu"), dtype) for dtype in DTYPES}
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        compare_orders(hard_rows(5003, dtype), programs=4)  # two parts a row: the second is a tail
    compare_orders(hard_rows(8192, torch.float16)[:3], programs=64)  # no tail; a part is a tile
    compare_orders(language_model_like(1, 32_000), programs=6)
    compare_orders(language_model_like(1, 152_064), programs=5)
    wide = language_model_like(3, 6000)
    compare_orders(wide[:, :5500], programs=3)
    compare_orders(wide.T.contiguous().T, programs=3)  # neither stride is 1: read from a copy

    knee_module.FULL_SORT_BELOW = 0
    loss_kernels.TILE = 64
    teacher, student = (language_model_like(8, 200, seed, torch.float64) for seed in (3, 4))
    student[:4] = teacher[:4] + 0.1 * student[:4]
    student[1] = teacher[1]
    student[2], teacher[3] = 1.5, -2.0
    student[4] = -teacher[4]
    student[5, ::7], teacher[5, 3] = -torch.inf, torch.inf
    student[6, 199] = torch.nan
    teacher[7] = teacher[7].round()
    assert count_waits(student, teacher) == 5  # two for each order, one for the loss
    for name in ("dbild_rkl", "dbild_fkl"):
        compare_with_pairs(name, student, teacher)
    # Too far apart for products of exponentials: the kernels hand over to torch's logarithms.
    compare_with_pairs("dbild_rkl", 100 * student[:1], teacher[:1], atol=1e-8)


if __name__ == "__main__":
    main()
