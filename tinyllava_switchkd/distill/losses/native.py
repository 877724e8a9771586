"""The kernels of `native.c` for the CPU: the knee and the pair KL of float32 logits, a token at a time.

What torch's operations do in some hundred passes over [tokens, k] buffers, these do while a token's numbers are in the
cache. The C compiler of the machine makes them on first use, which takes about a second; where there is none, torch's
operations do the work, as they do for other dtypes and settings. Threads share the tokens.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from .knee import Order, as_order, leading

COMPILER = os.environ.get("CC", "cc")
FLAGS = ("-O3", "-march=native", "-ffp-contract=off", "-fno-math-errno", "-shared", "-fPIC")


@lru_cache(maxsize=1)
def library() -> ctypes.CDLL:
    """The compiled `native.c`, of this process alone.

    Raises:
        OSError: there is no compiler, or what it made can't be loaded.
        subprocess.CalledProcessError: the compiler failed.
    """
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder, "native.so")
        command = [*COMPILER.split(), *FLAGS, "-o", str(made), str(Path(__file__).with_name("native.c")), "-lm"]
        subprocess.run(command, check=True, capture_output=True)
        return ctypes.CDLL(str(made))


def knees(logits: Tensor) -> Order:
    """The logits up to the knee; the same as `knee.leading(logits)`, bit for bit.

    Args:
        logits: [tokens, vocab], float32.
    """
    logits = logits if logits.stride(1) == 1 else logits.contiguous()
    tokens, vocab = logits.shape
    columns = torch.empty(tokens, vocab, dtype=torch.int32)  # of which memory only what is written is taken
    k = torch.empty(tokens, dtype=torch.int64)
    threshold, low, high = torch.empty(3, tokens)
    sizes = (ctypes.c_long(logits.stride(0)), ctypes.c_long(vocab))
    out = tuple(map(_address, (columns, k, threshold, low, high)))
    _share(tokens, lambda start, stop: library().leading(_address(logits), *sizes, start, stop, *out))
    return as_order(columns[:, : int(k.max())], k, threshold, low, high)


def logit_difference_kl(
    student: Tensor,
    teacher: Tensor,
    orders: tuple[Order, Order],
    temperature: float,
    reverse: bool,
    needs_gradient: bool,
    most: float,
) -> tuple[Tensor, list[Tensor]] | None:
    """Loss [tokens] in float64 and, for every order, its gradient by the student's logits at `order.indices`.

    None if scaled logits lie further apart than `most` or one is NaN: exponentials would leave the range of float64.
    """
    student, teacher = (side if side.stride(1) == 1 else side.contiguous() for side in (student, teacher))
    tokens = len(student)
    bounds = torch.stack([bound for order in orders for bound in (order.low, order.high)], 1).float().contiguous()
    sides = (_address(student), _address(teacher), ctypes.c_long(student.stride(0)), ctypes.c_long(teacher.stride(0)))
    loss = torch.zeros(tokens, dtype=torch.float64)
    gradients = []
    for order in orders:
        indices, k = order.indices.contiguous(), order.k.contiguous()
        gradient = torch.empty(indices.shape) if needs_gradient else None
        gradients.append(gradient)
        fixed = (_address(indices), _address(k), ctypes.c_long(indices.shape[1]), _address(bounds))
        numbers = (ctypes.c_double(temperature), int(reverse), ctypes.c_double(most))
        out = (_address(loss), _address(gradient))

        def run(start: ctypes.c_long, stop: ctypes.c_long, fixed: tuple = (*sides, *fixed, *numbers), out: tuple = out):
            return library().pairs(*fixed, start, stop, *out)

        if not _share(tokens, run):
            return None
    return loss, gradients if needs_gradient else []


def _address(tensor: Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())


def _share(tokens: int, run: Callable[[ctypes.c_long, ctypes.c_long], int]) -> bool:
    """Run a kernel over all tokens, on as many threads as torch uses. False where it hands the work back (2)."""
    threads = max(1, min(torch.get_num_threads(), tokens))
    bounds = [ctypes.c_long(tokens * i // threads) for i in range(threads + 1)]
    if threads == 1:
        codes = [run(*bounds)]
    else:
        with ThreadPoolExecutor(threads) as pool:  # a kernel holds no lock of Python's
            codes = list(pool.map(run, bounds[:-1], bounds[1:]))
    if 1 in codes:
        raise MemoryError("The loss's kernels found no memory for a token's logits.")
    return 2 not in codes


def check(like: Tensor) -> None:
    """Compare the kernels, as compiled here, with torch's operations.

    Raises:
        RuntimeError: they disagree.
    """
    from .pairs import LINEAR_RANGE, by_blocks

    noise = (12.9898 * torch.arange(1, 80_001).double().view(4, -1)).sin().mul_(43758.5453)
    z = (1 - noise.frac().abs_()).log_().mul_(-2)
    z[1].mul_(4).round_().div_(4)
    z[2] = 1.5
    z[3, ::7], z[3, 5] = -torch.inf, torch.inf
    z = z.float()
    if not all(torch.equal(a, b) for a, b in zip(knees(z), leading(z, kernels=False), strict=True)):
        raise RuntimeError("as compiled here, the knee's kernel finds other logits than torch's operations do")
    student, teacher = z[:2], z[:2].flip(1) * 1.5
    orders = tuple(leading(side, kernels=False) for side in (student, teacher))
    for reverse in (True, False):
        loss, gradients = logit_difference_kl(student, teacher, orders, 3.0, reverse, True, LINEAR_RANGE)
        expected, slopes = by_blocks(student, teacher, orders, 3.0, reverse, True)
        agree = [torch.allclose(loss, expected, rtol=1e-9, atol=1e-12)]
        agree += [torch.allclose(a, b, rtol=1e-5, atol=1e-9) for a, b in zip(gradients, slopes, strict=True)]
        if not all(agree):
            raise RuntimeError("as compiled here, the loss's kernel computes another loss than torch's operations do")
