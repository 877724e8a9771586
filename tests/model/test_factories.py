"""The three factories: names, paths, model types, plugins."""

import json

import pytest
from transformers import Qwen2ForCausalLM

from tests.tiny import tiny_llava, tiny_text_config, tiny_tokenizer, tiny_vision_config
from tinyllava_switchkd.model import (
    ConnectorFactory,
    LLMFactory,
    VisionTowerFactory,
    register_connector,
    register_llm,
    register_vision_tower,
)
from tinyllava_switchkd.model.llm import load_tokenizer, resolve_llm
from tinyllava_switchkd.model.vision_tower import resolve_vision_tower


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("Qwen/Qwen2.5-0.5B", "Qwen2ForCausalLM"),
        ("Qwen/Qwen2-1.5B-Instruct", "Qwen2ForCausalLM"),
        ("Qwen/Qwen1.5-0.5B", "Qwen2ForCausalLM"),
        ("Qwen/Qwen3-0.6B", "Qwen3ForCausalLM"),
        ("models/philip/Qwen2-0.5B", "Qwen2ForCausalLM"),  # v1 finds phi, because of the parent folder
        ("/data/gemma-runs/TinyLlama-1.1B-Chat-v1.0/", "LlamaForCausalLM"),
        ("microsoft/phi-2", "PhiForCausalLM"),
        ("microsoft/Phi-3-mini-4k-instruct", "Phi3ForCausalLM"),
        ("google/gemma-2b-it", "GemmaForCausalLM"),
        ("stabilityai/stablelm-2-zephyr-1_6b", "StableLmForCausalLM"),
    ],
)
def test_llm_by_name(name, expected):
    model_class, (tokenizer_class, post_load) = LLMFactory(name)
    assert model_class.__name__ == expected
    assert hasattr(tokenizer_class, "from_pretrained") and callable(post_load)


def test_llm_by_the_model_type_of_a_folder(tmp_path):
    folder = tmp_path / "student"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "qwen3"}))
    assert LLMFactory(str(folder))[0].__name__ == "Qwen3ForCausalLM"


@pytest.mark.parametrize("factory", [LLMFactory, VisionTowerFactory, ConnectorFactory])
def test_unknown_names_list_the_known(factory):
    with pytest.raises(ValueError, match=r"Registered: .*,"):
        factory("nothing-of-the-kind")


def test_checkpoint_configuration_outweighs_a_misleading_name():
    entry = resolve_llm("graphite-v2", tiny_text_config("qwen2"))  # contains "phi"
    assert entry[0] is Qwen2ForCausalLM
    with pytest.raises(ValueError, match="bert"):
        resolve_llm("", type("Config", (), {"model_type": "bert"})())


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("google/siglip-so400m-patch14-384", "SiglipVisionTower"),
        ("google/siglip2-so400m-patch14-384", "Siglip2VisionTower"),
        ("openai/clip-vit-large-patch14-336", "CLIPVisionTower"),
        ("/clip/facebook/dinov2-large", "DINOv2VisionTower"),
        ("mof:openai/clip-vit-large-patch14-336", "MoFVisionTower"),
        ("timm:vit_small_patch14_dinov2.lvd142m", "TimmVisionTower"),
        ("timm:vit_base_patch16_clip_224", "TimmVisionTower"),
        ("open_clip:ViT-L-14/openai", "OpenClipVisionTower"),
    ],
)
def test_tower_by_name(name, expected):
    assert VisionTowerFactory(name).__name__ == expected


def test_tower_by_the_model_type(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "clip"}))
    assert VisionTowerFactory(str(tmp_path)).__name__ == "CLIPVisionTower"
    assert resolve_vision_tower("encoder", tiny_vision_config("siglip")).__name__ == "SiglipVisionTower"
    assert resolve_vision_tower("my-clip", tiny_vision_config("dinov2")).__name__ == "DINOv2VisionTower"
    with pytest.raises(ValueError, match="qwen2"):
        resolve_vision_tower("", tiny_text_config("qwen2"))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("mlp2x_gelu", "MLPConnector"),
        ("mof_mlp", "MoFMLPConnector"),
        ("linear", "LinearConnector"),
        ("ldpv2", "LDPv2Connector"),
        ("qformer", "QFormerConnector"),
        ("resampler", "ResamplerConnector"),
        ("identity", "IdentityConnector"),
    ],
)
def test_connector_by_name(name, expected):
    assert ConnectorFactory(name).__name__ == expected


def test_override_reaches_every_name_that_meant_the_old_entry():
    """In v1 Qwen2.5 matches only qwen2; with another alias, a plugin could not replace it."""
    with LLMFactory.scope():
        register_llm("qwen2", override=True)(lambda: ("mine", ()))
        for name in ("qwen2", "Qwen/Qwen2-0.5B", "Qwen/Qwen2.5-3B-Instruct"):
            assert LLMFactory(name) == ("mine", ())
        assert LLMFactory("Qwen/Qwen3-0.6B") != ("mine", ())


def test_second_registration_needs_override():
    for register, name in ((register_llm, "qwen2"), (register_vision_tower, "clip"), (register_connector, "linear")):
        with pytest.raises(ValueError, match="override=True"):
            register(name)(lambda: None)


def test_plugins_are_built_into_a_model():
    linear = ConnectorFactory("linear")
    siglip = VisionTowerFactory("siglip")
    qwen2 = LLMFactory("qwen2")

    @register_connector("plugin-connector", override=True)
    class PluginConnector(linear):
        pass

    @register_vision_tower("plugin-tower", override=True)
    class PluginTower(siglip):
        pass

    class PluginLLM(qwen2[0]):
        pass

    @register_llm("plugin-llm", override=True)
    def plugin():
        return PluginLLM, qwen2[1]

    model = tiny_llava(
        connector="plugin-connector",
        llm_model_name_or_path="some/plugin-llm-1b",
        vision_model_name_or_path="plugin-tower",
    )
    assert isinstance(model.language_model, PluginLLM)
    assert isinstance(model.vision_tower, PluginTower)
    assert isinstance(model.connector, PluginConnector)


@pytest.mark.parametrize(
    ("llm", "style", "pad", "unk"),
    [
        ("qwen2", "qwen2_instruct", "<|endoftext|>", "<|endoftext|>"),
        ("gemma", "gemma", "<unk>", "<unk>"),
        ("llama", "llama", "<unk>", "<unk>"),
        ("phi", "phi", "<|endoftext|>", "<|endoftext|>"),
        ("stablelm", "qwen2", "<|endoftext|>", "<|endoftext|>"),
    ],
)
def test_v1s_padding_rules(tmp_path, llm, style, pad, unk):
    tokenizer = tiny_tokenizer(style)
    if llm == "qwen2":
        tokenizer.unk_token = None
    else:
        tokenizer.pad_token = None if llm != "stablelm" else tokenizer.pad_token
    tokenizer.save_pretrained(tmp_path)
    loaded = load_tokenizer(str(tmp_path), tiny_text_config(llm), llm=llm, model_max_length=77)
    assert (loaded.pad_token, loaded.unk_token) == (pad, unk)
    assert loaded.is_fast and loaded.padding_side == "right" and loaded.model_max_length == 77


def test_missing_tokenizer_is_one_sentence(tmp_path):
    with pytest.raises(FileNotFoundError, match="no tokenizer in"):
        load_tokenizer(str(tmp_path), tiny_text_config("qwen2"), llm="qwen2")
