import inspect
import json
from pathlib import Path
from types import UnionType
from typing import Literal, get_args, get_origin, get_type_hints

import numpy as np
import pytest
import torch

from tests.distill import oracle
from tinyllava_switchkd.distill import LogitLoss, LossFactory, register_loss
from tinyllava_switchkd.distill.losses import pairs

FIXTURES = Path(__file__).parents[1] / "fixtures" / "dbild"
CASES = json.loads((FIXTURES / "cases.json").read_text())
PAIR_LOSSES = ("dbild_rkl", "dbild_fkl", "bild_rkl", "bild_fkl")
PUBLISHED = (*PAIR_LOSSES, "rkl", "fkl")
VOCABULARY_LOSSES = ("rkl", "fkl", "jsd", "skew_fkl", "skew_rkl", "tvd")
ALL = (*PAIR_LOSSES, *VOCABULARY_LOSSES)
SETTINGS = [
    {"knee_window": 0, "knee_on": "probabilities"},
    {"knee_window": 20},
    {"knee_window": 20, "knee_on": "probabilities", "pairs": "row"},
    {"knee_window": 10**6},
    {"pairs": "row"},
]


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


@pytest.mark.parametrize("name", PUBLISHED)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
def test_published_vectors(arithmetic, case, name):
    vectors = np.load(FIXTURES / "vectors.npz")
    student = torch.tensor(vectors[f"{case['name']}.student"], requires_grad=True)
    teacher = torch.tensor(vectors[f"{case['name']}.teacher"])
    loss = LossFactory(name)(temperature=case["temperature"])(student, teacher)
    np.testing.assert_allclose(loss.detach().numpy(), vectors[f"{case['name']}.{name}"], rtol=0, atol=1e-8)
    loss.sum().backward()
    expected = f"{case['name']}.{name}.grad_student"
    if expected in vectors:  # computed by finite differences
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


@pytest.mark.parametrize("name", ["dbild", "dbild_fkl"])
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_what_the_paper_leaves_open_equals_enumeration(name, settings):
    student, teacher = random_logits(vocab=60)
    teacher[3] = student[3] * 2 + 1
    student[4] = -teacher[4]
    student[5] = student[5].round()
    ours, theirs = student.clone().requires_grad_(), student.clone().requires_grad_()
    values = LossFactory(name)(temperature=0.7, **settings)(ours, teacher)
    expected = oracle.logit_difference_loss(
        theirs,
        teacher,
        0.7,
        reverse=name == "dbild",
        window=settings.get("knee_window", 0),
        on_softmax=settings.get("knee_on") == "probabilities",
        kl=oracle.row_kl if settings.get("pairs") == "row" else oracle.pair_kl,
    )
    assert torch.allclose(values, expected, rtol=1e-10, atol=1e-10)
    weights = torch.arange(1.0, 8.0, dtype=torch.float64)
    (values * weights).sum().backward()
    (expected * weights).sum().backward()
    assert torch.allclose(ours.grad, theirs.grad, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("settings", SETTINGS[:3] + SETTINGS[4:], ids=str)
def test_every_setting_makes_another_loss(settings):
    student, teacher = random_logits(vocab=60)
    as_written = LossFactory("dbild")(temperature=0.7)(student, teacher)
    assert not torch.allclose(LossFactory("dbild")(temperature=0.7, **settings)(student, teacher), as_written)


def test_a_window_of_the_vocabulary_is_the_vocabulary():
    student, teacher = random_logits(vocab=60)
    values = LossFactory("dbild")(knee_window=60)(student, teacher)
    assert torch.equal(values, LossFactory("dbild")()(student, teacher))


@pytest.mark.parametrize("settings", [{}, *SETTINGS], ids=str)
def test_pair_losses_handle_extreme_logits(settings):
    """Constant, infinite and extreme logits, a real vocabulary in bfloat16, NaN, and no tokens."""
    student, teacher = random_logits(tokens=7, vocab=5000)
    teacher[0] = 2.0
    student[1] = -1.0
    teacher[2, 10:] = -torch.inf
    student[3, 5] = torch.inf
    student[4] *= 1e6
    teacher[5], student[5] = -torch.inf, -torch.inf
    loss = LossFactory("dbild")(**settings)
    leaf = student.bfloat16().requires_grad_()
    values = loss(leaf, teacher.bfloat16())
    values.sum().backward()
    assert torch.isfinite(values).all() and (values > -1e-9).all()
    assert torch.isfinite(leaf.grad).all() and leaf.grad[3, 5] == 0
    exact = loss(leaf.detach().double(), teacher.bfloat16().double())
    assert torch.allclose(values.double(), exact, rtol=1e-5, atol=1e-5)
    student[6, 7] = torch.nan
    assert loss(student, teacher).isnan().tolist() == [False] * 6 + [True]
    assert loss(student[:0], teacher[:0]).shape == (0,)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        *((name, {}) for name in ("fkl", "rkl", "tvd")),
        *(("jsd", {"beta": beta}) for beta in (0.1, 0.5, 0.8)),
        *((name, {"alpha": alpha}) for name in ("skew_fkl", "skew_rkl") for alpha in (0.0, 0.1, 0.9)),
    ],
    ids=str,
)
def test_vocabulary_losses_equal_their_definition(name, settings):
    """Values by loops over probabilities, gradients by their central differences, in float64."""
    share = next(iter(settings.values()), 0.0)
    student, teacher = random_logits(tokens=3, vocab=11)
    loss = LossFactory(name)(temperature=2.0, **settings)
    leaf = student.clone().requires_grad_()
    values = loss(leaf, teacher)
    values.sum().backward()
    step = 1e-5
    for row in range(3):
        expected = oracle.vocabulary_loss(name, student[row], teacher[row], 2.0, share)
        assert values[row].item() == pytest.approx(expected, rel=1e-10)
        for column in range(11):
            ends = []
            for sign in (1, -1):
                moved = student[row].clone()
                moved[column] += sign * step
                ends.append(oracle.vocabulary_loss(name, moved, teacher[row], 2.0, share))
            assert leaf.grad[row, column].item() == pytest.approx((ends[0] - ends[1]) / 2 / step, abs=1e-8)


