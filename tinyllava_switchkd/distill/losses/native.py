"""The CPU kernels in `native.c`: the knee and the pair KL of float32 logits, one token at a time.

torch's operations take some hundred passes over [tokens, k] buffers; these kernels finish a token while its numbers are
in the cache. The machine's C compiler compiles them on first use, which takes about a second. Without a compiler, and
for other dtypes and settings, torch's operations are used. Tokens are distributed over threads.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from .knee import Order, as_order, leading

COMPILER = os.environ.get("CC", "cc")
FLAGS = ("-O3", "-march=native", "-ffp-contract=off", "-fno-math-errno", "-shared", "-fPIC")

Value = Tensor | int | float | None
"""A field of a kernel's job: the address of a tensor (None for no tensor), an int64 or a double."""


@lru_cache(maxsize=1)
def library() -> ctypes.CDLL:
    """Compile and load `native.c` for this process.

    Raises:
        OSError: there is no compiler, or the library cannot be loaded.
        subprocess.CalledProcessError: the compiler failed.
    """
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder, "native.so")
        command = [*COMPILER.split(), *FLAGS, "-o", str(made), str(Path(__file__).with_name("native.c")), "-lm"]
        subprocess.run(command, check=True, capture_output=True)
        return ctypes.CDLL(str(made))


class _Rows(ctypes.Structure):
    """The first fields of a kernel's job; `_run` adds the others, in the layout of native.c."""

    _fields_ = (("next", ctypes.c_int64), ("rows", ctypes.c_int64), ("failed", ctypes.c_int64))


def knees(logits: Tensor) -> Order:
    """The logits up to the knee, bit for bit as from `knee.leading(logits)`.

    Args:
        logits: [tokens, vocab], float32.
    """
    logits = logits if logits.stride(1) == 1 else logits.contiguous()
    tokens, vocab = logits.shape
    columns = torch.empty(tokens, vocab, dtype=torch.int32)  # only the written part takes memory
    k = torch.empty(tokens, dtype=torch.int64)
    threshold, low, high = torch.empty(3, tokens)
    _run("leading", tokens, logits.stride(0), vocab, logits, columns, k, threshold, low, high)
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

    None if scaled logits differ by more than `most`, whose exponentials would exceed float64, or if one is NaN.
    """
    student, teacher = (side if side.stride(1) == 1 else side.contiguous() for side in (student, teacher))
    tokens, vocab = student.shape
    bounds = torch.stack([bound for order in orders for bound in (order.low, order.high)], 1).float().contiguous()
    loss = torch.zeros(tokens, dtype=torch.float64)
    gradients = [torch.empty(order.indices.shape) for order in orders] if needs_gradient else []
    leads = _leads([order.indices for order in orders], [order.k for order in orders], gradients or [None, None])
    strides = student.stride(0), teacher.stride(0)
    sides = vocab, int(reverse), *strides, student, teacher
    done = _run("pairs", tokens, *sides, *leads, bounds, float(temperature), float(most), loss)
    return (loss, gradients) if done else None


def spread(
    out: Tensor, factors: Tensor, indices: Sequence[Tensor], ks: Sequence[Tensor], gradients: Sequence[Tensor]
) -> bool:
    """Fill `out` [tokens, vocab] with the sum of both orders' gradients, each at its indices, times `factors` [tokens].

    In each row of `indices` and of a gradient [tokens, width], the first k entries count (`ks` [tokens]).
    """
    return _run("spread", len(out), out.shape[1], *_leads(indices, ks, gradients), factors.contiguous(), out)


def _leads(indices: Sequence[Tensor], ks: Sequence[Tensor], gradients: Sequence[Tensor | None]) -> list[Value]:
    leads: list[Value] = []
    for index, k, gradient in zip(indices, ks, gradients, strict=True):
        leads += [index.shape[1], index.contiguous(), k.contiguous(), gradient]
    return leads


def _run(kernel: str, tokens: int, *values: Value) -> bool:
    """Run a kernel over all tokens, on as many threads as torch uses; False if it cannot compute the result.

    Args:
        kernel: a function of native.c.
        tokens: number of rows.
        values: the other fields of the kernel's job.
    """
    kinds = {int: ctypes.c_int64, float: ctypes.c_double}
    fields = [(f"value{i}", kinds.get(type(value), ctypes.c_void_p)) for i, value in enumerate(values)]
    job = type("Job", (ctypes.Structure,), {"_fields_": [("rows", _Rows), *fields]})(_Rows(0, tokens, 0))
    for (name, _), value in zip(fields, values, strict=True):
        setattr(job, name, value.data_ptr() if isinstance(value, Tensor) else value)
    function, pointer = getattr(library(), kernel), ctypes.byref(job)
    threads = max(1, min(torch.get_num_threads(), tokens))
    team = _team()
    if threads == 1:
        function(pointer)
    elif team:  # torch's own threads; they wait busily, so others would compete with them for the cores
        team(function, pointer, ctypes.c_uint(threads), ctypes.c_uint(0))
    else:
        with ThreadPoolExecutor(threads) as pool:  # ctypes releases the GIL
            list(pool.map(function, [pointer] * threads))
    if job.rows.failed == 1:
        raise MemoryError("The loss's kernels could not allocate memory for a token's logits.")
    return not job.rows.failed


@lru_cache(maxsize=1)
def _team() -> Callable | None:
    """GOMP_parallel of the OpenMP library that torch has loaded; None if there is none."""
    try:
        loaded = Path("/proc/self/maps").read_text(encoding="utf-8").splitlines()
        paths = [line.split(maxsplit=5)[-1] for line in loaded if "libgomp" in line or "libiomp" in line]
        return ctypes.CDLL(paths[0]).GOMP_parallel
    except (OSError, AttributeError, IndexError):
        return None


def check(like: Tensor) -> None:
    """Compare the compiled kernels with torch's operations.

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
        raise RuntimeError("as compiled here, the knee's kernel finds other logits than torch's operations")
    student, teacher = z[:2], z[:2].flip(1) * 1.5
    orders = leading(student, kernels=False), leading(teacher, kernels=False)
    for reverse in (True, False):
        result = logit_difference_kl(student, teacher, orders, 3.0, reverse, True, LINEAR_RANGE)
        if result is None:
            raise RuntimeError("as compiled here, the loss's kernel refuses logits that are close together")
        loss, gradients = result
        expected, slopes = by_blocks(student, teacher, orders, 3.0, reverse, True)
        agree = [torch.allclose(loss, expected, rtol=1e-9, atol=1e-12)]
        agree += [torch.allclose(a, b, rtol=1e-5, atol=1e-9) for a, b in zip(gradients, slopes, strict=True)]
        dense, factors = torch.zeros_like(student), torch.tensor([2.0, -0.5])
        for order, slope in zip(orders, slopes, strict=True):
            dense.scatter_add_(1, order.indices, slope * factors[:, None])
        found = torch.empty_like(dense)
        spread(found, factors, [order.indices for order in orders], [order.k for order in orders], gradients)
        agree.append(torch.allclose(found, dense, rtol=1e-5, atol=1e-9))
        if not all(agree):
            raise RuntimeError("as compiled here, the loss's kernel computes another loss than torch's operations")
