import json
from pathlib import Path

import numpy as np
import pytest
import torch

from tinyllava_switchkd.distill import LogitLoss, LossFactory, register_loss
from tinyllava_switchkd.distill.losses import pairs

from . import oracle

FIXTURES = Path(__file__).parents[1] / "fixtures" / "dbild"
CASES = json.loads((FIXTURES / "cases.json").read_text())
PAIR_LOSSES = ("dbild_rkl", "dbild_fkl", "bild_rkl", "bild_fkl")
ALL = (*PAIR_LOSSES, "rkl", "fkl")


@pytest.fixture(params=["products", "logarithms"])
def arithmetic(request, monkeypatch):
    """Products of exponentials with the closed-form gradient, and the logsumexp form for extreme logits."""
    if request.param == "logarithms":
        monkeypatch.setattr(pairs, "LINEAR_RANGE", -1.0)
    return request.param


def random_logits(tokens=7, vocab=40, seed=0, scale=3.0):
    generator = torch.Generator().manual_seed(seed)
    student, teacher = scale * torch.randn(2, tokens, vocab, generator=generator, dtype=torch.float64)
    return student, teacher


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
def test_published_vectors(arithmetic, case, name):
    vectors = np.load(FIXTURES / "vectors.npz")
    student = torch.tensor(vectors[f"{case['name']}.student"], requires_grad=True)
    teacher = torch.tensor(vectors[f"{case['name']}.teacher"])
    loss = LossFactory(name)(temperature=case["temperature"])(student, teacher)
    np.testing.assert_allclose(loss.detach().numpy(), vectors[f"{case['name']}.{name}"], rtol=0, atol=1e-8)
    loss.sum().backward()
    expected = f"{case['name']}.{name}.grad_student"
    if expected in vectors:  # made by finite differences
        np.testing.assert_allclose(student.grad.numpy(), vectors[expected], rtol=0, atol=1e-8)


@pytest.mark.parametrize("name", PAIR_LOSSES)
@pytest.mark.parametrize("tau", [0.7, 3.0])
def test_value_and_gradient_equal_pair_enumeration(arithmetic, name, tau):
    student, teacher = random_logits()
    teacher[3] = student[3] * 2 + 1  # same order, other spread
    student[4] = -teacher[4]  # opposite order
    student[5] = student[5].round()
    ours, theirs = student.clone().requires_grad_(), student.clone().requires_grad_()
    values = LossFactory(name)(temperature=tau)(ours, teacher)
    reverse, top_k = name.endswith("rkl"), 8 if name.startswith("bild") else None
    expected = oracle.logit_difference_loss(theirs, teacher, tau, reverse, top_k)
    assert torch.allclose(values, expected, rtol=1e-10, atol=1e-10)
    weights = torch.arange(1.0, 8.0, dtype=torch.float64)
    (values * weights).sum().backward()
    (expected * weights).sum().backward()
    assert torch.allclose(ours.grad, theirs.grad, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("name", ALL)
def test_gradcheck(arithmetic, name):
    student, teacher = random_logits(tokens=3, vocab=12)
    loss = LossFactory(name)(temperature=2.0)
    assert torch.autograd.gradcheck(lambda z: loss(z, teacher), student.requires_grad_())


@pytest.mark.parametrize("name", ALL)
def test_equal_logits_cost_nothing(name):
    student, _ = random_logits()
    student.requires_grad_()
    loss = LossFactory(name)()(student, student.detach().clone())
    loss.sum().backward()
    assert loss.abs().max() < 1e-14
    assert student.grad.abs().max() < 1e-14


@pytest.mark.parametrize("name", ALL)
def test_only_the_student_gets_a_gradient(name):
    student, teacher = (side.requires_grad_() for side in random_logits())
    LossFactory(name)()(student, teacher).sum().backward()
    assert student.grad is not None and student.grad.abs().sum() > 0
    assert teacher.grad is None


@pytest.mark.parametrize("name", PAIR_LOSSES)
def test_pair_losses_ignore_a_shift_of_all_logits(name):
    student, teacher = random_logits()
    loss = LossFactory(name)()
    assert torch.allclose(loss(student, teacher), loss(student + 5.0, teacher - 7.0), atol=1e-10)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-5)])
def test_low_precision_inputs_are_computed_safely(name, dtype, tolerance):
    """The loss of low-precision logits is the float64 loss of the same numbers, not a low-precision loss."""
    student, teacher = (side.to(dtype) for side in random_logits(vocab=500, scale=6.0))
    loss = LossFactory(name)()
    values = loss(student, teacher)
    assert values.dtype == torch.float32
    assert torch.allclose(values.double(), loss(student.double(), teacher.double()), rtol=tolerance, atol=tolerance)
    leaf = student.clone().requires_grad_()
    loss(leaf, teacher).sum().backward()
    assert leaf.grad.dtype == dtype and torch.isfinite(leaf.grad).all()


