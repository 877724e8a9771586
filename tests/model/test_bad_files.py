"""Readable but wrong files in a checkpoint: one sentence with the value and the file, before weights are read."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.model.adapters import write_adapter
from tests.model.checkpoints import IDS, logits, save
from tests.tiny import tiny_llava, write_tiny_llm, write_tiny_tower
from tinyllava_switchkd.model import build_model, load_checkpoint_weights, load_pretrained_model
from tinyllava_switchkd.model.weights import refuse_unusable


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return save(tiny_llava(), tmp_path_factory.mktemp("source") / "checkpoint")


@pytest.fixture
def folder(source, tmp_path):
    return Path(shutil.copytree(source, tmp_path / "checkpoint"))


@pytest.fixture(scope="module")
def adapter_source(source, tmp_path_factory):
    return write_adapter(source, tmp_path_factory.mktemp("adapter") / "lora")


@pytest.fixture
def adapter(adapter_source, tmp_path):
    return Path(shutil.copytree(adapter_source, tmp_path / "lora"))


def edit(file: Path, path: str, value) -> None:
    """Set a field, nested by dots; ``...`` removes it."""
    fields = json.loads(file.read_text())
    part = fields
    *parents, name = path.split(".")
    for parent in parents:
        part = part[parent]
    if value is ...:
        del part[name]
    else:
        part[name] = value
    file.write_text(json.dumps(fields))


def refused(folder: Path, *words: str) -> str:
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        load_pretrained_model(folder, device="cpu")
    message = str(error.value)
    assert "\n" not in message and len(message) < 600, message
    for word in words or (str(folder),):
        assert word in message, message
    return message


STRING, OBJECT, LIST = "x", {"a": 1}, ["x"]
CONFIG = {
    "llm_model_name_or_path": [5, True, LIST, OBJECT],
    "tokenizer_name_or_path": [5, OBJECT],
    "vision_model_name_or_path": [5, LIST, OBJECT],
    "vision_model_name_or_path2": [5, LIST],
    "connector_type": [None, 5, LIST, OBJECT, "no-such", "", ...],
    "text_config": [5, "x", LIST, True],
    "vision_config": [5, "x", LIST],
    "vision_feature_layer": ["-2", 1.5, LIST, True, 99, -99, 10**30],
    "vision_feature_select_strategy": [5, "all", LIST],
    "image_aspect_ratio": [5, "anyres", LIST],
    "num_queries": ["x", -1, 0, 1.5, 10**12],
    "num_resampler_layers": [-1, "x"],
    "resampler_hidden_size": [-1, "x"],
    "qformer_config": [5, "x", LIST],
    "pad_token": [5, LIST],
    "pad_token_id": ["x", 1.5, -7, 10**12],
    "tokenizer_padding_side": ["up", 5],
    "tokenizer_model_max_length": ["x", -1, 1.5, 10**15, True],
    "tokenizer_use_fast": ["yes", 1],
    "use_cache": ["no", 5],
    "cache_dir": [5],
    "template": [5, LIST],
    "tune_type_llm": [5],
    "tune_vision_tower_from_layer": ["x", 1.5],
    "hidden_size": ["x", -1, 0, 1.5],
    "vocab_size": ["x", -1],
    "image_token_index": ["x", 1.5],
    "architectures": [5, "x", [5]],
    "dtype": [5, "float99", "int8", LIST],
    "model_type": [5, None, "qwen2", LIST],
    "quantization_config": [{"quant_method": "bitsandbytes"}, "x"],
    "text_config.model_type": [5, "no-such", "siglip_vision_model", LIST],
    "text_config.vocab_size": ["x", -1, 0, 1.5, 10**30, 100, True],
    "text_config.hidden_size": ["x", -32, 0, 1.5, 64, 33, 10**6],
    "text_config.intermediate_size": [-1, "x", 65],
    "text_config.num_hidden_layers": ["x", -1, 0, 1.5, 10**9, 3],
    "text_config.num_attention_heads": [0, -4, "x", 5],
    "text_config.num_key_value_heads": [0, -2, "x", 4],
    "text_config.max_position_embeddings": [-1, 0, "x", 10**15],
    "text_config.rms_norm_eps": [-1, "x", 1e6],
    "text_config.hidden_act": [5, "no-such", LIST],
    "text_config.attention_dropout": [-0.1, 2, "x"],
    "text_config.eos_token_id": ["x", -5, 1.5, 10**12],
    "text_config.pad_token_id": ["x", -5, 10**6],
    "text_config.tie_word_embeddings": ["x", 5],
    "text_config.rope_parameters": [5, "x", {"rope_type": "no-such", "rope_theta": 1e4}, {"rope_theta": -1}],
    "text_config.layer_types": [5, ["no-such", "no-such"], ["full_attention"]],
    "vision_config.model_type": [5, "no-such", "qwen2"],
    "vision_config.hidden_size": ["x", -1, 0, 64, 30],
    "vision_config.num_hidden_layers": ["x", -1, 0, 1],
    "vision_config.num_attention_heads": [0, "x", 5],
    "vision_config.image_size": ["x", -1, 0, 3, 280, 10**6],
    "vision_config.patch_size": ["x", -1, 0, 14, 100],
    "vision_config.num_channels": [1, "x", 0],
    "vision_config.layer_norm_eps": [-1, "x"],
    "vision_config.hidden_act": [5, "no-such"],
    "vision_config.intermediate_size": [0, "x", 65],
}
CASES = [(path, value) for path, values in CONFIG.items() for value in values]


@pytest.mark.parametrize(
    ("path", "value"), CASES, ids=[f"{path}={json.dumps(v, default=repr)}"[:60] for path, v in CASES]
)
def test_a_field_of_config_json(folder, path, value, monkeypatch):
    edit(folder / "config.json", path, value)
    sizes = {"hidden_size", "vocab_size", "intermediate_size", "num_hidden_layers", "num_key_value_heads"}
    fits_weights = isinstance(value, int) and value > 0 and path.split(".")[-1] in {*sizes, "image_size", "patch_size"}
    if not fits_weights:  # wrong sizes show in the weights' shapes; everything else is found before weights are read
        monkeypatch.setattr("tinyllava_switchkd.model.weights.load_file", lambda *_: pytest.fail("weights were read"))
    refused(folder)


@pytest.mark.parametrize(
    "path", ["text_config.rms_norm_eps", "text_config.initializer_range", "vocab_size", "anything"]
)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_values_that_are_not_finite(folder, path, value):
    edit(folder / "config.json", path, value)
    refused(folder, "config.json", str(value))


def test_the_sentence_has_field_value_and_range(folder):
    edit(folder / "config.json", "text_config.num_hidden_layers", -3)
    refused(folder, "config.json: text_config.num_hidden_layers is -3, not a whole number from 1 to 2000.")


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("model_args", {"pretrained": True}),
        ("model_args", {"checkpoint_path": "/x.pth"}),
        ("model_args", {"pretrained_cfg_overlay": {"file": "/x.pth"}}),
        ("architecture", "hf-hub:somebody/model"),
        ("architecture", "local-dir:/tmp"),
        ("vision_cfg", {"timm_model_name": "hf-hub:somebody/model"}),
    ],
)
def test_a_tower_s_settings_open_no_other_files(folder, path, value):
    edit(folder / "config.json", f"vision_config.{path}", value)
    refused(folder, "config.json", "would fetch or open other files")


def rewrite(folder: Path, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    save_file(change(tensors) or tensors, folder / "model.safetensors", metadata={"format": "pt"})


NAMES = (
    "language_model.model.layers.1.mlp.up_proj.weight",
    "vision_tower._vision_tower.vision_model.embeddings.patch_embedding.weight",
    "connector._connector.0.bias",
)


class TestWeights:
    @pytest.mark.parametrize("name", NAMES)
    @pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    def test_not_finite(self, folder, name, value, dtype):
        def spoil(tensors):
            tensors[name] = tensors[name].to(dtype).clone()
            tensors[name].view(-1)[-1] = value

        rewrite(folder, spoil)
        refused(folder, f"1 of {load_file(folder / 'model.safetensors')[name].numel()} numbers in {name}")

    @pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.uint8, torch.bool, torch.int32])
    def test_integers(self, folder, dtype):
        rewrite(folder, lambda tensors: tensors.update({NAMES[0]: tensors[NAMES[0]].to(dtype)}))
        refused(folder, NAMES[0], str(dtype).removeprefix("torch."))

    def test_into_an_existing_model(self, folder):
        model = tiny_llava()
        rewrite(folder, lambda tensors: tensors.update({NAMES[2]: tensors[NAMES[2]].fill_(math.nan)}))
        with pytest.raises(ValueError, match=NAMES[2]):
            load_checkpoint_weights(model, folder)
        assert torch.equal(logits(model), logits(tiny_llava()))

    @pytest.mark.parametrize("part", ["llm", "tower", "connector"])
    def test_of_base_models(self, folder, tmp_path, part):
        paths = {"llm": write_tiny_llm(tmp_path / "llm-qwen2"), "tower": write_tiny_tower(tmp_path / "siglip-tiny")}
        paths["connector"] = str(folder)
        file = Path(paths[part]) / "model.safetensors"
        tensors = load_file(file)
        name = next(name for name in tensors if name.endswith("bias") and (part != "connector" or "connector" in name))
        tensors[name][0] = math.nan
        save_file(tensors, file, metadata={"format": "pt"})
        with pytest.raises(ValueError, match=r"1 of [0-9]+ numbers in .*bias"):
            build_model(paths["llm"], paths["tower"], pretrained_connector_path=paths["connector"])

    @pytest.mark.parametrize("place", [0, 12345, 2**20 - 1])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
    def test_every_place_is_looked_at(self, place, dtype):
        tensor = torch.zeros(2**20, dtype=dtype)
        refuse_unusable({"a": tensor}, "x")
        tensor[place] = math.nan
        with pytest.raises(ValueError, match="1 of 1048576 numbers in b"):
            refuse_unusable({"a": torch.zeros(3), "b": tensor}, "x")

    def test_counters_and_empty_tensors_are_accepted(self):
        refuse_unusable({"steps": torch.tensor(3), "none": torch.zeros(0)}, "x", parameters={"w"})


INDEX = {
    "weight_map": [..., None, 5, LIST, {}],
    "weight_map.NAME": [
        5,
        None,
        "../model.safetensors",
        "/etc/passwd",
        "a/b.safetensors",
        "",
        "..",
        "gone.safetensors",
    ],
}
INDEX_CASES = [(path, value) for path, values in INDEX.items() for value in values]


@pytest.mark.parametrize(("path", "value"), INDEX_CASES, ids=map(str, INDEX_CASES))
def test_an_index_of_shards(folder, path, value):
    (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
    tensors = load_file(folder / "model-00001-of-00001.safetensors")
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": dict.fromkeys(tensors, "model-00001-of-00001.safetensors")}))
    load_pretrained_model(folder, device="cpu")
    fields = json.loads(index.read_text())
    if path == "weight_map":
        fields |= {"weight_map": value}
        if value is ...:
            del fields["weight_map"]
    else:
        fields["weight_map"][next(iter(tensors))] = value
    index.write_text(json.dumps(fields))
    refused(folder, "index.json")


ADAPTER = {
    "peft_type": [None, ..., 5, "PROMPT_TUNING", "no-such", LIST],
    "r": [None, 0, -4, 1.5, "x", 10**9, 8, True],
    "lora_alpha": [None, "x", -1, LIST, math.nan],
    "lora_dropout": ["x", -1, 2],
    "target_modules": [None, 5, [5], ["no_such_module"], "no_such_module", {}],
    "bias": [5, "some"],
    "modules_to_save": [5, "x"],
    "rank_pattern": [5, "x"],
    "alpha_pattern": [5, LIST],
    "use_dora": ["x", 5],
    "use_rslora": ["x"],
    "fan_in_fan_out": ["x"],
}
ADAPTER_CASES = [(path, value) for path, values in ADAPTER.items() for value in values]


@pytest.mark.parametrize(("path", "value"), ADAPTER_CASES, ids=map(str, ADAPTER_CASES))
def test_a_field_of_adapter_config_json(adapter, path, value):
    edit(adapter / "adapter_config.json", path, value)
    refused(adapter)


def spoil_adapter(change):
    def apply(folder: Path) -> None:
        tensors = load_file(folder / "adapter_model.safetensors")
        tensors = change(tensors) or tensors
        save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})

    return apply


FIRST = "base_model.model.language_model.model.layers.0.self_attn.q_proj.lora_A.weight"


@pytest.mark.parametrize(
    "change",
    [
        spoil_adapter(lambda tensors: {**tensors, FIRST: tensors[FIRST].fill_(math.nan)}),
        spoil_adapter(lambda tensors: {**tensors, FIRST: tensors[FIRST].to(torch.int32)}),
        spoil_adapter(lambda tensors: {name: tensor for name, tensor in tensors.items() if name != FIRST}),
        spoil_adapter(lambda tensors: {**tensors, "more.lora_A.weight": torch.zeros(4, 4)}),
        spoil_adapter(lambda tensors: {**tensors, FIRST: torch.zeros(4, 9)}),
        lambda folder: (folder / "adapter_model.safetensors").unlink(),
        lambda folder: (folder / "adapter_model.safetensors").write_bytes(b"x" * 100),
        lambda folder: (folder / "adapter_model.safetensors").write_bytes(b""),
        lambda folder: (folder / "adapter_config.json").write_text("[]"),
        lambda folder: (folder / "adapter_config.json").write_text("{"),
        lambda folder: (folder / "adapter_config.json").write_text("{}"),
    ],
)
def test_an_adapter_s_files(adapter, change):
    change(adapter)
    refused(adapter)


TOKENIZER = {
    "empty object": lambda folder: (folder / "tokenizer.json").write_text("{}"),
    "list": lambda folder: (folder / "tokenizer.json").write_text("[]"),
    "cut": lambda folder: (folder / "tokenizer.json").write_text((folder / "tokenizer.json").read_text()[:1000]),
    "empty": lambda folder: (folder / "tokenizer.json").write_text(""),
    "no model": lambda folder: edit(folder / "tokenizer.json", "model", ...),
    "model of no type": lambda folder: edit(folder / "tokenizer.json", "model", {"type": "no-such"}),
    "vocabulary of text": lambda folder: edit(folder / "tokenizer.json", "model.vocab", "x"),
    "empty vocabulary": lambda folder: edit(folder / "tokenizer.json", "model.vocab", {}),
    "negative ids": lambda folder: edit(folder / "tokenizer.json", "model.vocab", {"a": -1}),
    "ids beyond the embeddings": lambda folder: edit(folder / "tokenizer.json", "model.vocab.z", 9999),
    "merges of text": lambda folder: edit(folder / "tokenizer.json", "model.merges", "x"),
    "config is a list": lambda folder: (folder / "tokenizer_config.json").write_text("[]"),
    "config is cut": lambda folder: (folder / "tokenizer_config.json").write_text("{"),
    "class is none": lambda folder: edit(folder / "tokenizer_config.json", "tokenizer_class", 5),
    "end token is a number": lambda folder: edit(folder / "tokenizer_config.json", "eos_token", 5),
}


@pytest.mark.parametrize("change", TOKENIZER.values(), ids=TOKENIZER)
def test_a_tokenizer(folder, change):
    change(folder)
    refused(folder)


def test_a_tokenizer_without_an_end(folder):
    file = folder / "tokenizer_config.json"
    fields = {"tokenizer_class": json.loads(file.read_text())["tokenizer_class"]}
    file.write_text(json.dumps(fields))
    refused(folder, "end token")


def test_more_tokens_than_embeddings(folder):
    edit(folder / "tokenizer.json", "model.vocab.zz", 9999)
    refused(folder, "up to 9999", "only 264 embeddings")


PREPROCESSOR = {
    "image_processor_type": [5, "no-such", "CLIPTextModel"],
    "size": [5.5, "x", LIST, {"height": -1, "width": 28}, {"height": 28}, {"a": 1}, {"height": 56, "width": 56}, 0],
    "image_mean": ["x", [0.5], LIST, [0.5, math.nan, 0.5]],
    "image_std": ["x", [0.5], [0, 0, 0], [1e-9] * 3, [0.5, math.inf, math.nan]],
    "rescale_factor": ["x", math.nan, 1e6],
    "resample": ["x", 99],
    "do_resize": [False],
}
PREPROCESSOR_CASES = [(path, value) for path, values in PREPROCESSOR.items() for value in values]


@pytest.mark.parametrize(("path", "value"), PREPROCESSOR_CASES, ids=map(str, PREPROCESSOR_CASES))
def test_a_field_of_preprocessor_config_json(folder, path, value):
    edit(folder / "preprocessor_config.json", path, value)
    refused(folder, "preprocessor_config.json")


@pytest.mark.parametrize("text", ["{", "[]", '{"eos_token_id": "x"}', '{"eos_token_id": [1.5]}'])
def test_not_a_generation_config(folder, text):
    (folder / "generation_config.json").write_text(text)
    refused(folder, "generation_config.json")


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '"x"', "\x00"])
def test_not_a_preprocessor_config(folder, text):
    (folder / "preprocessor_config.json").write_text(text)
    refused(folder, "preprocessor_config.json")


def test_what_is_right_still_loads(folder, adapter):
    """The checks accept nulls, integers for floats, and unknown fields."""
    for path, value in {
        "text_config.rope_parameters.rope_theta": 10000,
        "text_config.eos_token_id": [1, 2],
        "pad_token_id": None,
        "note": {"what": "an unknown field"},
        "tokenizer_model_max_length": None,
    }.items():
        edit(folder / "config.json", path, value)
    assert logits(load_pretrained_model(folder, device="cpu")[0]).shape[1] == IDS.shape[1] - 1 + 15
    assert not torch.equal(logits(load_pretrained_model(adapter, device="cpu")[0]), logits(tiny_llava()))
