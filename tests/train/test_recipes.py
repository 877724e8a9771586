"""Recipes: what is trained under each tune type, and LoRA in training, folder and merge."""

import json

import pytest
import torch
from safetensors.torch import load_file

from tests.tiny import VOCAB_SIZE, tiny_llava, tiny_tokenizer
from tests.train.test_resume import StopAt
from tests.train.toy import ToyDataset, largest_difference, toy_arguments, toy_collator, toy_trainer, weights
from tinyllava_switchkd.model import load_pretrained_model
from tinyllava_switchkd.train.recipes import (
    BaseTrainingRecipe,
    LoRATrainingRecipe,
    QLoRATrainingRecipe,
    TrainingRecipeFactory,
    register_training_recipe,
)


def trainable(model):
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def recipe_of(tmp_path, **kwargs):
    args = toy_arguments(tmp_path, **kwargs)
    return TrainingRecipeFactory(args.training_recipe)(args)


def student(**kwargs):
    model = tiny_llava(**kwargs)
    model.tokenizer, model.image_processor = tiny_tokenizer(), model.vision_tower.image_processor
    return model


@pytest.fixture
def batch():
    return toy_collator(tiny_llava())([ToyDataset().samples[index] for index in (0, 1, 2)])


def test_factory():
    assert TrainingRecipeFactory("common") is BaseTrainingRecipe
    assert TrainingRecipeFactory("LoRA") is LoRATrainingRecipe
    assert TrainingRecipeFactory("qlora") is TrainingRecipeFactory("qlora_int8")
    with pytest.raises(ValueError, match="common, lora, qlora"):
        TrainingRecipeFactory("dora")
    with pytest.raises(ValueError, match="already registered"):
        register_training_recipe("common")(LoRATrainingRecipe)


@pytest.mark.parametrize("tower", ["siglip", "clip", "dinov2"])
def test_tune_types(tmp_path, batch, tower):
    def parts(**kwargs):
        model = recipe_of(tmp_path, **kwargs)(student(tower=tower))
        assert model.config.tune_type_llm == kwargs.get("tune_type_llm", "full")
        return trainable(model), model

    names, model = parts(tune_type_llm="frozen", tune_type_vision_tower="frozen")
    assert names == {name for name, _ in model.named_parameters() if name.startswith("connector.")}

    names, model = parts(tune_type_connector="frozen", tune_type_vision_tower="frozen")
    assert names == {name for name, _ in model.named_parameters() if name.startswith("language_model.")}

    names, model = parts()
    model.requires_grad_(True)
    model(**batch).loss.backward()
    assert names == {name for name, parameter in model.named_parameters() if parameter.grad is not None}

    names, _ = parts(tune_type_vision_tower="partially-tune", tune_vision_tower_from_layer=1)
    vision = {name for name in names if name.startswith("vision_tower.")}
    assert vision and all(".1." in name for name in vision)  # the last of three layers is not used

    with pytest.raises(
        ValueError, match="tune_vision_tower_from_layer is 3, but the vision tower has 3 encoder layers"
    ):
        parts(tune_type_vision_tower="partially-tune", tune_vision_tower_from_layer=3)
    with pytest.raises(ValueError, match="from_layer 2 trains nothing of the vision tower, because layers behind"):
        parts(tune_type_vision_tower="partially-tune", tune_vision_tower_from_layer=2)


LORA = {
    "training_recipe": "lora",
    "tune_type_llm": "lora",
    "tune_type_vision_tower": "lora",
    "tune_type_connector": "full",
    "lora_r": 4,
    "lora_alpha": 8,
}


@pytest.mark.parametrize("bias", ["none", "lora_only"])
@pytest.mark.parametrize("tied", [True, False])
def test_lora_trained_saved_loaded_and_merged(tmp_path, batch, tied, bias):
    recipe = recipe_of(tmp_path, **LORA, lora_bias=bias)
    model = recipe(student(text={"tie_word_embeddings": tied}))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    names = trainable(model)
    assert {name.split(".")[0] for name in names} == {"language_model", "vision_tower", "connector"}
    assert all(".lora_" in n or n.startswith("connector.") or (bias != "none" and n.endswith("bias")) for n in names)
    assert not any("head" in name for name in names)

    toy_trainer(recipe.training_arguments, model).train()
    after = model.state_dict()
    changed = {name for name in after if not torch.equal(before[name], after[name])}
    assert changed and changed <= names

    recipe.write_student(model, str(tmp_path / "adapted"))
    model.eval()
    with torch.no_grad():
        expected = model(**batch).logits
        merged, tokenizer, _, _ = load_pretrained_model(tmp_path / "adapted", device="cpu")
        assert torch.allclose(merged(**batch).logits, expected, atol=1e-5)
    assert not any("lora" in name for name, _ in merged.named_parameters())
    assert len(tokenizer) == VOCAB_SIZE


def test_lora_folder_has_v1s_layout(tmp_path):
    recipe = recipe_of(tmp_path, **LORA)
    model = recipe(student())
    recipe.write_student(model, str(tmp_path))
    adapter = load_file(tmp_path / "adapter_model.safetensors")
    assert "base_model.model.language_model.model.layers.0.self_attn.q_proj.lora_A.weight" in adapter
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "LORA"
    assert "# Components" in (tmp_path / "README.md").read_text()
    llm = torch.load(tmp_path / "language_model" / "pytorch_model.bin", weights_only=True)
    assert "model.layers.0.self_attn.q_proj.base_layer.weight" in llm and "model.embed_tokens.weight" in llm
    assert "lm_head.weight" not in llm  # tied, and not written, as in v1
    tower = torch.load(tmp_path / "vision_tower" / "pytorch_model.bin", weights_only=True)
    assert "vision_model.encoder.layers.0.self_attn.q_proj.base_layer.weight" in tower
    connector = torch.load(tmp_path / "connector" / "pytorch_model.bin", weights_only=True)
    assert "_connector.0.weight" in connector
    for part in ("language_model", "vision_tower"):
        assert (tmp_path / part / "config.json").is_file()
    for name in ("config.json", "tokenizer.json", "preprocessor_config.json"):
        assert (tmp_path / name).is_file()


def test_lora_is_read_back_exactly(tmp_path):
    recipe = recipe_of(tmp_path, **LORA)
    model = recipe(student(seed=1))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    recipe.write_student(model, str(tmp_path))
    other_recipe = recipe_of(tmp_path, **LORA)
    other = other_recipe(student(seed=2))
    other_recipe.read_student(other, str(tmp_path))
    state = other.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_lora_resumes(tmp_path):
    """Six steps equal three, a checkpoint and three more, with dropout, so the random state must be restored."""
    results = []
    for name, stop in (("through", None), ("stopped", 3), ("stopped", None)):
        recipe = recipe_of(tmp_path / name, **LORA, save_strategy="steps", save_steps=3, max_steps=6)
        torch.manual_seed(0)
        model = recipe(student())
        trainer = toy_trainer(
            recipe.training_arguments,
            model,
            callbacks=[StopAt(stop)] if stop else [],
            recipe=recipe,
        )
        resumed = name == "stopped" and stop is None
        trainer.train(resume_from_checkpoint=str(tmp_path / "stopped" / "checkpoint-3") if resumed else None)
        results.append(weights(model))
    assert largest_difference(results[0], results[1]) > 1e-4
    assert largest_difference(results[0], results[2]) < 1e-7


@pytest.mark.skipif(torch.cuda.is_available(), reason="refused only without CUDA")
def test_qlora_is_refused_without_cuda(tmp_path):
    with pytest.raises(ValueError, match="--training_recipe qlora needs a CUDA GPU"):
        recipe_of(tmp_path, training_recipe="qlora", tune_type_llm="qlora", tune_type_vision_tower="frozen")
    with pytest.raises(ValueError, match="--estimate of qlora needs one, too"):
        recipe_of(tmp_path, training_recipe="qlora", tune_type_llm="qlora", estimate=True)


@pytest.mark.parametrize(("name", "bits", "stored"), [("qlora_int8", 16, torch.int8), ("qlora", 4, torch.uint8)])
def test_qlora_trains_saves_and_resumes(tmp_path, batch, monkeypatch, name, bits, stored):
    """If bitsandbytes is installed; with its CPU kernels instead of the GPU's."""
    pytest.importorskip("bitsandbytes")
    monkeypatch.setattr(QLoRATrainingRecipe, "check_installation", lambda self: None)
    settings = {"training_recipe": name, "bits": bits, "tune_type_llm": "qlora", "lora_r": 4}
    results = []
    for checkpoint in (None, str(tmp_path / "checkpoint-2")):
        recipe = recipe_of(tmp_path, **settings, save_strategy="steps", save_steps=2)
        torch.manual_seed(0)
        model = recipe(student(text={"hidden_size": 64}))
        layer = model.language_model.model.layers[0].self_attn.q_proj.base_layer
        assert layer.weight.dtype == stored and not layer.weight.requires_grad
        toy_trainer(recipe.training_arguments, model, recipe=recipe).train(resume_from_checkpoint=checkpoint)
        results.append({name: value for name, value in weights(model).items() if ".lora_" in name})
    assert largest_difference(*results) < 1e-7

    recipe.write_student(model, str(tmp_path / "adapted"))
    model.eval()
    with torch.no_grad():
        merged, *_ = load_pretrained_model(tmp_path / "adapted", device="cpu")
        expected = model(**batch).logits
        assert (merged(**batch).logits - expected).abs().max() < 0.1 * expected.abs().max()
