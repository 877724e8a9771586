import importlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.distill import oracle
from tinyllava_switchkd.distill import knee
from tinyllava_switchkd.distill.losses.knee import BINS, finite, leading

FIXTURES = Path(__file__).parents[1] / "fixtures" / "dbild"
knee_module = importlib.import_module("tinyllava_switchkd.distill.losses.knee")
CASES = json.loads((FIXTURES / "cases.json").read_text())


@pytest.fixture(params=["full sort", "histogram"])
def route(request, monkeypatch):
    """Both implementations of the knee must give the same result on every input."""
    monkeypatch.setattr(knee_module, "FULL_SORT_BELOW", 10**9 if request.param == "full sort" else 0)
    return request.param


def language_model_like(tokens: int, vocab: int, seed: int = 0, dtype=torch.float32) -> torch.Tensor:
    """Most logits in a bulk, and a few far above it."""
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(tokens, vocab, generator=generator)
    logits[:, : vocab // 500 + 1] += 15 * torch.rand(tokens, vocab // 500 + 1, generator=generator)
    return logits.to(dtype)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
@pytest.mark.parametrize("side", ["teacher", "student"])
def test_knee_agrees_with_the_published_vectors(route, case, side):
    vectors = np.load(FIXTURES / "vectors.npz")
    k = knee(torch.tensor(vectors[f"{case['name']}.{side}"]))
    assert k.tolist() == vectors[f"{case['name']}.k_{side}"].tolist()


@pytest.mark.parametrize("vocab", [2, 3, 17, 1000])
@pytest.mark.parametrize("style", ["normal", "rounded", "one hot", "two values", "steep"])
def test_knee_agrees_with_the_definition(route, vocab, style):
    generator = torch.Generator().manual_seed(vocab)
    z = torch.randn(12, vocab, generator=generator, dtype=torch.float64)
    if style == "rounded":
        z = (4 * z).round() / 4
    elif style == "one hot":
        z = torch.nn.functional.one_hot(torch.arange(12) % vocab, vocab).double()
    elif style == "two values":
        z = (z > 0.3).double()
    elif style == "steep":
        z = torch.exp(3 * z)
    assert knee(z).tolist() == [oracle.knee(row) for row in z]


@pytest.mark.parametrize(("window", "temperature"), [(0, 3.0), (100, None), (100, 0.5), (4000, 3.0)])
def test_knee_of_a_window_and_of_probabilities_agree_with_the_definition(route, window, temperature):
    z = language_model_like(5, 3000, dtype=torch.float64)
    z[1] = (4 * z[1]).round() / 4
    z[2] *= 30
    z[3] /= 1000
    z[4, 7] = 1e4
    expected = [oracle.knee(row, window, temperature) for row in z]
    assert knee(z, window=window, temperature=temperature).tolist() == expected
    order = leading(z, window=window, temperature=temperature)
    for row, k in enumerate(expected):
        by_hand = z[row].argsort(descending=True, stable=True)[:k]
        assert order.indices[row, order.mask[row]].tolist() == by_hand.tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_histogram_and_full_sort_agree_at_real_vocabulary(monkeypatch, dtype):
    z = language_model_like(4, 151_936, dtype=dtype)
    by_histogram = knee(z)
    monkeypatch.setattr(knee_module, "FULL_SORT_BELOW", 10**9)
    assert by_histogram.tolist() == knee(z).tolist()
    assert 1000 < by_histogram.float().mean() < 20_000  # method.md: in the thousands


def test_histogram_survives_one_logit_that_dwarfs_the_rest(route):
    z = language_model_like(3, 3 * BINS, dtype=torch.float64)
    z[:, 7] = 1e6  # nearly everything falls into one bin
    assert knee(z).tolist() == [oracle.knee(row) for row in z]


def test_constant_logits_have_two_leading_tokens(route):
    z = torch.full((3, 50), 1.5)
    assert knee(z).tolist() == [2, 2, 2]
    order = leading(z)
    assert order.indices[order.mask].tolist() == [0, 1] * 3


def test_infinite_logits_count_as_the_extreme_finite_ones(route):
    z = language_model_like(4, 600).double()
    masked = z.clone()
    masked[0, 5:9] = -torch.inf
    masked[1, 3] = torch.inf
    masked[2] = -torch.inf
    expected = z.clone()
    keep = torch.ones(600, dtype=torch.bool)
    keep[5:9] = False
    expected[0, 5:9] = z[0, keep].min()
    keep = torch.ones(600, dtype=torch.bool)
    keep[3] = False
    expected[1, 3] = z[1, keep].max()
    expected[2] = 0.0
    assert torch.equal(finite(masked), expected)
    assert knee(masked).tolist() == [oracle.knee(row) for row in expected]


def test_leading_orders_ties_by_vocabulary(route):
    z = torch.tensor([[1.0, 3.0, 2.0, 3.0, 2.0, 2.0, -1.0]]).double()
    order = leading(z, 4)
    assert order.indices[0, order.mask[0]].tolist() == [1, 3, 2, 4]
    assert order.threshold.tolist() == [2.0]


def test_leading_pads_ragged_rows(route):
    z = language_model_like(6, 800).double()
    z[2] *= 5
    order = leading(z)
    assert order.k.tolist() == knee(z).tolist() == order.mask.sum(1).tolist()
    for row in range(6):
        expected = z[row].argsort(descending=True, stable=True)[: order.k[row]]
        assert order.indices[row, order.mask[row]].tolist() == expected.tolist()


def hard_rows(vocab: int, dtype: torch.dtype) -> torch.Tensor:
    """One row of each kind that may go wrong."""
    z = language_model_like(11, vocab, dtype=torch.float64)
    z[1] = (4 * z[1]).round() / 4  # ties
    z[2] = -3.25  # constant
    z[3, vocab // 2] = torch.nan
    z[4, ::5], z[4, 8] = -torch.inf, torch.inf
    z[5] = -torch.inf
    z[6, 9] = 1e6  # dwarfs the rest
    z[7] = torch.where(z[7] > 1, 0.0, -0.0) + torch.where(z[7] > 2, 1.0, 0.0)  # signed zeros are ties
    z[8] *= 1e-32  # a range too small to be divided into bins
    z[9] *= 3e38 / z[9].abs().max()  # too large
    z[10] += 1000
    return z.to(dtype)


def assert_same_order(ours, theirs):
    for name, a, b in zip(ours._fields, ours, theirs, strict=True):
        assert a.dtype == b.dtype and torch.equal(a.nan_to_num(7.5), b.nan_to_num(7.5)), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocab", [300, 5003])
@pytest.mark.parametrize(
    "settings", [{"window": 99}, {"temperature": 3.0}, {"window": 2000, "temperature": 0.1}], ids=str
)
def test_window_and_probabilities_give_the_same_order_by_histogram(monkeypatch, vocab, dtype, settings):
    z = hard_rows(vocab, dtype)
    monkeypatch.setattr(knee_module, "FULL_SORT_BELOW", 10**9)
    expected = leading(z, **settings)
    monkeypatch.setattr(knee_module, "FULL_SORT_BELOW", 0)
    assert_same_order(leading(z, **settings), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("vocab", [300, 5003])
def test_histogram_and_full_sort_give_the_same_order(monkeypatch, vocab, dtype):
    z = hard_rows(vocab, dtype)
    monkeypatch.setattr(knee_module, "FULL_SORT_BELOW", 10**9)
    expected = leading(z)
    for row in (0, 1, 6, 7, 10):
        by_hand = z[row].double().sort(descending=True, stable=True)
        assert expected.k[row] == oracle.knee(z[row].double())
        assert expected.indices[row, expected.mask[row]].tolist() == by_hand.indices[: expected.k[row]].tolist()
    assert expected.indices[expected.mask][:2].tolist() != [0, 1]
    assert [expected.indices[row, :2].tolist() for row in (2, 3, 5)] == [[0, 1]] * 3
    monkeypatch.setattr(knee_module, "FULL_SORT_BELOW", 0)
    assert_same_order(leading(z), expected)
    monkeypatch.setattr(knee_module, "BLOCK_ELEMENTS", (1, 2 * vocab))  # the last block of rows is a short one
    assert_same_order(leading(z), expected)


def test_order_knows_the_finite_extremes(route):
    order = leading(hard_rows(300, torch.float32))
    assert order.low[2] == order.high[2] == -3.25
    assert order.low[3].isnan() and order.high[3].isnan()
    assert order.high[4] < 25 and order.low[4] > -25
    assert order.low[5] == order.high[5] == 0
    assert order.high[6] == 1e6


def test_logits_cut_from_a_wider_head_are_read_in_place(route):
    """A padded head's logits are sliced: rows are not contiguous."""
    z = language_model_like(3, 900)
    assert_same_order(leading(z[:, :700]), leading(z[:, :700].clone()))


def test_fixed_k_takes_the_first_of_the_ties(route):
    z = hard_rows(300, torch.float32)
    order = leading(z, 8)
    for row in (0, 1, 2, 6, 7):
        assert order.indices[row].tolist() == z[row].sort(descending=True, stable=True).indices[:8].tolist()
    assert order.k.tolist() == [8] * len(z) and order.mask.all()


def test_no_tokens_give_no_knees(route):
    assert knee(torch.zeros(0, 9)).shape == (0,)
    assert leading(torch.zeros(0, 9)).k.shape == (0,)


@pytest.mark.parametrize("shape", [(5,), (2, 3, 4), (4, 1)])
def test_wrong_shapes_are_refused(shape):
    with pytest.raises(ValueError, match=r"\[tokens, vocab\]"):
        knee(torch.zeros(shape))
