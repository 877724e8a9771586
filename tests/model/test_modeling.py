"""The model: forward, loss, generation, injected features, checkpointing, attention implementations."""

import pytest
import torch
import torch.nn.functional as F
from transformers import GenerationConfig

from tests.tiny import tiny_llava
from tinyllava_switchkd.constants import IGNORE_INDEX
from tinyllava_switchkd.model import TinyLlavaConfig

LLMS = ["qwen2", "qwen3", "llama", "phi", "gemma", "stablelm"]
TOWERS = ["siglip", "siglip2", "clip", "dinov2"]


def batch(samples=2, length=8, seed=0, images=1):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 250, (samples, length), generator=generator)
    ids[:, 1 : 1 + images] = -200
    labels = torch.where(torch.arange(length) > 4, ids, IGNORE_INDEX)
    pixels = torch.randn(samples * images, 3, 28, 28, generator=generator)
    return {"input_ids": ids, "labels": labels, "attention_mask": torch.ones_like(ids), "images": pixels}


@pytest.mark.parametrize("llm", LLMS)
def test_every_language_model_learns(llm):
    model = tiny_llava(llm).train()
    output = model(**batch())
    output.loss.backward()
    assert output.logits.shape == (2, 8 - 1 + 15, 264) and torch.isfinite(output.loss)
    for part in ("language_model", "connector"):
        assert all(p.grad is not None for p in getattr(model, part).parameters())


@pytest.mark.parametrize("tower", TOWERS)
def test_every_tower_gets_gradients(tower):
    model = tiny_llava(tower=tower).train()
    model(**batch()).loss.backward()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in model.vision_tower.parameters())


def test_spliced_labels_and_image_mask_come_back():
    model = tiny_llava()
    data = batch()
    output = model(**data)
    assert output.labels.shape == output.image_mask.shape == (2, 22)
    assert output.image_mask[:, 1:16].all() and output.image_mask.sum() == 30
    assert (output.labels[output.image_mask] == IGNORE_INDEX).all()
    assert (output.labels != IGNORE_INDEX).sum() == (data["labels"] != IGNORE_INDEX).sum()


def test_loss_is_next_token_cross_entropy():
    model = tiny_llava()
    data = batch()
    output = model(**data)
    shifted, targets = output.logits[:, :-1].flatten(0, 1), output.labels[:, 1:].flatten()
    assert torch.allclose(output.loss, F.cross_entropy(shifted, targets, ignore_index=IGNORE_INDEX))
    total = F.cross_entropy(shifted, targets, ignore_index=IGNORE_INDEX, reduction="sum")
    assert torch.allclose(model(**data, num_items_in_batch=100).loss, total / 100)
    assert torch.allclose(model(**data, num_items_in_batch=torch.tensor(100)).loss, total / 100)


def test_accumulated_loss_equals_the_whole_batch():
    model = tiny_llava()
    data = batch(4)
    data["labels"][0, :7] = IGNORE_INDEX  # unequal numbers of supervised tokens
    whole = model(**data).loss
    count = (data["labels"][:, 1:] != IGNORE_INDEX).sum()
    parts = [model(**{k: v[i : i + 1] for k, v in data.items()}, num_items_in_batch=count).loss for i in range(4)]
    assert torch.allclose(sum(parts), whole, atol=1e-6)


def test_no_supervised_token_gives_zero_with_a_graph():
    model = tiny_llava().train()
    data = batch()
    data["labels"].fill_(IGNORE_INDEX)
    loss = model(**data).loss
    assert loss.item() == 0.0
    loss.backward()
    assert all(p.grad is None or torch.isfinite(p.grad).all() for p in model.parameters())


def test_injected_features_equal_images():
    model = tiny_llava()
    data = batch()
    features = model.encode_images(data["images"])
    assert features.shape == (2, model.num_image_tokens, 32)
    assert torch.equal(model.connector(model.vision_features(data["images"])), features)
    direct = model(**data)
    images = data.pop("images")
    injected = model(**data, image_features=features)
    assert torch.equal(direct.logits, injected.logits)
    with pytest.raises(ValueError, match="not both"):
        model(**data, images=images, image_features=features)


