"""Connectors: v1's key names, and outputs against plain formulas or the library's own model."""

import pytest
import torch
import torch.nn.functional as F
from transformers import Blip2QFormerConfig, Blip2QFormerModel

from tests.tiny import tiny_config, tiny_llava, write_tiny_llm, write_tiny_tower
from tinyllava_switchkd.model import ConnectorFactory, build_model

QFORMER = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96}


def connector(name, **kwargs):
    torch.manual_seed(0)
    return ConnectorFactory(name)(tiny_config(connector=name, vision={"hidden": 24}, **kwargs)).eval()


def test_mlp_and_linear():
    x = torch.randn(2, 5, 24)
    module = connector("mlp2x_gelu")
    assert list(module.state_dict()) == [f"_connector.{i}.{n}" for i in (0, 2) for n in ("weight", "bias")]
    first, _, last = module._connector
    assert torch.allclose(module(x), last(F.gelu(first(x))))
    assert list(connector("linear").state_dict()) == ["_connector.weight", "_connector.bias"]
    assert len(connector("mlp3x_gelu")._connector) == 5
    assert module.num_tokens(728) == 728


@pytest.mark.parametrize("name", ["mlp2x_relu", "mlp", "mlp0x_gelu"])
def test_unknown_mlps_are_refused(name):
    with pytest.raises(ValueError, match="mlp2x_gelu"):
        connector(name)


def test_identity_needs_one_width():
    with pytest.raises(ValueError, match=r"24 and the language model 32.*linear"):
        connector("identity")
    x = torch.randn(1, 3, 32)
    assert torch.equal(ConnectorFactory("identity")(tiny_config(connector="identity"))(x), x)


def test_mof_mlp_treats_even_and_odd_tokens_apart():
    module = connector("mof_mlp")
    x = torch.randn(2, 6, 24)
    clip, dinov2 = module._connector.clip(x[:, 0::2]), module._connector.dinov2(x[:, 1::2])
    expected = torch.empty(2, 6, 32)
    expected[:, 0::2], expected[:, 1::2] = clip, dinov2
    assert torch.allclose(module(x), expected)


def test_ldpv2_is_mobilevlms():
    """MLP, 2x2 mean, depth-wise convolution with a residual; parameter counts as computed for MobileVLM."""
    module = connector("ldpv2")
    keys = [f"_connector.mlp.mlp.{i}.{n}" for i in (0, 2) for n in ("weight", "bias")]
    assert list(module.state_dict()) == [*keys, "_connector.peg.peg.0.weight", "_connector.peg.peg.0.bias"]
    x = torch.randn(2, 16, 24)
    hidden = module._connector.mlp.mlp(x).transpose(1, 2).reshape(2, 32, 4, 4)
    pooled = F.avg_pool2d(hidden, 2)
    weight, bias = module._connector.peg.peg[0].weight, module._connector.peg.peg[0].bias
    expected = pooled + F.conv2d(pooled, weight, bias, padding=1, groups=32)
    assert torch.allclose(module(x), expected.flatten(2).transpose(1, 2), atol=1e-6)
    assert module.num_tokens(576) == 144 and module.num_tokens(729) == 169
    from tinyllava_switchkd.model.connector.ldpv2 import LDPv2

    with torch.device("meta"):
        counts = [sum(p.numel() for p in LDPv2(1024, width).parameters()) for width in (896, 1536, 2048)]
    assert counts == [1_731_072, 3_950_592, 6_316_032]
    assert LDPv2(8, 8)(torch.randn(1, 25, 8)).shape == (1, 4, 8)  # an odd side


def test_ldpv2_refuses_siglips_728_tokens_with_the_remedy():
    with pytest.raises(ValueError, match=r"728.*cls_patch"):
        connector("ldpv2").num_tokens(728)
    with pytest.raises(ValueError, match=r"577.*'patch'"):
        connector("ldpv2").num_tokens(577)
    with pytest.raises(ValueError, match="cls_patch"):
        tiny_llava(connector="ldpv2")  # a SigLIP tower under the strategy patch: refused when built
    assert tiny_llava(connector="ldpv2", vision_feature_select_strategy="cls_patch").num_image_tokens == 4
    assert tiny_llava(tower="clip", connector="ldpv2").num_image_tokens == 4


