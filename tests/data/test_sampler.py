"""The sampling order: complete, seeded, with one modality and similar lengths in each step."""

import random
from collections import Counter

import pytest

from tinyllava_switchkd.data import LengthGroupedSampler


def lengths(count=1003, text_share=0.1, seed=0):
    rng = random.Random(seed)
    return [rng.randint(1, 500) * (-1 if rng.random() < text_share else 1) for _ in range(count)]


def sampler(values=None, **kwargs):
    settings = {"batch_size": 4, "world_size": 3, "group_by_modality": True, "gradient_accumulation_steps": 2}
    return LengthGroupedSampler(lengths=lengths() if values is None else values, **settings | kwargs)


def chunks(order, size):
    return [order[start : start + size] for start in range(0, len(order), size)]


def padding(order, values, size):
    batches = chunks(order, size)
    computed = sum(len(batch) * max(abs(values[index]) for index in batch) for batch in batches)
    return 1 - sum(map(abs, values)) / computed


@pytest.mark.parametrize("pool", [1, 5, 50])
@pytest.mark.parametrize("text_share", [0, 0.1, 1])
@pytest.mark.parametrize("count", [0, 1, 23, 24, 25, 1003])
def test_every_sample_once(count, text_share, pool):
    values = lengths(count, text_share)
    order = list(sampler(values, pool=pool))
    assert sorted(order) == list(range(count))
    assert len(sampler(values)) == count


def test_steps_are_of_one_modality_but_for_what_is_left_over():
    values = lengths()
    kinds = [{values[index] > 0 for index in step} for step in chunks(list(sampler(values)), 24)]
    whole = sum(sum(value * sign > 0 for value in values) // 24 for sign in (1, -1))
    assert all(len(kind) == 1 for kind in kinds[:whole])
    assert Counter(map(len, kinds[:whole]))[1] == whole
    assert {kind for step in kinds[:whole] for kind in step} == {True, False}
    assert len(kinds) - whole <= 2


def test_ranks_get_about_the_same():
    values = lengths()
    for pool in (1, 50):
        steps = chunks(list(sampler(values, pool=pool)), 24)[:-2]
        for step in steps:
            totals = [sum(abs(values[index]) for index in batch) for batch in chunks(step, 4)]
            assert max(totals) - min(totals) <= max(abs(values[index]) for index in step)


def test_pools_pad_less():
    values = lengths(5000)
    shuffled = random.Random(1).sample(range(5000), 5000)
    random_padding = padding(shuffled, values, 4)
    assert padding(list(sampler(values, pool=50)), values, 4) < 0.25 * random_padding


def test_order_depends_on_seed_and_epoch_only():
    def order(seed, epoch):
        made = sampler(seed=seed)
        made.set_epoch(epoch)
        return tuple(made)

    orders = {order(seed, epoch) for seed in (0, 1) for epoch in (0, 1, 2)}
    assert len(orders) == 6
    assert order(1, 2) == order(1, 2)
    again = sampler()
    assert list(again) == list(again)


def test_without_modality():
    values = [abs(value) for value in lengths()]
    order = list(sampler(values, group_by_modality=False))
    assert sorted(order) == list(range(len(values)))


@pytest.mark.parametrize(
    "kwargs, match",
    [
        ({"values": [1, 0]}, "positive"),
        ({"values": [1, -1], "group_by_modality": False}, "positive"),
    ],
)
def test_refused(kwargs, match):
    with pytest.raises(ValueError, match=match):
        sampler(**kwargs)