def test_text_only_and_mixed_batches():
    """A text-only sample gives the same alone, without images, with a dummy, and in a batch with an image."""
    model = tiny_llava()
    text = torch.tensor([[5, 6, 7, 8, 9, 10, 11, 12]])
    alone = model(input_ids=text).logits
    dummy = model(input_ids=text, images=torch.zeros(1, 3, 28, 28)).logits
    data = batch(1)
    ids = torch.cat([data["input_ids"], text])
    mixed = model(input_ids=ids, attention_mask=torch.ones_like(ids), images=data["images"])
    v1 = model(input_ids=ids, images=torch.cat([data["images"], torch.zeros(1, 3, 28, 28)]))
    assert torch.equal(alone, dummy)
    assert torch.allclose(mixed.logits[1, :8], alone[0], atol=1e-5)
    assert torch.equal(mixed.logits, v1.logits)
    assert model(input_ids=text, labels=text).loss.item() > 0


def test_several_images_a_sample():
    model = tiny_llava()
    data = batch(2, images=2)
    output = model(**data)
    assert output.image_mask.sum() == 4 * 15
    stacked = model(**{**data, "images": data["images"].reshape(2, 2, 3, 28, 28)})
    listed = model(**{**data, "images": [data["images"][:2], data["images"][2], data["images"][3]]})
    assert torch.equal(output.logits, stacked.logits) and torch.equal(output.logits, listed.logits)
    swapped = model(**{**data, "images": data["images"][[1, 0, 2, 3]]})
    assert not torch.allclose(output.logits[0], swapped.logits[0], atol=1e-3)
    assert torch.equal(output.logits[1], swapped.logits[1])
    with pytest.raises(ValueError, match="4 image placeholders"):
        model(**{**data, "images": data["images"][:3]})


def test_padding_changes_nothing():
    model = tiny_llava()
    data = batch(1)
    padded = {
        "input_ids": torch.cat([data["input_ids"], torch.zeros(1, 3, dtype=torch.long)], dim=1),
        "labels": torch.cat([data["labels"], torch.full((1, 3), IGNORE_INDEX)], dim=1),
        "attention_mask": torch.tensor([[1] * 8 + [0] * 3]),
        "images": data["images"],
    }
    assert torch.allclose(model(**data).loss, model(**padded).loss)


def test_cache_continues_where_it_stopped():
    model = tiny_llava()
    data = batch(1)
    full = model(input_ids=data["input_ids"], images=data["images"]).logits
    first = model(input_ids=data["input_ids"][:, :-1], images=data["images"], use_cache=True)
    second = model(input_ids=data["input_ids"][:, -1:], past_key_values=first.past_key_values)
    assert torch.allclose(second.logits[:, -1], full[:, -1], atol=1e-5)


def test_logits_to_keep():
    model = tiny_llava()
    data = batch(1)
    labels = data.pop("labels")
    full = model(**data).logits
    assert torch.allclose(model(**data, logits_to_keep=3).logits, full[:, -3:], atol=1e-5)
    where = torch.tensor([2, 5])
    assert torch.allclose(model(**data, logits_to_keep=where).logits, full[:, where], atol=1e-5)
    with pytest.raises(ValueError, match="logits_to_keep"):
        model(**data, labels=labels, logits_to_keep=3)


# generation


@pytest.mark.parametrize("llm", LLMS)
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("settings", [{}, {"num_beams": 2}, {"repetition_penalty": 1.5}])
def test_batched_generation_equals_one_by_one(llm, side, settings):
    """Prompts of different lengths, one without an image: each row answers as it would alone."""
    settings = {"max_new_tokens": 6, "do_sample": False, **settings}
    model = tiny_llava(llm, seed=2)
    generator = torch.Generator().manual_seed(1)
    lengths, images = [9, 5, 7], torch.randn(2, 3, 28, 28, generator=generator)
    rows = [torch.randint(1, 250, (length,), generator=generator) for length in lengths]
    rows[0][2] = rows[2][0] = -200
    ids, mask = torch.zeros(3, 9, dtype=torch.long), torch.zeros(3, 9, dtype=torch.long)
    for index, row in enumerate(rows):
        place = slice(9 - len(row), 9) if side == "left" else slice(0, len(row))
        ids[index, place], mask[index, place] = row, 1
    together = model.generate(ids, images=images, attention_mask=mask, **settings)
    assert together.shape == (3, 6)
    for index, row in enumerate(rows):
        own = {0: images[:1], 1: None, 2: images[1:]}[index]
        assert torch.equal(together[index], model.generate(row[None], images=own, **settings)[0])


