"""Vision towers compared with the libraries' own hidden states, for every layer and strategy."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from transformers import AutoModel, CLIPVisionModel, Dinov2Model

from tests.tiny import tiny_llava, tiny_vision_config, write_tiny_llm, write_tiny_tower
from tinyllava_switchkd.model import TinyLlavaConfig, VisionTowerFactory, build_model
from tinyllava_switchkd.model.vision_tower.base import flatten_images
from tinyllava_switchkd.model.vision_tower.transformers_towers import dinov2_positions


def tower_of(name, seed=0, **kwargs):
    torch.manual_seed(seed)
    return VisionTowerFactory(name)(tiny_vision_config(name, **kwargs)).eval()


def encoder_of(tower):
    return getattr(tower.vision_tower, "vision_model", tower.vision_tower)


@pytest.mark.parametrize("name", ["siglip", "clip", "dinov2"])
@pytest.mark.parametrize("layer", [-1, -2, -4, 0, 3])
def test_hidden_states_are_the_librarys(name, layer):
    tower = tower_of(name)
    pixels = torch.randn(2, 3, 28, 28)
    states = encoder_of(tower)(pixels, output_hidden_states=True).hidden_states
    assert torch.allclose(tower(pixels, layer, "cls_patch"), states[layer], atol=1e-6)
    # v1's quirk: 'patch' drops the first token of every tower, SigLIP's first patch included.
    assert torch.allclose(tower(pixels, layer, "patch"), states[layer][:, 1:], atol=1e-6)


@pytest.mark.parametrize(
    ("name", "patch", "cls_patch"), [("siglip", 15, 16), ("siglip2", 15, 16), ("clip", 16, 17), ("dinov2", 16, 17)]
)
def test_token_counts(name, patch, cls_patch):
    tower = tower_of(name)
    pixels = torch.randn(1, 3, tower.image_size, tower.image_size)
    for strategy, count in (("patch", patch), ("cls_patch", cls_patch)):
        assert tower.num_tokens(strategy) == count == tower(pixels, -2, strategy).shape[1]
    assert tower.width == 32 == tower(pixels).shape[-1] and tower.image_size == 28
    with pytest.raises(ValueError, match="cls_patch, not 'cls'"):
        tower.num_tokens("cls")
    with pytest.raises(ValueError, match="vision_feature_layer is -5"):
        tower(pixels, -5)


def test_siglip_at_full_size_has_728_tokens():
    fields = {"image_size": 384, "patch_size": 14, "hidden": 16, "layers": 1}
    with torch.device("meta"):
        tower = VisionTowerFactory("siglip")(tiny_vision_config("siglip", **fields))
    assert (tower.num_tokens("patch"), tower.num_tokens("cls_patch")) == (728, 729)


def test_naflex_takes_square_images_as_patches():
    tower = tower_of("siglip2")
    pixels = torch.randn(2, 3, 28, 28)
    patches = torch.nn.functional.unfold(pixels, 7, stride=7).transpose(1, 2)  # [2, 16, 3*49], channels first
    patches = patches.reshape(2, 16, 3, 49).transpose(2, 3).reshape(2, 16, 147)  # NaFlex: channels last
    shapes = torch.tensor([[4, 4]] * 2)
    mask = torch.ones(2, 16, dtype=torch.long)
    expected = encoder_of(tower)(patches, mask, shapes, output_hidden_states=True).hidden_states[-2]
    assert torch.allclose(tower(pixels, -2, "cls_patch"), expected, atol=1e-5)


def test_siglip2_at_fixed_resolution_is_siglip():
    config = tiny_vision_config("siglip")
    torch.manual_seed(0)
    tower = VisionTowerFactory("google/siglip2-so400m-patch14-384")(config).eval()
    pixels = torch.randn(1, 3, 28, 28)
    assert torch.equal(tower(pixels), tower_of("siglip")(pixels))


def test_dinov2_interpolates_positions_as_v1_did():
    """transformers 4.40: a scale factor with 0.1 patch added; the published models get 224 pixels, not 518."""
    positions = torch.randn(1, 17, 8)
    assert dinov2_positions(positions, 4, 4) is positions
    got = dinov2_positions(positions, 6, 6)
    grid = positions[:, 1:].reshape(1, 4, 4, 8).permute(0, 3, 1, 2)
    factor = 6.1 / 4
    expected = torch.nn.functional.interpolate(grid, scale_factor=(factor, factor), mode="bicubic")
    assert got.shape == (1, 37, 8) and torch.allclose(got[:, 1:], expected.flatten(2).transpose(1, 2))
    with torch.device("meta"):
        full = VisionTowerFactory("dinov2")(tiny_vision_config("dinov2", image_size=518, patch_size=14, layers=1))
    assert full.image_size == 224 and full.num_tokens() == 256
    tower = tower_of("dinov2")
    assert tower(torch.randn(1, 3, 42, 42)).shape == (1, 36, 32)


def mof_config(**kwargs):
    config = tiny_vision_config("clip")
    config.dinov2_config = tiny_vision_config("dinov2", **kwargs).to_diff_dict()
    return config


@pytest.mark.parametrize(("strategy", "first"), [("patch", 1), ("cls_patch", 0)])
def test_mof_interleaves_clip_and_dinov2(strategy, first):
    torch.manual_seed(0)
    tower = VisionTowerFactory("mof")(mof_config()).eval()
    assert {key.split(".")[1] for key in tower.state_dict()} == {"clip", "dinov2"}
    assert any(key.startswith("_vision_tower.clip.vision_model.") for key in tower.state_dict())
    pixels = torch.randn(2, 3, 28, 28)
    clip = tower.vision_tower.clip.vision_model(pixels, output_hidden_states=True).hidden_states[-2][:, first:]
    dinov2 = tower.vision_tower.dinov2(pixels, output_hidden_states=True).hidden_states[-2][:, first:]
    got = tower(pixels, -2, strategy)
    assert torch.allclose(got[:, 0::2], clip, atol=1e-6) and torch.allclose(got[:, 1::2], dinov2, atol=1e-6)
    assert got.shape[1] == tower.num_tokens(strategy)
    with pytest.raises(ValueError, match="CLIP has 32 and 7, DINOv2 16"):
        VisionTowerFactory("mof")(mof_config(hidden=16))


def test_mof_from_base_folders(tmp_path):
    clip, dinov2 = write_tiny_tower(tmp_path / "clip", "clip"), write_tiny_tower(tmp_path / "dinov2", "dinov2")
    tower_class = VisionTowerFactory(f"mof:{clip}")
    tower = tower_class(tower_class.load_config(f"mof:{clip}", f"mof:{dinov2}"))
    tower.vision_tower.load_state_dict(tower.base_state_dict(f"mof:{clip}", f"mof:{dinov2}"))
    pixels = torch.randn(1, 3, 28, 28)
    expected = Dinov2Model.from_pretrained(dinov2)(pixels, output_hidden_states=True).hidden_states[-2][:, 1:]
    assert torch.allclose(tower(pixels)[:, 1::2], expected, atol=1e-6)
    expected = CLIPVisionModel.from_pretrained(clip)(pixels, output_hidden_states=True).hidden_states[-2][:, 1:]
    assert torch.allclose(tower(pixels)[:, 0::2], expected, atol=1e-6)
    with pytest.raises(ValueError, match="vision_tower2"):
        tower_class.load_config(f"mof:{clip}")


@pytest.mark.parametrize("name", ["siglip", "clip", "dinov2", "siglip2"])
def test_base_folders_load_exactly(tmp_path, name):
    folder = write_tiny_tower(tmp_path / f"{name}-tiny", name)
    tower_class = VisionTowerFactory(folder)
    tower = tower_class(tower_class.load_config(folder)).eval()
    tower.vision_tower.load_state_dict(tower.base_state_dict(folder))
    library = AutoModel.from_pretrained(folder).eval()
    own = encoder_of(tower).state_dict()
    assert all(torch.equal(value, own[key]) for key, value in library.state_dict().items())


def test_both_towers_of_a_clip_repository_are_told_apart(tmp_path):
    from transformers import CLIPConfig, CLIPModel

    text = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "vocab_size": 9,
    }
    vision = tiny_vision_config("clip").to_dict()
    clip = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8))
    clip.save_pretrained(tmp_path / "clip-tiny")
    tower_class = VisionTowerFactory("clip")
    tower = tower_class(tower_class.load_config(str(tmp_path / "clip-tiny")))
    tower.vision_tower.load_state_dict(tower.base_state_dict(str(tmp_path / "clip-tiny")))
    expected = clip.vision_model.state_dict()
    assert all(torch.equal(expected[key], value) for key, value in encoder_of(tower).state_dict().items())


def test_weights_of_another_shape_are_refused(tmp_path):
    llm, tower = write_tiny_llm(tmp_path / "qwen2-llm"), write_tiny_tower(tmp_path / "siglip-tower")
    other = write_tiny_tower(tmp_path / "siglip-other", "siglip", hidden=16)
    with pytest.raises(ValueError, match=r"another shape.*\[16"):
        build_model(llm, tower, pretrained_vision_tower_path=other)


# timm and open_clip: real models, built from the libraries' own configurations


@pytest.fixture(scope="module")
def timm_folder(tmp_path_factory):
    """A small vision transformer in timm's own folder format."""
    import timm

    folder = tmp_path_factory.mktemp("timm")
    args = {"img_size": 28, "patch_size": 7, "embed_dim": 32, "depth": 3, "num_heads": 4}
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", num_classes=0, **args)
    save_file(model.state_dict(), folder / "model.safetensors")
    cfg = {"input_size": [3, 28, 28], "mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.4], "interpolation": "bicubic"}
    description = {"architecture": "vit_tiny_patch16_224", "num_classes": 0, "model_args": args, "pretrained_cfg": cfg}
    (folder / "config.json").write_text(json.dumps(description))
    return folder, model.eval()


def test_timm_folder(timm_folder):
    folder, model = timm_folder
    name = f"timm:local-dir:{folder}"
    tower_class = VisionTowerFactory(name)
    config = tower_class.load_config(name)
    assert (config.architecture, config.hidden_size, config.num_hidden_layers) == ("vit_tiny_patch16_224", 32, 3)
    tower = tower_class(config).eval()
    tower.vision_tower.load_state_dict(tower.base_state_dict(name))
    pixels = torch.randn(2, 3, 28, 28)
    patches, prefix = model.forward_intermediates(
        pixels, indices=[1], intermediates_only=True, output_fmt="NLC", return_prefix_tokens=True
    )[0]
    assert torch.allclose(tower(pixels, -2, "patch"), patches, atol=1e-6)
    assert torch.allclose(tower(pixels, -2, "cls_patch"), torch.cat([prefix, patches], dim=1), atol=1e-6)
    assert (tower.num_tokens("patch"), tower.num_tokens("cls_patch"), tower.image_size) == (16, 17, 28)
    processor = tower.image_processor
    assert tuple(processor.image_mean) == (0.5, 0.4, 0.3) and tuple(processor.image_std) == (0.2, 0.3, 0.4)
    with pytest.raises(ValueError, match=r"choose one of \[1, 2, 3\]"):
        tower(pixels, 0)


@pytest.mark.parametrize("name", ["timm:test_vit", "timm:test_vit4", "timm:vit_tiny_patch16_224", "timm:test_convnext"])
def test_timm_models_by_name(name):
    tower_class = VisionTowerFactory(name)
    tower = tower_class(tower_class.load_config(name)).eval()
    layer = -1 if "convnext" in name else -2
    features = tower(torch.randn(1, 3, tower.image_size, tower.image_size), layer)
    assert features.shape == (1, tower.num_tokens("patch"), tower.width)


def test_timm_pyramids_only_offer_their_last_width():
    tower_class = VisionTowerFactory("timm:test_convnext")
    tower = tower_class(tower_class.load_config("timm:test_convnext"))
    with pytest.raises(ValueError, match="another width"):
        tower(torch.randn(1, 3, 160, 160), 1)
    with pytest.raises(ValueError, match="no model 'no_such_model'"):
        tower_class.load_config("timm:no_such_model")


@pytest.fixture(scope="module")
def open_clip_folder(tmp_path_factory):
    """A small CLIP in open_clip's own folder format."""
    import open_clip

    folder = tmp_path_factory.mktemp("open_clip")
    vision = {"image_size": 28, "patch_size": 7, "width": 32, "layers": 3, "head_width": 8}
    text = {"context_length": 8, "vocab_size": 50, "width": 16, "heads": 2, "layers": 1}
    description = {
        "model_cfg": {"embed_dim": 16, "quick_gelu": True, "vision_cfg": vision, "text_cfg": text},
        "preprocess_cfg": {"mean": [0.1, 0.2, 0.3], "std": [0.5, 0.5, 0.5]},
    }
    (folder / "open_clip_config.json").write_text(json.dumps(description))
    torch.manual_seed(0)
    model = open_clip.create_model(f"local-dir:{folder}", load_weights=False)
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    return folder, model.eval()


def test_open_clip_folder(open_clip_folder):
    folder, model = open_clip_folder
    name = f"open_clip:local-dir:{folder}"
    tower_class = VisionTowerFactory(name)
    tower = tower_class(tower_class.load_config(name)).eval()
    tower.vision_tower.load_state_dict(tower.base_state_dict(name))
    pixels = torch.randn(2, 3, 28, 28)
    hidden = model.visual._embeds(pixels)
    for block in model.visual.transformer.resblocks[:2]:
        hidden = block(hidden)
    assert torch.allclose(tower(pixels, -2, "cls_patch"), hidden, atol=1e-6)
    assert torch.allclose(tower(pixels, -2, "patch"), hidden[:, 1:], atol=1e-6)
    assert tower.config.quick_gelu and tuple(tower.image_processor.image_mean) == (0.1, 0.2, 0.3)
    with pytest.raises(ValueError, match="embeddings"):
        tower(pixels, 0)


def test_open_clip_names():
    tower_class = VisionTowerFactory("open_clip:ViT-B-32")
    config = tower_class.load_config("open_clip:ViT-B-32/openai")
    assert (config.hidden_size, config.patch_size, config.num_hidden_layers, config.quick_gelu) == (768, 32, 12, True)
    siglip = tower_class.load_config("open_clip:ViT-B-16-SigLIP/webli")  # a timm trunk: no class token
    assert (siglip.hidden_size, siglip.num_prefix_tokens, siglip.image_mean) == (768, 0, [0.5, 0.5, 0.5])
    with torch.device("meta"):
        tower = tower_class(siglip)
    assert tower.num_tokens("patch") == 196
    for name, match in (("open_clip:none", "list_models"), ("open_clip:RN50", "ResNets")):
        with pytest.raises(ValueError, match=match):
            tower_class.load_config(name)
    with pytest.raises(ValueError, match=r"ViT-B-32/TAG.*openai"):
        tower.base_state_dict("open_clip:ViT-B-32")


def test_freeze_unused_in_a_tower_that_reads_its_own_numbers():
    """Such an encoder cannot run on the meta device."""

    class Reader(VisionTowerFactory("siglip")):
        def hidden_state(self, pixels, num_layers):
            return super().hidden_state(pixels, num_layers) * max(1.0, float(pixels.abs().max()))

    tower = Reader(tiny_vision_config("siglip"))
    assert tower.freeze_unused(-2) == tower_of("siglip").freeze_unused(-2) > 0


@pytest.mark.parametrize("kind", ["timm", "open_clip"])
def test_library_towers_in_a_saved_model(kind, timm_folder, open_clip_folder, tmp_path):
    """Saved, loaded without the library's folder, and checkpointed: the features are the same and no buffer is lost."""
    folder = (timm_folder if kind == "timm" else open_clip_folder)[0]
    name = f"{kind}:local-dir:{folder}"
    config = VisionTowerFactory(name).load_config(name)
    model = tiny_llava(vision_model_name_or_path=name)
    from tinyllava_switchkd.model import TinyLlavaForConditionalGeneration

    fields = {"text_config": model.config.text_config, "vision_config": config, "connector_type": "mlp2x_gelu"}
    model = TinyLlavaForConditionalGeneration(TinyLlavaConfig(**fields, vision_model_name_or_path=name)).eval()
    model.save_pretrained(tmp_path)
    assert str(folder.parent) not in (tmp_path / "config.json").read_text()
    loaded = TinyLlavaForConditionalGeneration.from_pretrained(tmp_path)
    pixels = torch.randn(1, 3, 28, 28)
    assert torch.equal(loaded.encode_images(pixels), model.encode_images(pixels))
    loaded.gradient_checkpointing_enable()
    assert torch.allclose(loaded.train().encode_images(pixels), model.encode_images(pixels), atol=1e-6)


def test_rotary_buffers_survive_loading(tmp_path):
    """EVA's rotary embedding is a buffer that no checkpoint stores."""
    from tinyllava_switchkd.model import TinyLlavaForConditionalGeneration

    args = {"img_size": 28, "patch_size": 7, "embed_dim": 32, "depth": 2, "num_heads": 2}
    tower_class = VisionTowerFactory("timm")
    config = tower_class.load_config("timm:eva02_tiny_patch14_224")
    config = type(config)(**{**config.to_dict(), "model_args": args, "hidden_size": 32, "num_hidden_layers": 2})
    config.image_size, config.patch_size = 28, 7
    base = tiny_llava().config
    fields = {"text_config": base.text_config, "vision_config": config, "connector_type": "linear"}
    model = TinyLlavaForConditionalGeneration(TinyLlavaConfig(**fields, vision_model_name_or_path="timm:eva")).eval()
    model.save_pretrained(tmp_path)
    loaded = TinyLlavaForConditionalGeneration.from_pretrained(tmp_path)
    pixels = torch.randn(1, 3, 28, 28)
    assert torch.equal(loaded.encode_images(pixels), model.encode_images(pixels))


# what trains, and image processors


@pytest.mark.parametrize("name", ["siglip", "clip", "dinov2", "siglip2"])
@pytest.mark.parametrize("layer", [-1, -2])
def test_freeze_unused_leaves_exactly_the_parameters_with_gradients(name, layer):
    model = tiny_llava(tower=name, vision_feature_layer=layer).train()
    model.requires_grad_(True)
    assert model.freeze_unused_parameters() > 0
    assert model.freeze_unused_parameters() == 0
    ids = torch.tensor([[1, -200, 2, 3]])
    model(input_ids=ids, labels=ids.clamp(min=0), images=torch.randn(1, 3, 28, 28)).loss.backward()
    for parameter_name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, parameter_name


@pytest.mark.parametrize("name", ["timm", "open_clip"])
def test_freeze_unused_in_library_towers(name, timm_folder, open_clip_folder):
    folder = (timm_folder if name == "timm" else open_clip_folder)[0]
    tower_class = VisionTowerFactory(name)
    tower = tower_class(tower_class.load_config(f"{name}:local-dir:{folder}"))
    tower.freeze_unused(-2)
    tower(torch.randn(1, 3, 28, 28)).sum().backward()
    assert all((p.grad is not None) == p.requires_grad for p in tower.parameters())


@pytest.mark.parametrize("name", ["siglip", "clip", "dinov2", "siglip2"])
def test_image_processor_with_and_without_the_base_folder(tmp_path, name):
    folder = write_tiny_tower(tmp_path / f"{name}-tiny", name)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 70, 3), dtype=np.uint8))
    tower = tower_of(name)
    default = tower.image_processor(image, return_tensors="np")["pixel_values"]
    tower = tower_of(name)
    tower.config.model_name_or_path = folder
    read = tower.image_processor(image, return_tensors="np")["pixel_values"]
    assert type(tower.image_processor).__name__.endswith("Pil")
    assert np.array_equal(default, read) and default.shape == (1, 3, 28, 28)


def test_flatten_images():
    images = torch.randn(4, 3, 8, 8)
    assert torch.equal(flatten_images(images.reshape(2, 2, 3, 8, 8)), images)
    assert torch.equal(flatten_images([images[0], images[1:]]), images)
    assert torch.equal(flatten_images(images[0]), images[:1])
    with pytest.raises(ValueError, match="same size"):
        flatten_images([images[0], images[0, :, :4]])
    with pytest.raises(ValueError, match="shape"):
        flatten_images(images[:, :2])


@pytest.mark.parametrize("name", ["siglip", "siglip2", "clip"])
def test_images_of_another_size_are_refused(name):
    with pytest.raises(ValueError, match="28 x 28 pixels, not of 21 x 28"):
        tower_of(name)(torch.zeros(1, 3, 21, 28))