@pytest.mark.parametrize("name", ALL)
def test_constant_infinite_and_extreme_logits_are_defined(name):
    student, teacher = random_logits(tokens=6, vocab=64)
    teacher[0] = 2.0
    student[1] = -1.0
    teacher[2, 10:] = -torch.inf
    student[3, 5] = torch.inf
    student[4] *= 1e6
    teacher[5], student[5] = -torch.inf, -torch.inf
    student.requires_grad_()
    values = LossFactory(name)()(student, teacher)
    values.sum().backward()
    assert torch.isfinite(values).all() and (values > -1e-9).all()
    assert torch.isfinite(student.grad).all()
    assert student.grad[3, 5] == 0  # an infinite logit learns nothing


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("vocab", [64, 5000])
def test_a_broken_model_is_seen(name, vocab):
    """NaN anywhere in a token's logits makes its loss NaN, and no other's."""
    student, teacher = random_logits(tokens=4, vocab=vocab)
    student[1, 7] = torch.nan
    teacher[2, vocab - 1] = torch.nan
    values = LossFactory(name)()(student, teacher)
    assert torch.isnan(values).tolist() == [False, True, True, False]


def test_products_and_logarithms_agree_where_both_work(monkeypatch):
    student, teacher = random_logits(vocab=300, scale=80.0)
    by_products = LossFactory("dbild")(temperature=1.0)(student, teacher)
    monkeypatch.setattr(pairs, "LINEAR_RANGE", -1.0)
    assert torch.allclose(by_products, LossFactory("dbild")(temperature=1.0)(student, teacher), rtol=1e-9)


def test_dbild_is_reverse_kl_at_the_knee():
    assert LossFactory("dbild") is LossFactory("dbild_rkl")
    student, teacher = random_logits()
    assert torch.equal(
        LossFactory("dbild")()(student, teacher), LossFactory("DBiLD_RKL")(temperature=3.0)(student, teacher)
    )


def test_bild_takes_another_k():
    student, teacher = random_logits()
    values = LossFactory("bild_rkl")(temperature=3.0, top_k=5)(student, teacher)
    assert torch.allclose(values, oracle.logit_difference_loss(student, teacher, 3.0, True, 5), atol=1e-10)


def test_orders_given_by_the_caller_change_nothing():
    student, teacher = random_logits()
    loss = LossFactory("dbild")()
    given = loss(student, teacher, student_order=loss.order(student), teacher_order=loss.order(teacher))
    assert torch.equal(given, loss(student, teacher))


@pytest.mark.parametrize("name", ALL)
def test_no_tokens_give_no_losses(name):
    student = torch.zeros(0, 30, requires_grad=True)
    loss = LossFactory(name)()(student, torch.zeros(0, 30))
    assert loss.shape == (0,)
    loss.sum().backward()


def test_no_python_loop_over_tokens():
    """Time and calls must not grow with the number of tokens: count operator calls instead of seconds."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Count(TorchDispatchMode):
        calls = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.calls += 1
            return func(*args, **(kwargs or {}))

    calls = []
    for tokens in (4, 256):
        student, teacher = random_logits(tokens=tokens)
        with Count() as count:
            LossFactory("dbild")()(student.requires_grad_(), teacher).sum().backward()
        calls.append(count.calls)
    assert calls[0] == calls[1]


@pytest.mark.parametrize("tau", [0.0, -1.0, float("nan")])
def test_temperature_must_be_positive(tau):
    with pytest.raises(ValueError, match="positive"):
        LossFactory("dbild")(temperature=tau)


def test_unequal_shapes_are_refused():
    with pytest.raises(ValueError, match=r"\(3, 10\).*\(3, 11\)"):
        LossFactory("dbild")()(torch.zeros(3, 10), torch.zeros(3, 11))


def test_unknown_loss_lists_the_known_ones():
    with pytest.raises(ValueError, match=r"'dbidl'.*dbild_rkl"):
        LossFactory("dbidl")


def test_a_loss_of_ones_own():
    @register_loss("test_mse")
    class MSE(LogitLoss):
        def forward(self, student_logits, teacher_logits, *, student_order=None, teacher_order=None):
            return ((student_logits - teacher_logits) / self.temperature).square().mean(-1)

    student, teacher = random_logits()
    assert LossFactory("test_mse")(temperature=2.0)(student, teacher).shape == (7,)
    with pytest.raises(ValueError, match="override=True"):
        register_loss("test_mse")(torch.nn.MSELoss)