def test_repetition_penalty_spares_nothing_new():
    """transformers would exempt as many new tokens as the row has padding; by argument and by configuration."""
    model, ids = tiny_llava("qwen3", seed=2), torch.tensor([[5, 6, 7, 8, 9], [0, 0, 0, 0, 6]])
    mask = (ids > 0).long()
    asked = GenerationConfig(max_new_tokens=6, do_sample=False, repetition_penalty=100.0)
    new = model.generate(ids, attention_mask=mask, generation_config=asked)
    assert all(len(set(row)) == 6 for row in new.tolist())  # so high a penalty lets no token come twice
    assert asked.repetition_penalty == 100.0 and asked.use_cache is None  # the caller's own stays as it was
    by_argument = model.generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False, repetition_penalty=100.0)
    assert torch.equal(by_argument, new)


def test_generation_equals_repeated_forward():
    model = tiny_llava()
    data = batch(1)
    ids = data["input_ids"]
    new = model.generate(inputs=ids, images=data["images"], max_new_tokens=5, do_sample=False)
    for token in new[0]:
        best = model(input_ids=ids, images=data["images"]).logits[:, -1].argmax(-1)
        assert best == token
        ids = torch.cat([ids, best[None]], dim=1)
    assert torch.equal(model.generate(input_ids=data["input_ids"], images=data["images"], max_new_tokens=5), new)


def test_generation_stops_and_pads():
    model = tiny_llava()
    data = batch(2)
    new = model.generate(data["input_ids"], images=data["images"], max_new_tokens=8, do_sample=False)
    stop = int(new[0, 1])
    stopped = model.generate(
        data["input_ids"], images=data["images"], max_new_tokens=8, eos_token_id=stop, pad_token_id=3
    )
    assert stopped[0].tolist() == [*new[0, : new[0].tolist().index(stop) + 1].tolist()] + [3] * (
        stopped.shape[1] - new[0].tolist().index(stop) - 1
    )


def test_generation_from_ready_features_and_with_beams():
    model = tiny_llava()
    data = batch(2)
    features = model.encode_images(data["images"])
    plain = model.generate(data["input_ids"], images=data["images"], max_new_tokens=4)
    assert torch.equal(model.generate(data["input_ids"], image_features=features, max_new_tokens=4), plain)
    beams = model.generate(data["input_ids"], images=data["images"], max_new_tokens=4, num_beams=2)
    assert beams.shape == (2, 4)
    for wrong in ({}, {"inputs_embeds": features}, {"inputs": data["input_ids"][0]}, {"inputs": torch.zeros(0, 3)}):
        with pytest.raises(ValueError, match="token"):
            model.generate(**wrong)


def test_generation_works_in_training_configuration():
    model = tiny_llava(use_cache=False).train()
    model.gradient_checkpointing_enable()
    data = batch(1)
    new = model.eval().generate(data["input_ids"], images=data["images"], max_new_tokens=4)
    assert torch.equal(new, tiny_llava().generate(data["input_ids"], images=data["images"], max_new_tokens=4))


# memory and attention


def saved_bytes(model, data):
    """Bytes that autograd saves for the backward pass, without parameters."""
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    seen: dict[int, int] = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(**data).loss
    kept = sum(seen.values())
    loss.backward()
    return kept


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("llm", LLMS)
def test_gradient_checkpointing_saves_bytes_and_keeps_gradients(llm, reentrant):
    data = batch(2)
    plain = tiny_llava(llm, text={"layers": 4}).train()
    checkpointed = tiny_llava(llm, text={"layers": 4}).train()
    checkpointed.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        checkpointed.enable_input_require_grads()
    more, less = saved_bytes(plain, data), saved_bytes(checkpointed, data)
    assert less < 0.6 * more
    for (name, expected), got in zip(plain.named_parameters(), checkpointed.parameters(), strict=True):
        if expected.grad is not None:
            assert torch.allclose(expected.grad, got.grad, atol=1e-5), name


