"""The C kernels compared with torch's operations, on typical and on difficult logits."""

import importlib
import logging
import shutil

import pytest
import torch

from tests.distill.test_knee import assert_same_order, hard_rows, language_model_like
from tinyllava_switchkd.distill import LossFactory, knee
from tinyllava_switchkd.distill.losses import native

knee_module = importlib.import_module("tinyllava_switchkd.distill.losses.knee")
needs_compiler = pytest.mark.skipif(not shutil.which(native.COMPILER.split()[0]), reason="needs a C compiler")


@pytest.fixture
def with_kernels(monkeypatch):
    """Use the kernels for any number of logits, and fail if they fall back to torch."""
    monkeypatch.setattr(knee_module, "NATIVE_FROM", 0)
    monkeypatch.setattr(knee_module, "BACKEND", "triton")
    yield
    assert knee_module.BACKEND == "triton", "the kernels failed and torch stepped in"


@pytest.fixture(params=[1, 2, 3])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@needs_compiler
def test_the_order_is_that_of_torch_bit_for_bit(with_kernels, threads):
    for z in (
        hard_rows(5003, torch.float32),
        hard_rows(8192, torch.float32)[:2],
        language_model_like(2, 151_936),
        language_model_like(3, 6000)[:, :5500],  # cut from a wider head
        language_model_like(3, 6000).T.contiguous().T,  # read from a copy
        language_model_like(1, 5000),
    ):
        assert_same_order(native.knees(z), knee_module.leading(z, kernels=False))


@needs_compiler
@pytest.mark.parametrize("name", ["dbild", "dbild_fkl", "bild_rkl", "bild_fkl"])
def test_losses_and_gradients_are_those_of_torch(with_kernels, threads, monkeypatch, name):
    teacher = hard_rows(5003, torch.float32)[[0, 1, 2, 4, 5, 6, 10]]
    student = 0.9 * teacher + language_model_like(len(teacher), 5003, seed=5) / 4
    for tau in (3.0, 0.02):  # the second goes through logarithms, in torch
        found = []
        for backend in ("triton", "torch"):
            monkeypatch.setattr(knee_module, "BACKEND", backend)
            leaf = student.clone().requires_grad_()
            values = LossFactory(name)(temperature=tau)(leaf, teacher)
            values.sum().backward()
            found.append((values.detach(), leaf.grad))
        monkeypatch.setattr(knee_module, "BACKEND", "triton")
        torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-6, atol=1e-7, equal_nan=True)
        torch.testing.assert_close(found[0][1], found[1][1], rtol=1e-5, atol=1e-8, equal_nan=True)


@needs_compiler
def test_a_nan_is_seen(with_kernels):
    teacher, student = language_model_like(3, 5000), language_model_like(3, 5000, seed=1)
    student[1, 7] = torch.nan
    teacher[2, 4999] = torch.nan
    assert LossFactory("dbild")()(student, teacher).isnan().tolist() == [False, True, True]


@needs_compiler
def test_kernels_are_used_for_many_logits(monkeypatch):
    called = []
    monkeypatch.setattr(native, "knees", lambda z: called.append(len(z)) or knee_module.leading(z, kernels=False))
    monkeypatch.setattr(knee_module, "BACKEND", "triton")
    knee(language_model_like(2, 151_936))
    knee(language_model_like(2, 5000))  # too few to be worth it
    assert called[-1:] == [2] and called.count(2) == 1


@pytest.mark.parametrize("compiler", ["there-is-no-such-compiler", "false"])
def test_training_goes_on_without_a_compiler(monkeypatch, caplog, compiler):
    z = language_model_like(2, 151_936)
    expected = knee_module.leading(z, kernels=False)
    monkeypatch.setattr(native, "COMPILER", compiler)
    monkeypatch.setattr(knee_module, "BACKEND", "triton")
    monkeypatch.setattr(knee_module, "_checked", set())
    native.library.cache_clear()
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert_same_order(knee_module.leading(z), expected)
    [record] = caplog.records
    assert "C kernels cannot run" in record.message
    native.library.cache_clear()
