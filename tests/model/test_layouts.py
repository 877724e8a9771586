"""Checkpoints in other layouts: LoRA, TinyLLaVABench, the hub, and loading under ZeRO-3."""

import json
import shutil

import huggingface_hub
import pytest
import torch
from huggingface_hub import constants
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import load_file, save_file

from tests.model.checkpoints import logits, save, write_v1_split
from tests.tiny import tiny_llava, tiny_tokenizer
from tinyllava_switchkd.model import (
    TinyLlavaForConditionalGeneration,
    load_pretrained_model,
    push_pretrained_model,
)

# LoRA


def make_lora(tmp_path, layout, llm="qwen2", targets=("q_proj", "v_proj", "down_proj")):
    """v1's LoRA folder: adapter, and the base weights split by part with peft's ``.base_layer`` in their names."""
    from peft import LoraConfig, get_peft_model

    base = tiny_llava(llm, llm_model_name_or_path=f"{llm}-tiny")
    torch.manual_seed(3)
    adapted = get_peft_model(base, LoraConfig(r=4, lora_alpha=8, target_modules=list(targets), init_lora_weights=False))
    folder = tmp_path / "run"  # the name does not say what the folder contains
    adapted.save_pretrained(folder)
    expected = logits(adapted)
    model = adapted.base_model.model
    if layout == "split":
        write_v1_split(model, folder, rename=lambda name: name)
        for part in ("language_model", "vision_tower"):
            file = folder / part / "pytorch_model.bin"
            torch.save({k: v for k, v in torch.load(file).items() if "lora_" not in k}, file)
        assert any(".base_layer." in key for key in torch.load(folder / "language_model" / "pytorch_model.bin"))
    else:
        plain = adapted.unload()
        save(plain, folder)
    return folder, expected


@pytest.mark.parametrize("layout", ["split", "full"])
def test_lora_folder_is_merged(layout, tmp_path):
    folder, expected = make_lora(tmp_path, layout)
    model = load_pretrained_model(folder, device="cpu")[0]
    assert isinstance(model, TinyLlavaForConditionalGeneration)
    assert torch.allclose(logits(model), expected, atol=1e-5)
    assert not any("lora" in name for name in model.state_dict())
    save(model, tmp_path / "merged")
    assert torch.equal(logits(load_pretrained_model(tmp_path / "merged", device="cpu")[0]), logits(model))


def test_lora_in_the_name_means_nothing(tmp_path):
    save(tiny_llava(), tmp_path / "my-lora-run")
    assert torch.equal(logits(load_pretrained_model(tmp_path / "my-lora-run", device="cpu")[0]), logits(tiny_llava()))


@pytest.mark.parametrize("end", ["lm_head", "embed_tokens"])
def test_an_end_of_tied_embeddings_is_not_merged(end, tmp_path):
    folder, expected = make_lora(tmp_path / "untied", "full", "llama", ["q_proj", end])
    assert torch.allclose(logits(load_pretrained_model(folder, device="cpu")[0]), expected, atol=1e-5)
    folder, _ = make_lora(tmp_path / "tied", "full", targets=["q_proj", end])
    with pytest.raises(ValueError, match=rf"{end}, which is also .*tie_word_embeddings"):
        load_pretrained_model(folder, device="cpu")


def test_adapter_that_does_not_fit(tmp_path):
    folder, _ = make_lora(tmp_path, "full")
    tensors = load_file(folder / "adapter_model.safetensors")
    name = next(iter(tensors))
    tensors[name.replace("layers.0", "layers.7")] = tensors.pop(name)
    save_file(tensors, folder / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=r"adapter in .* does not fit"):
        load_pretrained_model(folder, device="cpu")


# TinyLLaVABench