@pytest.mark.parametrize("tower", TOWERS)
def test_gradient_checkpointing_of_the_tower(tower):
    data = batch(2)
    plain = tiny_llava(tower=tower, vision={"layers": 6}).train()
    checkpointed = tiny_llava(tower=tower, vision={"layers": 6}).train()
    checkpointed.gradient_checkpointing_enable()
    for layer in checkpointed.language_model.model.layers:
        layer.gradient_checkpointing = False  # what the tower alone saves
    assert saved_bytes(checkpointed, data) < 0.75 * saved_bytes(plain, data)


def test_attention_implementation_reaches_the_parts():
    config = tiny_llava().config
    config._attn_implementation = "eager"
    from tinyllava_switchkd.model import TinyLlavaForConditionalGeneration

    eager = TinyLlavaForConditionalGeneration(config).eval()
    assert eager.language_model.config._attn_implementation == "eager"
    assert eager.vision_tower.vision_tower.vision_model.config._attn_implementation == "eager"
    assert tiny_llava().language_model.config._attn_implementation == "sdpa"
    sdpa = tiny_llava()
    eager.load_state_dict(sdpa.state_dict())
    data = batch(2)
    assert torch.allclose(eager(**data).logits, sdpa(**data).logits, atol=1e-4)
    attentions = eager(**data, output_attentions=True).attentions
    assert len(attentions) == 2 and attentions[0].shape == (2, 4, 22, 22)
    sdpa.set_attn_implementation("eager")
    assert sdpa(**data, output_attentions=True).attentions is not None
    assert len(sdpa(**data, output_hidden_states=True).hidden_states) == 3


def test_half_precision_loss_is_float32():
    model = tiny_llava().to(torch.bfloat16)
    output = model(**batch())
    assert output.logits.dtype == torch.bfloat16 and output.loss.dtype == torch.float32


def test_resize_token_embeddings_updates_both_configurations():
    model = tiny_llava()
    model.resize_token_embeddings(300)
    assert model.config.vocab_size == model.config.text_config.vocab_size == 300
    assert model.get_output_embeddings().weight.shape[0] == 300


# configuration


def test_configuration_survives_json(tmp_path):
    config = tiny_llava(template="qwen2_base", tower="clip").config
    config.save_pretrained(tmp_path)
    again = TinyLlavaConfig.from_pretrained(tmp_path)
    assert again.template == "qwen2_base"
    assert again.to_dict() == config.to_dict()
    assert again.vision_config.model_type == "clip_vision_model" and again.hidden_size == 32


def test_configuration_names_of_v1():
    config = TinyLlavaConfig()
    assert (config.vision_feature_layer, config.vision_feature_select_strategy) == (-2, "patch")
    assert (config.text_config.model_type, config.vision_config.image_size) == ("llama", 336)
    assert (config.ignore_index, config.image_token_index, config.image_aspect_ratio) == (-100, -200, "square")


def test_a_configuration_from_before_0_2_names_its_template():
    fields = tiny_llava(template="qwen2_base", tower="clip").config.to_dict()
    fields["conv_version"] = fields.pop("template")
    again = TinyLlavaConfig.from_dict(fields)
    assert again.template == "qwen2_base"
    assert "conv_version" not in again.to_dict()


def test_what_a_configuration_leaves_empty_is_the_default():
    texts = ("image_aspect_ratio", "vision_feature_select_strategy", "tokenizer_padding_side", "conv_version")
    for empty in (None, ""):
        config = tiny_llava(**dict.fromkeys(texts, empty)).config
        assert [getattr(config, name) for name in texts[:3]] == ["square", "patch", "right"]
        assert config.template is None


def test_configuration_of_an_unknown_model_type():
    with pytest.raises(ValueError, match=r"'openelm'.*never run"):
        TinyLlavaConfig(text_config={"model_type": "openelm"})


def test_missing_base_models_are_one_sentence(tmp_path):
    for fields in (
        {"llm_model_name_or_path": "org/qwen2-none"},
        {"vision_model_name_or_path": str(tmp_path / "siglip")},
    ):
        with pytest.raises(FileNotFoundError, match="could not be read"):
            TinyLlavaConfig(**fields)


def test_wrong_feature_layer_is_refused_when_built():
    with pytest.raises(ValueError, match="vision_feature_layer is 9"):
        tiny_llava(vision_feature_layer=9)
