"""Parity with TinyLLaVA Factory v1 (transformers 4.40.1) on checkpoints that it wrote."""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open

from tinyllava_switchkd.data import ImagePreprocess
from tinyllava_switchkd.model import (
    TinyLlavaForConditionalGeneration,
    load_pretrained_model,
    save_pretrained_model,
)

UPSTREAM = Path(__file__).parents[1] / "fixtures" / "upstream"
CHECKPOINTS = ["ckpt_siglip_patch", "ckpt_clip_patch", "ckpt_split_siglip"]


def expectation(name):
    stored = np.load(UPSTREAM / f"{name}_expect.npz")
    return {key: torch.tensor(stored[key]) for key in stored}


def check(folder, expected):
    """Pixels, logits, loss and generated tokens of a checkpoint."""
    model, tokenizer, image_processor, context_len = load_pretrained_model(folder, device="cpu")
    image = Image.open(UPSTREAM / "image.png")
    pixels = ImagePreprocess(image_processor, model.config)(image)
    assert torch.equal(pixels, expected["pixel_values"])
    ids, labels = expected["input_ids"][None], expected["labels"][None]
    with torch.no_grad():
        output = model(input_ids=ids, labels=labels, attention_mask=torch.ones_like(ids), images=pixels[None])
    assert (output.logits[0] - expected["logits"]).abs().max() < 1e-4
    assert abs(output.loss.item() - expected["loss"].item()) < 1e-4
    if "gen" in expected:
        new = model.generate(expected["prompt_ids"][None], images=pixels[None], max_new_tokens=12, do_sample=False)
        assert torch.equal(new[0], expected["gen"])
    assert tokenizer.is_fast and tokenizer.pad_token == tokenizer.unk_token == "<|endoftext|>"
    assert context_len == 512
    return model, tokenizer, image_processor


@pytest.mark.parametrize("name", CHECKPOINTS)
@pytest.mark.parametrize("beside", ["alone", "beside their base folders", "base folders in the working directory"])
def test_parity(name, beside, tmp_path, monkeypatch):
    folder = tmp_path / "somewhere" / name
    shutil.copytree(UPSTREAM / name, folder)
    if beside != "alone":
        for base in ("qwen2-tiny", "siglip-tiny", "clip-tiny"):
            shutil.copytree(UPSTREAM / base, folder.parent / base)
    monkeypatch.chdir(folder.parent if "working" in beside else tmp_path)
    check(os.path.relpath(folder), expectation(name))


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_written_again_it_is_the_same(name, tmp_path):
    """Saved again: v1's keys in safetensors, self-contained, same outputs. Saved and loaded twice: same bytes."""
    model, tokenizer, image_processor = check(UPSTREAM / name, expectation(name))
    save_pretrained_model(model, tokenizer, image_processor, tmp_path / "once", template="qwen2_base")
    names = {path.name for path in (tmp_path / "once").iterdir()}
    assert {"config.json", "model.safetensors", "preprocessor_config.json", "tokenizer_config.json"} <= names
    assert not any(name.endswith(".bin") for name in names)
    again, *rest = check(tmp_path / "once", expectation(name))
    assert again.config.template == "qwen2_base"
    save_pretrained_model(again, *rest, tmp_path / "twice")
    for file in ("model.safetensors", "preprocessor_config.json", "config.json"):
        assert (tmp_path / "once" / file).read_bytes() == (tmp_path / "twice" / file).read_bytes(), file
    if name != "ckpt_split_siglip":
        with (
            safe_open(tmp_path / "once" / "model.safetensors", "pt") as ours,
            safe_open(UPSTREAM / name / "model.safetensors", "pt") as theirs,
        ):
            assert set(ours.keys()) == set(theirs.keys())
            assert all(torch.equal(ours.get_tensor(key), theirs.get_tensor(key)) for key in ours.keys())  # noqa: SIM118


def test_raw_state_dict_has_v1s_names():
    """A Trainer's resume calls load_state_dict itself: no renaming may be needed."""
    from safetensors.torch import load_file

    for name in ("ckpt_siglip_patch", "ckpt_clip_patch"):
        model = load_pretrained_model(UPSTREAM / name, device="cpu")[0]
        missing, unexpected = model.load_state_dict(load_file(UPSTREAM / name / "model.safetensors"), strict=False)
        assert missing == ["language_model.lm_head.weight"] and not unexpected  # tied


TRANSFORMERS4 = Path(__file__).parents[1] / "fixtures" / "transformers4"


@pytest.mark.parametrize(
    "folder", sorted(path.parent for path in TRANSFORMERS4.glob("*/expect.npz")), ids=lambda p: p.name
)
def test_parity_with_transformers_4(folder):
    """Other language models, towers, connectors, layers and strategies, written by the version that v1 pinned."""
    stored = np.load(folder / "expect.npz")
    expected = {key: torch.tensor(stored[key]) for key in stored}
    model = TinyLlavaForConditionalGeneration.from_pretrained(folder)
    ids, pixels = expected["input_ids"][None], expected["pixel_values"][None]
    with torch.no_grad():
        assert (model.encode_images(pixels)[0] - expected["features"]).abs().max() < 1e-4
        output = model(input_ids=ids, labels=expected["labels"][None], images=pixels)
    assert (output.logits[0] - expected["logits"]).abs().max() < 1e-4
    assert abs(output.loss.item() - expected["loss"].item()) < 1e-4
    assert torch.equal(model.generate(ids, images=pixels, max_new_tokens=6, do_sample=False)[0], expected["gen"])
