"""Helpers for tests of checkpoints: a sample, and writers of the layouts."""

import torch

from tests.tiny import tiny_tokenizer
from tinyllava_switchkd.model import save_pretrained_model

PIXELS = torch.randn(1, 3, 28, 28, generator=torch.Generator().manual_seed(0))
IDS = torch.tensor([[1, -200, 2, 3, 4]])


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS, images=PIXELS).logits


def save(model, folder, **kwargs):
    save_pretrained_model(model, tiny_tokenizer(), model.vision_tower.image_processor, folder, **kwargs)
    return folder


def write_v1_split(model, folder, rename=lambda name: name):
    """v1's pre-training layout: a folder of pickled weights per part, names from named_parameters (no tied head)."""
    parts = {
        "language_model": model.language_model,
        "vision_tower": model.vision_tower.vision_tower,
        "connector": model.connector,
    }
    for name, part in parts.items():
        (folder / name).mkdir(parents=True)
        torch.save(
            {rename(key): value.data for key, value in part.named_parameters()}, folder / name / "pytorch_model.bin"
        )
    model.config.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder
