"""Checkpoints: saved and loaded in the full and split layouts, strictness, options, building from base models."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.model.checkpoints import logits, save, write_v1_split
from tests.tiny import tiny_config, tiny_llava, tiny_vision_config, write_tiny_llm, write_tiny_tower
from tinyllava_switchkd.model import (
    TinyLlavaForConditionalGeneration,
    build_model,
    load_checkpoint_weights,
    load_pretrained_model,
    save_pretrained_model,
)
from tinyllava_switchkd.model.weights import normalise_keys, read_checkpoint, read_weights

PARTS = [
    {"tower": "siglip"},
    {"tower": "clip", "llm": "llama", "connector": "linear"},
    {"tower": "dinov2", "llm": "phi", "connector": "resampler"},
    {"tower": "siglip2", "llm": "qwen3", "connector": "mlp3x_gelu"},
    {"tower": "clip", "llm": "gemma", "connector": "ldpv2"},
    {"llm": "stablelm", "connector": "identity", "vision_feature_select_strategy": "cls_patch"},
    {"text": {"tie_word_embeddings": False}, "vision_feature_layer": -1},
    {
        "connector": "qformer",
        "qformer_config": {
            "hidden_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 1,
            "intermediate_size": 96,
        },
    },
]


@pytest.mark.parametrize("layout", ["full", "split"])
@pytest.mark.parametrize("parts", PARTS, ids=lambda parts: "-".join(str(v) for v in parts.values())[:40])
def test_saved_and_loaded(parts, layout, tmp_path):
    model = tiny_llava(**parts)
    save(model, tmp_path, template="phi") if layout == "full" else write_v1_split(model, tmp_path)
    loaded, tokenizer, image_processor, context_len = load_pretrained_model(tmp_path, device="cpu")
    assert torch.equal(logits(loaded), logits(model))
    assert not loaded.training and all(p.requires_grad for p in loaded.parameters())
    assert context_len == 512 and len(tokenizer) == 264
    assert image_processor(torch.zeros(3, 9, 9), return_tensors="pt")["pixel_values"].shape == (1, 3, 28, 28)
    assert loaded.config.vision_feature_select_strategy == model.config.vision_feature_select_strategy
    if layout == "full":
        assert loaded.config.template == "phi"
        keys = load_file(tmp_path / "model.safetensors")
        assert all(
            key.startswith(("language_model.", "vision_tower._vision_tower.", "connector._connector")) for key in keys
        )
        tied = model.config.text_config.tie_word_embeddings
        assert ("language_model.lm_head.weight" in keys) == (not tied)


def test_qformers_geometry_needs_no_configuration(tmp_path):
    """v1 does not store the geometry."""
    model = tiny_llava(**PARTS[-1])
    save(model, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["qformer_config"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert torch.equal(logits(load_pretrained_model(tmp_path, device="cpu")[0]), logits(model))


def test_dinov2_is_written_under_v1s_names(tmp_path):
    """transformers 5 renamed DINOv2's attention; on disk it keeps the names of v1 and transformers 4."""
    model = tiny_llava(tower="dinov2")
    stem = "vision_tower._vision_tower.encoder.layer.0.attention."
    for folder, saved in (("fresh", model), ("again", None)):
        saved = saved or load_pretrained_model(tmp_path / "fresh", device="cpu")[0]
        save(saved, tmp_path / folder)
        keys = load_file(tmp_path / folder / "model.safetensors")
        for name in ("attention.query", "attention.key", "attention.value", "output.dense"):
            assert f"{stem}{name}.weight" in keys


@pytest.mark.parametrize("known", ["stored", "beside", "told from the weights"])
def test_mof(known, tmp_path):
    """v1 only stores CLIP's configuration; DINOv2's is in a folder beside, or derived from the weights."""
    config = tiny_config(tower="clip", connector="mof_mlp", vision_model_name_or_path="mof:clip-tiny")
    config.vision_model_name_or_path2 = config.vision_config.model_name_or_path2 = "mof:dinov2-tiny"
    config.vision_config.dinov2_config = tiny_vision_config("dinov2").to_diff_dict()
    torch.manual_seed(0)
    model = TinyLlavaForConditionalGeneration(config).eval()
    assert model.num_image_tokens == 32
    folder = write_v1_split(model, tmp_path / "run" / "checkpoint")
    if known != "stored":
        fields = json.loads((folder / "config.json").read_text())
        del fields["vision_config"]["dinov2_config"]
        (folder / "config.json").write_text(json.dumps(fields))
    if known == "beside":
        write_tiny_tower(tmp_path / "run" / "dinov2-tiny", "dinov2")
    loaded = load_pretrained_model(folder, device="cpu")[0]
    assert torch.equal(logits(loaded), logits(model))
    save(loaded, tmp_path / "again")
    assert torch.equal(logits(load_pretrained_model(tmp_path / "again", device="cpu")[0]), logits(model))


def test_sharded_checkpoint(tmp_path):
    model = tiny_llava()
    save(model, tmp_path)
    (tmp_path / "model.safetensors").unlink()
    model.save_pretrained(tmp_path, max_shard_size="50KB")
    assert (tmp_path / "model.safetensors.index.json").is_file()
    assert torch.equal(logits(load_pretrained_model(tmp_path, device="cpu")[0]), logits(model))
    next(tmp_path.glob("model-00002*")).unlink()
    with pytest.raises(FileNotFoundError, match="incomplete"):
        load_pretrained_model(tmp_path, device="cpu")


def test_weights_without_the_vision_model_level(tmp_path):
    """As transformers 5 writes a plain SigLIP tower."""
    model = tiny_llava()
    save(model, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    flat = {key.replace("vision_tower.vision_model.", "vision_tower."): value for key, value in tensors.items()}
    flat["vision_tower._vision_tower.embeddings.position_ids"] = torch.arange(16)[None]  # a buffer of old versions
    save_file(flat, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert torch.equal(logits(load_pretrained_model(tmp_path, device="cpu")[0]), logits(model))
    assert normalise_keys(flat).keys() == tensors.keys()


# strictness


def broken(tmp_path, change):
    model = tiny_llava()
    save(model, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    return tmp_path


def rename(tensors):
    tensors["connector._connector.0.wait"] = tensors.pop("connector._connector.0.weight")


def shrink(tensors):
    tensors["connector._connector.2.weight"] = torch.zeros(3, 3)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (
            lambda t: t.pop("language_model.model.norm.weight"),
            r"1 weights are missing \(language_model.model.norm.weight",
        ),
        (lambda t: t.update(extra=torch.zeros(1)), r"1 weights are not expected \(extra"),
        (
            rename,
            r"missing \(connector._connector.0.weight\); 1 weights are not expected \(connector._connector.0.wait",
        ),
        (shrink, r"another shape \(connector._connector.2.weight \[3, 3\] instead of \[32, 32\]"),
        (
            lambda t: [t.pop(k) for k in list(t) if "vision_model" in k],
            r"weights are missing \(vision_tower._vision_tower.vision_model.*\.\.\.",
        ),
    ],
)
def test_weights_that_do_not_fit_are_named(change, match, tmp_path):
    folder = broken(tmp_path, change)
    with pytest.raises(ValueError, match=match) as error:
        load_pretrained_model(folder, device="cpu")
    assert str(folder) in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(ValueError, match=match):
        TinyLlavaForConditionalGeneration.from_pretrained(folder)


def test_untied_head_may_not_be_missing(tmp_path):
    model = tiny_llava(text={"tie_word_embeddings": False})
    save(model, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["language_model.lm_head.weight"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="lm_head"):
        load_pretrained_model(tmp_path, device="cpu")


def test_what_is_no_checkpoint(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        load_pretrained_model(tmp_path)
    with pytest.raises(FileNotFoundError, match="no folder"):
        load_pretrained_model(tmp_path / "none")
    write_tiny_llm(tmp_path / "llm")
    with pytest.raises(ValueError, match="'qwen2' model, not of a TinyLLaVA"):
        load_pretrained_model(tmp_path / "llm")
    tiny_llava().config.save_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match="no weights"):
        load_pretrained_model(tmp_path)
    write_v1_split(tiny_llava(), tmp_path / "split")
    (tmp_path / "split" / "connector" / "pytorch_model.bin").unlink()
    with pytest.raises(FileNotFoundError, match="connector holds no weights"):
        load_pretrained_model(tmp_path / "split")


def test_missing_tokenizer_names_the_remedy(tmp_path):
    model = tiny_llava(tokenizer_name_or_path="not-here")
    model.save_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"tokenizer in 'not-here'.*tokenizer\.json"):
        load_pretrained_model(tmp_path, device="cpu")


def test_quantisation_that_is_impossible_says_why(tmp_path, monkeypatch):
    save(tiny_llava(), tmp_path)
    with pytest.raises(ValueError, match="not both"):
        load_pretrained_model(tmp_path, load_8bit=True, load_4bit=True)
    monkeypatch.setattr("tinyllava_switchkd.model.quantized.find_spec", lambda name: None)
    for name in ("load_8bit", "load_4bit"):
        with pytest.raises(ValueError, match=f"{name} needs the package bitsandbytes"):
            load_pretrained_model(tmp_path, **{name: True})


# options


def test_dtype_device_and_attention(tmp_path):
    save(tiny_llava(), tmp_path)
    model = load_pretrained_model(tmp_path, dtype=torch.bfloat16, device="cpu", attn_implementation="eager")[0]
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model.language_model.config._attn_implementation == "eager"
    save(model, tmp_path / "half")
    assert load_pretrained_model(tmp_path / "half", device="cpu")[0].dtype == torch.bfloat16  # the checkpoint's own
    assert load_pretrained_model(tmp_path / "half", device="cpu", dtype=torch.float32)[0].dtype == torch.float32
    parts = {"text_config": "sdpa", "vision_config": "eager"}
    mixed = load_pretrained_model(tmp_path, device="cpu", attn_implementation=parts)[0]
    assert mixed.language_model.config._attn_implementation == "sdpa"
    assert mixed.vision_tower.config._attn_implementation == "eager"
    assert torch.equal(
        mixed.language_model.model.rotary_emb.inv_freq, tiny_llava().language_model.model.rotary_emb.inv_freq
    )


def test_device_map(tmp_path):
    model = tiny_llava()
    save(model, tmp_path)
    mapped = load_pretrained_model(tmp_path, device_map={"": "cpu"})[0]
    assert torch.equal(logits(mapped), logits(model))


def test_written_over_itself(tmp_path):
    """A loaded model does not depend on its file, which may be overwritten."""
    save(tiny_llava(), tmp_path)
    model = load_pretrained_model(tmp_path, device="cpu")[0]
    assert str(tmp_path) not in Path("/proc/self/maps").read_text()
    with torch.no_grad():
        model.connector._connector[0].weight.add_(1)
    save(model, tmp_path)
    assert torch.equal(logits(load_pretrained_model(tmp_path, device="cpu")[0]), logits(model))


def test_state_dict_may_be_given(tmp_path):
    """A partitioned model is saved with gathered weights."""
    model, other = tiny_llava(), tiny_llava(seed=1)
    save(model, tmp_path, state_dict=other.state_dict())
    assert torch.equal(logits(load_pretrained_model(tmp_path, device="cpu")[0]), logits(other))


def test_weights_into_an_existing_model(tmp_path):
    saved, model = tiny_llava(tower="dinov2", seed=1), tiny_llava(tower="dinov2")
    save(saved, tmp_path)
    load_checkpoint_weights(model, tmp_path)
    assert torch.equal(logits(model), logits(saved))


def test_nothing_of_the_machine_is_stored(tmp_path):
    llm, tower = write_tiny_llm(tmp_path / "qwen2-tiny"), write_tiny_tower(tmp_path / "siglip-tiny")
    model, tokenizer, image_processor = build_model(llm, tower)
    save_pretrained_model(model, tokenizer, image_processor, tmp_path / "out")
    assert str(tmp_path) not in "".join(file.read_text() for file in (tmp_path / "out").glob("*.json"))
    for folder in ("qwen2-tiny", "siglip-tiny"):
        shutil.rmtree(tmp_path / folder)
    assert torch.equal(logits(load_pretrained_model(tmp_path / "out", device="cpu")[0]), logits(model))


# base models


@pytest.mark.parametrize("tower", ["siglip", "clip", "dinov2"])
def test_build_model_from_base_folders(tower, tmp_path):
    from transformers import AutoModel, AutoModelForCausalLM

    llm, vision = write_tiny_llm(tmp_path / "qwen2-tiny"), write_tiny_tower(tmp_path / f"{tower}-tiny", tower)
    model, tokenizer, image_processor = build_model(llm, vision, "linear", template="qwen2_base")
    expected = AutoModelForCausalLM.from_pretrained(llm).state_dict()
    assert all(torch.equal(expected[key], value) for key, value in model.language_model.state_dict().items())
    encoder = getattr(model.vision_tower.vision_tower, "vision_model", model.vision_tower.vision_tower)
    expected = AutoModel.from_pretrained(vision).state_dict()
    assert all(torch.equal(expected[key], value) for key, value in encoder.state_dict().items())
    assert model.connector._connector.weight.std() > 0 and model.dtype == torch.float32
    assert model.config.template == "qwen2_base" and model.config.pad_token == tokenizer.pad_token
    assert model.config.pad_token_id == tokenizer.pad_token_id
    assert image_processor is model.image_processor and model.tokenizer is tokenizer
    assert all(p.requires_grad for p in model.parameters())
    assert logits(model).shape == (1, 4 + model.num_image_tokens, 264)


def test_build_model_on_a_pre_training_run(tmp_path):
    """v1's second stage: base names, and weights from the split folder of the first."""
    llm, tower = write_tiny_llm(tmp_path / "qwen2-tiny"), write_tiny_tower(tmp_path / "siglip-tiny")
    trained = tiny_llava(seed=5)
    run = write_v1_split(trained, tmp_path / "run-pretrain")
    model = build_model(
        llm,
        tower,
        pretrained_llm_path=str(run / "language_model"),
        pretrained_vision_tower_path=str(run / "vision_tower"),
        pretrained_connector_path=str(run / "connector"),
        attn_implementation="eager",
    )[0]
    assert torch.allclose(logits(model), logits(trained), atol=1e-5)
    whole = save(trained, tmp_path / "whole")
    only_connector = build_model(llm, tower, pretrained_connector_path=str(whole))[0]
    assert torch.equal(only_connector.connector._connector[0].weight, trained.connector._connector[0].weight)


def test_build_model_refuses_what_is_missing(tmp_path):
    llm, tower = write_tiny_llm(tmp_path / "qwen2-tiny"), write_tiny_tower(tmp_path / "siglip-tiny")
    with pytest.raises(ValueError, match="Unknown connector 'mlq'"):
        build_model(llm, tower, "mlq")
    with pytest.raises(FileNotFoundError, match="siglip-none"):
        build_model(llm, str(tmp_path / "siglip-none"))
    other = write_tiny_llm(tmp_path / "qwen2-small", vocab=100)
    with pytest.raises(ValueError, match=r"264 tokens.*embeddings for 100"):
        build_model(other, tower)
    (Path(llm) / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="no weights of a language model"):
        build_model(llm, tower)


def test_readers(tmp_path):
    assert read_weights(tmp_path) is None
    save(tiny_llava(), tmp_path)
    assert "language_model.lm_head.weight" not in read_checkpoint(tmp_path)