def test_resampler_is_v1s():
    """Compared with explicit attention: queries over media and latents, 8 heads of 64, scale 1/8."""
    module = connector("resampler")
    layer = {f"0.{n}" for n in ("norm_media", "norm_latents", "to_q", "to_kv", "to_out")} | {"1.0", "1.1", "1.3"}
    stems = {key.rsplit(".", 1)[0].removeprefix("_connector.") for key in module.state_dict()} - {"_connector"}
    assert stems == {"linear", "norm"} | {f"layers.{i}.{n}" for i in (0, 1) for n in layer}
    assert "_connector.latents" in module.state_dict()
    net, x = module._connector, torch.randn(2, 5, 24)
    media = net.linear(x)
    latents = net.latents.expand(2, -1, -1)
    for attention, feed in net.layers:
        normed = attention.norm_latents(latents)
        both = torch.cat([attention.norm_media(media), normed], dim=1)
        key, value = attention.to_kv(both).split(512, dim=-1)
        heads = []
        for head in range(8):
            part = slice(64 * head, 64 * head + 64)
            scores = attention.to_q(normed)[..., part] @ key[..., part].transpose(1, 2) / 8
            heads.append(scores.softmax(-1) @ value[..., part])
        latents = attention.to_out(torch.cat(heads, dim=-1)) + latents
        latents = feed(latents) + latents
    assert torch.allclose(module(x), net.norm(latents), atol=1e-5)
    assert module.num_tokens(728) == 4
    with pytest.raises(ValueError, match="num_queries"):
        connector("resampler", num_queries=None)


def test_qformer_is_the_librarys_under_v1s_names():
    module = connector("qformer", qformer_config=QFORMER)
    keys = set(module.state_dict())
    prefix = "_connector.bert.encoder.layer.0."
    for stem in (
        "attention.self.query",
        "crossattention.self.key",
        "attention.output.dense",
        "intermediate_query.dense",
    ):
        assert f"{prefix}{stem}.weight" in keys
    assert "_connector.bert.encoder.layer.1.crossattention.self.key.weight" not in keys  # every other layer
    assert not any("embeddings" in key or ".attention.attention." in key for key in keys)
    assert module._connector.bert.encoder.layer[0].crossattention.attention.key.in_features == 24

    library = Blip2QFormerModel(Blip2QFormerConfig(encoder_hidden_size=24, **QFORMER)).eval()
    own = {k.removeprefix("_connector.bert."): v for k, v in module.state_dict().items() if ".bert." in k}
    renamed = {k.replace("attention.self.", "attention.attention."): v for k, v in own.items()}
    missing, unexpected = library.load_state_dict(renamed, strict=False)
    assert set(missing) == {"layernorm.weight", "layernorm.bias"} and not unexpected  # ones and zeros: no affine part
    x = torch.randn(2, 5, 24)
    queries = module._connector.query_tokens.expand(2, -1, -1)
    expected = library(query_embeds=queries, encoder_hidden_states=x).last_hidden_state
    assert torch.allclose(module(x), module._connector.projector(expected), atol=1e-5)
    assert module.num_tokens(728) == 4


def test_qformer_defaults_to_bert_base():
    with torch.device("meta"):
        module = connector("qformer")
    layers = module._connector.bert.encoder.layer
    assert len(layers) == 12 and module._connector.query_tokens.shape == (1, 4, 768)
    assert layers[0].intermediate_query.dense.out_features == 3072 and module._connector.eps == 1e-12


def test_qformer_geometry_is_read_off_the_weights():
    module = connector("qformer", qformer_config={**QFORMER, "num_attention_heads": 1})
    config = tiny_config(connector="qformer", vision={"hidden": 24})
    type(module).complete_config(config, {f"connector.{k}": v for k, v in module.state_dict().items()})
    assert config.qformer_config == {**QFORMER, "num_attention_heads": 1}


@pytest.mark.parametrize("name", ["linear", "mlp2x_gelu", "ldpv2", "resampler", "qformer", "mof_mlp"])
def test_every_parameter_gets_a_gradient(name):
    module = connector(name, qformer_config=QFORMER)
    module(torch.randn(2, 16, 24)).square().sum().backward()
    assert all(
        p.grad is not None and p.grad.abs().sum() > 0 for n, p in module.named_parameters() if "key.bias" not in n
    )


def test_v1s_folder_of_a_connector(tmp_path):
    """It can be used for a new model, or is refused before the model is built."""
    parts = write_tiny_llm(tmp_path / "qwen2-llm"), write_tiny_tower(tmp_path / "siglip-tower")
    first = build_model(*parts, "mlp2x_gelu")[0].connector
    for name in ("connector", "empty"):
        (tmp_path / name).mkdir()
    torch.save({k: v + 1 for k, v in first.state_dict().items()}, tmp_path / "connector" / "pytorch_model.bin")
    again = build_model(*parts, "mlp2x_gelu", pretrained_connector_path=tmp_path / "connector")[0].connector
    assert torch.equal(again._connector[0].weight, first._connector[0].weight + 1)
    with pytest.raises(ValueError, match="missing"):
        build_model(*parts, "linear", pretrained_connector_path=tmp_path / "connector")
    with pytest.raises(FileNotFoundError, match="no connector"):
        build_model(*parts, "linear", pretrained_connector_path=tmp_path / "empty")