def test_legacy_checkpoint(tmp_path, monkeypatch):
    """Names and configuration of the code before v1, with the built-in configuration of its SigLIP."""
    from tinyllava_switchkd.model import legacy

    model = tiny_llava("phi", llm_model_name_or_path="microsoft/phi-2")
    tiny_siglip = model.config.vision_config.to_diff_dict()
    monkeypatch.setattr(legacy, "SIGLIP_SO400M_CONFIG", {**tiny_siglip, "model_type": "siglip_vision_model"})
    old = {}
    for key, value in model.state_dict().items():
        key = key.replace("vision_tower._vision_tower.", "model.vision_tower.vision_tower.")
        key = key.replace("connector._connector.", "model.mm_projector.")
        old[key.replace("language_model.", "")] = value.contiguous().clone()
    save_file(old, tmp_path / "model.safetensors", metadata={"format": "pt"})
    config = {
        **model.config.text_config.to_dict(),
        "architectures": ["TinyLlavaPhiForCausalLM"],
        "model_type": "tiny_llava_phi",
        "mm_vision_tower": "bczhou/TinyLLaVA-3.1B-SigLIP",
        "mm_projector_type": "mlp2x_gelu",
        "mm_vision_select_layer": -2,
        "mm_vision_select_feature": "patch",
        "image_aspect_ratio": "pad",
        "tokenizer_model_max_length": 3072,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    tiny_tokenizer("phi").save_pretrained(tmp_path)
    loaded, _, _, context_len = load_pretrained_model(tmp_path, device="cpu")
    assert torch.equal(logits(loaded), logits(model))
    assert context_len == 3072 and loaded.config.image_aspect_ratio == "pad"
    config["architectures"] = ["Other"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="'Other'"):
        load_pretrained_model(tmp_path, device="cpu")


# the hub


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub in a folder: uploads appear in the cache that downloads are served from."""
    from huggingface_hub import HfApi

    cache = tmp_path / "hub"

    def upload_folder(self, *, repo_id, folder_path, **kwargs):
        repository = cache / f"models--{repo_id.replace('/', '--')}"
        shutil.copytree(folder_path, repository / "snapshots" / "0123abc")
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text("0123abc")
        return f"https://hub/{repo_id}"

    monkeypatch.setattr(HfApi, "create_repo", lambda self, repo_id, **kwargs: None)
    monkeypatch.setattr(HfApi, "upload_folder", upload_folder)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    return cache


def test_pushed_and_pulled(hub):
    from transformers import AutoModelForCausalLM

    model = tiny_llava()
    url = push_pretrained_model(
        model, tiny_tokenizer(), model.vision_tower.image_processor, "someone/tiny", template="qwen2_base"
    )
    assert url == "https://hub/someone/tiny"
    loaded, tokenizer, _, _ = load_pretrained_model("someone/tiny", device="cpu", cache_dir=str(hub))
    assert torch.equal(logits(loaded), logits(model)) and loaded.config.template == "qwen2_base"
    assert tokenizer("a").input_ids == tiny_tokenizer()("a").input_ids
    auto = AutoModelForCausalLM.from_pretrained("someone/tiny", cache_dir=str(hub))
    assert torch.equal(logits(auto), logits(model))


@pytest.mark.parametrize("connector", ["pytorch_model.bin", "model.safetensors"])
def test_lora_run_on_the_hub(connector, tmp_path, monkeypatch):
    """The parts beside ``adapter_model.safetensors`` are pickles, at least some of them."""
    folder, expected = make_lora(tmp_path, "split")
    if connector == "model.safetensors":
        save_file(torch.load(folder / "connector" / "pytorch_model.bin"), folder / "connector" / connector)
        (folder / "connector" / "pytorch_model.bin").unlink()
    cache = tmp_path / "cache"

    def snapshot_download(name, allow_patterns):
        files = [file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()]
        for file in filter_repo_objects(files, allow_patterns=allow_patterns):
            (cache / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(folder / file, cache / file)
        return str(cache)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    model = load_pretrained_model("someone/lora", device="cpu")[0]
    assert torch.allclose(logits(model), expected, atol=1e-5)


def test_unreachable_names_are_one_sentence():
    with pytest.raises(FileNotFoundError, match=r"There is no folder 'someone/none'.*hub") as error:
        load_pretrained_model("someone/none")
    assert "\n" not in str(error.value)


def test_models_are_whole_under_zero_3(tmp_path):
    """With ZeRO-3 configured, transformers would partition the model, and a teacher could never be gathered."""
    pytest.importorskip("deepspeed")
    from transformers.integrations.deepspeed import HfDeepSpeedConfig, is_deepspeed_zero3_enabled

    model = tiny_llava(tower="dinov2")
    save(model, tmp_path)
    config = HfDeepSpeedConfig({"zero_optimization": {"stage": 3}, "train_micro_batch_size_per_gpu": 1})
    assert is_deepspeed_zero3_enabled()
    loaded = load_pretrained_model(tmp_path, device="cpu")[0]
    assert is_deepspeed_zero3_enabled() and config is not None
    assert not any(hasattr(parameter, "ds_id") for parameter in loaded.parameters())
    assert torch.equal(logits(loaded), logits(model))
    del config
    assert not is_deepspeed_zero3_enabled()
