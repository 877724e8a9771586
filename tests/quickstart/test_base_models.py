"""Folders of tiny base models."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoTokenizer

from tinyllava_switchkd.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from tinyllava_switchkd.data import TextPreprocess, check_template
from tinyllava_switchkd.model.checkpoint import build_model
from tinyllava_switchkd.quickstart import scenes
from tinyllava_switchkd.quickstart.base_models import CONV_VERSION, build_tokenizer, write_llm, write_vision_tower


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    write_llm(root / "random-qwen2", width=24, layers=1)
    write_vision_tower(root / "random-siglip", width=16, layers=1)
    return root / "random-qwen2", root / "random-siglip"


def all_texts() -> list[str]:
    rng = np.random.default_rng(0)
    texts = []
    for scene in scenes.make_scenes("font", "train", 40, seed=0):
        texts += [scene.caption, scenes.describe(scene, rng), scenes.CAPTION_REQUEST]
        texts += [text for kind in scenes.QUESTION_TYPES for text in scenes.ask(scene, kind, rng)]
    return texts


def test_every_word_of_the_scenes_is_one_token(folders):
    for tokenizer in (build_tokenizer(), AutoTokenizer.from_pretrained(folders[0])):
        assert type(tokenizer).__name__ == "Qwen2Tokenizer"
        spelled = set(range(1, 257)) - set(tokenizer(".,?AB").input_ids)
        for text in all_texts():
            # In a conversation an answer follows "ASSISTANT: ", a question "USER: "
            assert not spelled & set(tokenizer("USER: " + text).input_ids), text
        assert tokenizer.decode(tokenizer("Is there a zebra?").input_ids) == "Is there a zebra?"  # byte by byte


def test_answers_survive_the_tokenizer():
    tokenizer = build_tokenizer()
    rng = np.random.default_rng(1)
    for scene in scenes.make_scenes("font", "val", 20, seed=0):
        for kind in scenes.QUESTION_TYPES:
            answer = scenes.ask(scene, kind, rng)[1]
            ids = tokenizer("ASSISTANT: " + answer).input_ids[1:]
            assert len(ids) == len(answer.split()) and tokenizer.decode(ids).strip() == answer


def test_prompts_are_short_and_only_answers_are_labels():
    tokenizer = build_tokenizer()
    check_template(tokenizer, CONV_VERSION)
    scene = scenes.make_scenes("font", "val", 1, seed=0)[0]
    turns = [
        {"from": "human", "value": "<image>\nWhat digit is top-left?" + scenes.SHORT_ANSWER},
        {"from": "gpt", "value": str(scene.digits[0])},
        {"from": "human", "value": "What is in the image?\nA. 3\nB. red digit" + scenes.LETTER_ANSWER},
        {"from": "gpt", "value": "B"},
    ]
    sample = TextPreprocess(tokenizer, CONV_VERSION)(turns, num_images=1)
    ids, labels = sample["input_ids"].tolist(), sample["labels"].tolist()
    # Twelve: system, USER:, image, What digit is top-left ?, suffix, ASSISTANT:, answer, end
    assert ids.index(IMAGE_TOKEN_INDEX) == 2 and len(ids) == 12 + 18
    learned = [token for token in labels if token != IGNORE_INDEX]
    assert tokenizer.convert_ids_to_tokens(learned) == [f" {scene.digits[0]}", "<|endoftext|>", "B", "<|endoftext|>"]


def test_model_has_one_token_per_cell(folders):
    model, tokenizer, image_processor = build_model(
        str(folders[0]), str(folders[1]), vision_feature_layer=-1, vision_feature_select_strategy="cls_patch"
    )
    assert model.num_image_tokens == len(scenes.POSITIONS)
    assert model.image_size == scenes.IMAGE_SIZE
    assert len(tokenizer) == model.config.text_config.vocab_size
    embedding = model.get_input_embeddings().weight
    assert embedding.std().item() == pytest.approx(24**-0.5, rel=0.1)
    # The image is not resized, and its values are scaled to -1..1
    pixels = scenes.make_scenes("font", "val", 1, seed=0)[0].pixels
    values = image_processor(Image.fromarray(pixels), return_tensors="pt")["pixel_values"][0]
    assert torch.allclose(values, torch.from_numpy(pixels).permute(2, 0, 1) / 127.5 - 1, atol=1e-5)


def test_weights_depend_on_the_seed(tmp_path, folders):
    from safetensors.torch import load_file

    write_llm(tmp_path / "same-qwen2", width=24, layers=1)
    write_llm(tmp_path / "other-qwen2", width=24, layers=1, seed=1)
    first, same, other = (
        load_file(folder / "model.safetensors")["model.embed_tokens.weight"]
        for folder in (folders[0], tmp_path / "same-qwen2", tmp_path / "other-qwen2")
    )
    assert torch.equal(first, same) and not torch.equal(first, other)