def test_mixtures_have_their_known_special_cases():
    student, teacher = random_logits()
    for skewed, plain in (("skew_fkl", "fkl"), ("skew_rkl", "rkl")):
        assert torch.equal(LossFactory(skewed)(alpha=0.0)(student, teacher), LossFactory(plain)()(student, teacher))
    jsd = LossFactory("jsd")(beta=0.2)
    assert torch.allclose(jsd(student, teacher), LossFactory("jsd")(beta=0.8)(teacher, student), rtol=1e-12)
    near = LossFactory("jsd")(beta=1e-6)(student, teacher) / 1e-6
    assert torch.allclose(near, LossFactory("fkl")()(student, teacher), rtol=1e-3)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("jsd", {"beta": 0.0}),
        ("jsd", {"beta": 1.0}),
        ("jsd", {"beta": float("nan")}),
        ("skew_fkl", {"alpha": -0.1}),
        ("skew_rkl", {"alpha": 1.0}),
        ("skew_rkl", {"alpha": float("nan")}),
        ("bild_fkl", {"top_k": 1}),
        ("dbild", {"knee_window": 1}),
        ("dbild", {"knee_window": -256}),
        ("dbild", {"knee_on": "softmax"}),
        ("dbild_fkl", {"pairs": "column"}),
        ("tvd", {"temperature": float("inf")}),
    ],
    ids=str,
)
def test_settings_out_of_range_are_refused(name, settings):
    [(setting, value)] = settings.items()
    with pytest.raises(ValueError, match=f"{setting}.*{value}"):
        LossFactory(name)(**settings)


@pytest.mark.parametrize("name", LossFactory.list())
def test_settings_are_typed_and_described(name):
    """Flags and docs are made from the signature and the docstring of every registered loss."""
    kind = LossFactory(name)
    hints = get_type_hints(kind.__init__)
    described = inspect.getdoc(kind).partition("Args:")[2].partition("Raises:")[0]
    for setting, parameter in list(inspect.signature(kind).parameters.items()):
        assert parameter.default is not parameter.empty, setting
        alternatives = get_args(hints[setting]) if get_origin(hints[setting]) is UnionType else (hints[setting],)
        assert all(get_origin(a) is Literal or a in (int, float, str, bool, type(None)) for a in alternatives), setting
        assert f"\n    {setting}: " in described, setting
    assert described.count("\n    ") == len(inspect.signature(kind).parameters)


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
    """A NaN in a token's logits makes its loss NaN, and only its loss."""
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
    """The number of operator calls must not grow with the number of tokens."""
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
