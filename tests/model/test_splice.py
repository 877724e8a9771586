"""Splicing compared with a loop over samples that follows TinyLLaVA v1's rules one by one."""

import pytest
import torch

from tinyllava_switchkd.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from tinyllava_switchkd.model.splice import splice

WIDTH, TOKENS = 3, 4
EMBEDDING = torch.nn.Embedding(50, WIDTH)


def oracle(input_ids, attention_mask, labels, features, max_length, padding_side):
    """For each sample: drop padding, put features at placeholders, truncate, pad."""
    placeholders = int(((input_ids == IMAGE_TOKEN_INDEX) & attention_mask.bool()).sum())
    dummies = 0 if features is None else len(features) - placeholders
    rows, next_image = [], 0
    for ids, mask, label in zip(input_ids, attention_mask, labels, strict=True):
        ids, label = ids[mask.bool()], label[mask.bool()]
        vectors, targets, visual = [], [], []
        for token, target in zip(ids.tolist(), label.tolist(), strict=True):
            if token == IMAGE_TOKEN_INDEX:
                vectors += list(features[next_image])
                targets += [IGNORE_INDEX] * TOKENS
                visual += [True] * TOKENS
                next_image += 1
            else:
                vectors.append(EMBEDDING.weight[token])
                targets.append(target)
                visual.append(False)
        if IMAGE_TOKEN_INDEX not in ids and placeholders and dummies:
            next_image += 1
        rows.append((vectors[:max_length], targets[:max_length], visual[:max_length]))
    longest = max(len(row[0]) for row in rows)
    out = {name: [] for name in ("inputs_embeds", "attention_mask", "position_ids", "labels", "image_mask")}
    for vectors, targets, visual in rows:
        pad, count = longest - len(vectors), len(vectors)

        def padded(values, fill, pad=pad):
            return [fill] * pad + values if padding_side == "left" else values + [fill] * pad

        out["inputs_embeds"].append(torch.stack(padded(vectors, torch.zeros(WIDTH))))
        out["attention_mask"].append(torch.tensor(padded([1] * count, 0)))
        out["position_ids"].append(torch.tensor(padded(list(range(count)), 0)))
        out["labels"].append(torch.tensor(padded(targets, IGNORE_INDEX)))
        out["image_mask"].append(torch.tensor(padded(visual, False)))
    return {name: torch.stack(value) for name, value in out.items()}


def batch(seed, counts, length=9, side="right"):
    """Random ids with `counts[b]` placeholders in sample b, and random padding."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 50, (len(counts), length), generator=generator)
    mask = torch.ones_like(ids)
    for row, count in enumerate(counts):
        pad = int(torch.randint(0, 3, (), generator=generator))
        if pad:
            mask[row, -pad:] = 0
        if side == "left":
            mask[row] = mask[row].flip(0)
        places = mask[row].nonzero()[:, 0]
        chosen = places[torch.randperm(len(places), generator=generator)[:count]]
        ids[row, chosen] = IMAGE_TOKEN_INDEX
    labels = torch.where(torch.rand(ids.shape, generator=generator) < 0.5, ids.clamp(min=0), IGNORE_INDEX)
    return ids, mask, labels


@pytest.mark.parametrize("side_in", ["left", "right"])
@pytest.mark.parametrize("side_out", ["left", "right"])
@pytest.mark.parametrize("max_length", [None, 7])
@pytest.mark.parametrize(
    ("counts", "images"),
    [
        ([1, 1, 1], 3),  # one each
        ([2, 0, 1], 3),  # several images, a text-only sample without a dummy
        ([2, 0, 1], 4),  # v1: the text-only sample owns a dummy
        ([0, 1, 0, 3], 6),
        ([0, 0], 1),  # a text-only batch with its dummy
        ([0, 0], 2),  # v1's text-only batch
        ([3], 3),
    ],
)
def test_equals_the_loop(counts, images, max_length, side_out, side_in):
    ids, mask, labels = batch(len(counts) + images, counts, side=side_in)
    features = torch.randn(images, TOKENS, WIDTH)
    got = splice(ids, mask, labels, features, EMBEDDING, max_length=max_length, padding_side=side_out)
    expected = oracle(ids, mask, labels, features, max_length, side_out)
    for name, value in expected.items():
        assert torch.equal(getattr(got, name), value), name


def test_text_without_images_or_mask_or_labels():
    ids = torch.tensor([[1, 2, 3]])
    got = splice(ids, None, None, None, EMBEDDING)
    assert torch.equal(got.inputs_embeds, EMBEDDING(ids))
    assert got.attention_mask.tolist() == [[1, 1, 1]] and got.position_ids.tolist() == [[0, 1, 2]]
    assert (got.labels == IGNORE_INDEX).all() and not got.image_mask.any()


@pytest.mark.parametrize(("counts", "images"), [([1, 1], 1), ([1, 0], 3), ([2], 3), ([1], 0)])
def test_wrong_number_of_images_is_refused(counts, images):
    ids, mask, labels = batch(0, counts)
    features = torch.randn(images, TOKENS, WIDTH) if images else None
    with pytest.raises(ValueError, match=rf"{sum(counts)} image placeholders.*{images} images"):
        splice(ids, mask, labels, features, EMBEDDING)


def test_dummy_images_stay_in_the_graph_with_zero_gradient():
    ids, mask, labels = batch(3, [0, 0])
    features = torch.full((1, TOKENS, WIDTH), torch.inf).requires_grad_()  # 0 * inf must not become NaN
    got = splice(ids, mask, labels, features, EMBEDDING)
    got.inputs_embeds.sum().backward()
    assert torch.equal(features.grad, torch.zeros_like(features))


def test_gradients_reach_features_and_embeddings():
    ids, mask, labels = batch(5, [1, 2])
    features = torch.randn(3, TOKENS, WIDTH, requires_grad=True)
    splice(ids, mask, labels, features, EMBEDDING).inputs_embeds.sum().backward()
    assert torch.equal(features.grad, torch.ones_like(features))


def test_padding_side_is_checked():
    with pytest.raises(ValueError, match="'middle'"):
        splice(torch.tensor([[1]]), None, None, None, EMBEDDING, padding_side="middle")
