"""The GGUF export: weights under llama.cpp's names, metadata, and refused models.

scripts/export/check_gguf.sh tests llama.cpp itself.
"""

import re

import numpy as np
import pytest

pytest.importorskip("gguf")

import gguf

from tests.model.test_export import write
from tests.tiny import VOCAB_SIZE
from tinyllava_switchkd.model import load_pretrained_model
from tinyllava_switchkd.model.export.__main__ import main
from tinyllava_switchkd.model.export.gguf import to_gguf

EVERY_PATCH = {"vision_feature_select_strategy": "cls_patch"}
CASES = {
    "qwen2": EVERY_PATCH,
    "qwen3": EVERY_PATCH | {"llm": "qwen3", "template": "chatml", "style": "qwen2_instruct"},
    "llama": EVERY_PATCH | {"llm": "llama", "template": "llama"},
    "ldpv2": EVERY_PATCH | {"connector": "ldpv2", "vision": {"image_size": 96, "patch_size": 4}},
}


def read(file):
    """(metadata, tensors) of a file."""
    reader = gguf.GGUFReader(file)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    return fields, {tensor.name: gguf.dequantize(tensor.data, tensor.tensor_type) for tensor in reader.tensors}


@pytest.mark.parametrize("case", CASES)
def test_every_weight_is_there(case, tmp_path):
    write(tmp_path / "ours", **CASES[case])
    to_gguf(tmp_path / "ours", tmp_path / "gguf", "f32")
    model, tokenizer, _, _ = load_pretrained_model(tmp_path / "ours", device="cpu")
    fields, tensors = read(tmp_path / "gguf" / "model.gguf")
    weights = model.language_model.state_dict()
    assert sum(values.size for values in tensors.values()) == sum(p.numel() for p in model.language_model.parameters())
    assert np.array_equal(tensors["token_embd.weight"], weights["model.embed_tokens.weight"])
    assert np.array_equal(tensors["blk.1.ffn_down.weight"], weights["model.layers.1.mlp.down_proj.weight"])
    assert np.array_equal(tensors["blk.1.attn_v.weight"], weights["model.layers.1.self_attn.v_proj.weight"])
    query = weights["model.layers.1.self_attn.q_proj.weight"].numpy()  # [4 heads * 8, 32]
    if case == "llama":  # rows 0, 4, 1, 5, 2, 6, 3, 7 of each head: neighbours are what rotates together
        order = np.concatenate([head * 8 + np.array([0, 4, 1, 5, 2, 6, 3, 7]) for head in range(4)])
        query = query[order]
    assert np.array_equal(tensors["blk.1.attn_q.weight"], query)
    assert fields["general.architecture"] == model.config.text_config.model_type
    assert len(fields["tokenizer.ggml.tokens"]) == VOCAB_SIZE
    for token in ("<|im_start|>", "a"):
        assert fields["tokenizer.ggml.tokens"][tokenizer.convert_tokens_to_ids(token)] == token
    assert "<__media__>" in fields["tokenizer.chat_template"] and "<image>" not in fields["tokenizer.chat_template"]
    assert fields["tokenizer.ggml.eos_token_id"] == tokenizer.eos_token_id

    fields, tensors = read(tmp_path / "gguf" / "mmproj.gguf")
    tower = model.vision_tower.vision_tower.vision_model.state_dict()
    assert fields["general.architecture"] == "clip"
    assert fields["clip.projector_type"] == ("ldpv2" if case == "ldpv2" else "mlp")
    assert fields["clip.vision.block_count"] == 2  # the last layer but one of three
    assert list(fields["clip.vision.feature_layer"]) == [2]
    assert np.array_equal(tensors["v.blk.1.attn_out.bias"], tower["encoder.layers.1.self_attn.out_proj.bias"])
    assert np.array_equal(tensors["v.blk.0.ffn_up.weight"], tower["encoder.layers.0.mlp.fc1.weight"])
    assert np.array_equal(tensors["v.patch_embd.weight"], tower["embeddings.patch_embedding.weight"])
    connector = [parameter.detach().numpy() for parameter in model.connector.parameters()]
    first = "mm.model.mlp.0.weight" if case == "ldpv2" else "mm.0.weight"
    assert np.array_equal(tensors[first], connector[0])


@pytest.mark.parametrize(("dtype", "allowed"), [("f16", 0.0005), ("q8_0", 0.005), ("q4_0", 0.15)])
def test_smaller_types(dtype, allowed, tmp_path):
    write(tmp_path / "ours", **EVERY_PATCH)
    to_gguf(tmp_path / "ours", tmp_path / "gguf", dtype)
    kinds = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(tmp_path / "gguf/model.gguf").tensors}
    assert kinds["blk.0.attn_q.weight"] == dtype.upper() and kinds["output_norm.weight"] == "F32"
    model, _, _, _ = load_pretrained_model(tmp_path / "ours", device="cpu")
    weight = model.language_model.state_dict()["model.layers.0.mlp.up_proj.weight"].numpy()
    found = read(tmp_path / "gguf" / "model.gguf")[1]["blk.0.ffn_up.weight"]
    assert 0 < np.abs(found - weight).max() <= allowed * np.abs(weight).max()


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({}, "all 16 patches, .* without the first \\(15\\); train with --mm_vision_select_feature cls_patch"),
        ({"tower": "clip"}, "class token"),
        ({"connector": "linear", **EVERY_PATCH}, "not 'linear'"),
        ({"connector": "ldpv2", **EVERY_PATCH}, "24 x 24 patches, not of 4 x 4"),
        ({"llm": "phi", "template": "phi", **EVERY_PATCH}, "not 'phi'"),
    ],
    ids=["patch", "class token", "connector", "grid", "language model"],
)
def test_what_does_not_fit_is_refused_before_anything_is_written(arguments, reason, tmp_path, capsys):
    write(tmp_path / "ours", **arguments)
    with pytest.raises(SystemExit) as exit_:
        main(["--to", "gguf", str(tmp_path / "ours"), str(tmp_path / "gguf")])
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert exit_.value.code == 1 and re.search(reason, error)
    assert [path.name for path in tmp_path.iterdir()] == ["ours"]


def test_approximate_is_measured(tmp_path):
    write(tmp_path / "ours")
    found = to_gguf(tmp_path / "ours", tmp_path / "gguf", allow_approximate=True)["every_patch"]
    assert found["logits"] > 0 and found["questions"] == 4
