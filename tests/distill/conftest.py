import pytest
import torch

from tests.tiny import VOCAB_SIZE, tiny_llava
from tinyllava_switchkd.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from tinyllava_switchkd.distill import LossFactory


@pytest.fixture(autouse=True)
def no_leftovers():
    """Remove losses that a test has registered."""
    with LossFactory.scope():
        yield


@pytest.fixture
def student():
    """A trainable student: 32 wide, its own vision tower."""
    model = tiny_llava(seed=1).train()
    model.requires_grad_(True)
    model.freeze_unused_parameters()
    return model


@pytest.fixture
def teacher():
    """A wider teacher with more layers and another vision tower of the same shape."""
    return tiny_llava(seed=2, text={"hidden": 48, "layers": 3})


def make_batch(*samples: str, seed: int = 0, image_size: int = 28) -> dict[str, torch.Tensor]:
    """A right-padded batch; each letter is a token: p prompt, a answer (supervised), i image."""
    generator = torch.Generator().manual_seed(seed)
    width = max(map(len, samples))
    ids = torch.randint(0, VOCAB_SIZE - 8, (len(samples), width), generator=generator)
    labels = torch.full_like(ids, IGNORE_INDEX)
    mask = torch.zeros_like(ids)
    for row, sample in enumerate(samples):
        mask[row, : len(sample)] = 1
        for column, letter in enumerate(sample):
            if letter == "i":
                ids[row, column] = IMAGE_TOKEN_INDEX
            elif letter == "a":
                labels[row, column] = ids[row, column]
    images = sum(sample.count("i") for sample in samples)
    pixels = torch.randn(max(images, 1), 3, image_size, image_size, generator=generator)
    if not images:
        pixels.zero_()
    return {"input_ids": ids, "labels": labels, "attention_mask": mask, "images": pixels}


def set_recompute(monkeypatch, distiller, recompute: bool) -> None:
    """Make a distiller recompute its chunks in the backward pass (as under ZeRO-3), or not."""
    monkeypatch.setattr(distiller, "recompute", recompute)


@pytest.fixture
def batch():
    """Images at different positions, two in one sample, a text-only sample, different lengths."""
    return make_batch("ippaaa", "pipppaapaaa", "pppaa", "iipaaaa")
