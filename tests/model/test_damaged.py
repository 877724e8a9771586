"""Damaged and old checkpoints: truncated, not fetched, with nulls in the configuration, old or sharded pickles."""

import json
import logging
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.model.checkpoints import logits, save, write_v1_split
from tests.tiny import tiny_llava
from tinyllava_switchkd.data import TextPreprocess
from tinyllava_switchkd.model import LLMFactory, TinyLlavaConfig, load_pretrained_model

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 12345\n"


@pytest.fixture
def folder(tmp_path):
    return save(tiny_llava(), tmp_path)


def edit_config(folder, **fields):
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))
    return folder


@pytest.mark.parametrize("damage", [lambda data: data[:5000], lambda data: b"", lambda data: POINTER])
def test_damaged_weights_are_one_sentence(damage, folder):
    file = folder / "model.safetensors"
    file.write_bytes(damage(file.read_bytes()))
    reason = "git lfs pull" if file.read_bytes() == POINTER else "cut off or damaged"
    with pytest.raises(ValueError, match=reason) as error:
        load_pretrained_model(folder, device="cpu")
    assert str(file) in str(error.value) and "\n" not in str(error.value)


class Command:
    def __reduce__(self):
        return os.mkdir, ("made-by-a-pickle",)


@pytest.mark.parametrize(
    "content", [{"_connector.0.weight": Command()}, [torch.zeros(1)], {"_connector.0.weight": "text"}]
)
def test_a_pickle_of_more_than_tensors_is_refused_and_not_run(content, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = write_v1_split(tiny_llava(), tmp_path / "split")
    torch.save(content, folder / "connector" / "pytorch_model.bin")
    with pytest.raises(ValueError, match="cannot be read") as error:
        load_pretrained_model(folder, device="cpu")
    assert "\n" not in str(error.value) and not (tmp_path / "made-by-a-pickle").exists()


def test_pickles_in_shards_and_of_before_pytorch_1_6(folder):
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names, weight_map = sorted(tensors), {}
    for number, part in enumerate((names[::2], names[1::2]), start=1):
        shard = f"pytorch_model-{number:05d}-of-00002.bin"
        part = {name: tensors[name].clone() for name in part}
        torch.save(part, folder / shard, _use_new_zipfile_serialization=number == 1)
        weight_map |= dict.fromkeys(part, shard)
    index = folder / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    assert torch.equal(logits(load_pretrained_model(folder, device="cpu")[0]), logits(tiny_llava()))
    index.unlink()
    with pytest.raises(FileNotFoundError, match=r"shards.*pytorch_model\.bin\.index\.json"):
        load_pretrained_model(folder, device="cpu")


@pytest.mark.parametrize("content", ['{"model_type": "tinyllava",', "[]", "\xff"])
def test_a_configuration_that_is_not_json(content, folder):
    (folder / "config.json").write_bytes(content.encode("latin-1"))
    said = r"config\.json(, line 1: not valid JSON| holds a JSON list| is not UTF-8).*fetch it again"
    with pytest.raises(ValueError, match=said):
        load_pretrained_model(folder, device="cpu")
    with pytest.raises(ValueError, match=said):
        LLMFactory(str(folder))


def test_null_means_the_default(folder):
    fields = json.loads((folder / "config.json").read_text())
    kept = {"text_config", "vision_config", "connector_type", "model_type", "tokenizer_model_max_length"}
    edit_config(folder, **dict.fromkeys(fields.keys() - kept))
    loaded, tokenizer, _, _ = load_pretrained_model(folder, device="cpu")
    assert torch.equal(logits(loaded), logits(tiny_llava())) and tokenizer.padding_side == "right"
    edit_config(folder, tokenizer_model_max_length=None)
    assert load_pretrained_model(folder, device="cpu")[3] == TinyLlavaConfig().tokenizer_model_max_length


def test_attention_of_another_machine_is_not_asked_for(folder):
    edit_config(folder, _attn_implementation="flash_attention_2", attn_implementation="flash_attention_2")
    assert torch.equal(logits(load_pretrained_model(folder, device="cpu")[0]), logits(tiny_llava()))


def test_vision_config_may_be_of_the_whole_siglip(folder):
    vision = json.loads((folder / "config.json").read_text())["vision_config"]
    edit_config(folder, vision_config={"model_type": "siglip", "vision_config": vision})
    assert torch.equal(logits(load_pretrained_model(folder, device="cpu")[0]), logits(tiny_llava()))


def test_a_part_without_its_folder_is_named(tmp_path):
    folder = write_v1_split(tiny_llava(), tmp_path / "split")
    shutil.rmtree(folder / "connector")
    with pytest.raises(FileNotFoundError, match="connector holds no weights"):
        load_pretrained_model(folder, device="cpu")


def test_nothing_advises_to_ignore_what_is_refused(folder, caplog):
    """transformers would log that missing weights 'can be ignored' before our error says that they cannot."""
    tensors = load_file(folder / "model.safetensors")
    del tensors["connector._connector.2.bias"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)
    try:
        with pytest.raises(ValueError, match=r"missing \(connector._connector.2.bias\)"):
            load_pretrained_model(folder, device="cpu")
    finally:
        logger.removeHandler(caplog.handler)
    assert "LOAD REPORT" not in caplog.text


def test_a_tokenizer_of_v1_that_is_sentencepieces_model_alone(tmp_path, monkeypatch):
    """v1 asks for slow tokenizers (tokenizer_use_fast false), and Llama's writes no tokenizer.json."""
    import sentencepiece

    (tmp_path / "text").write_text("USER: What is this? ASSISTANT: It is a cat.\n" * 20 + "the cat sat\n" * 9)
    monkeypatch.chdir(tmp_path)
    sentencepiece.SentencePieceTrainer.train(
        input="text",
        model_prefix="tokenizer",
        vocab_size=290,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        pad_id=-1,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    folder = save(tiny_llava("llama", vocab=300, tokenizer_use_fast=False), tmp_path / "checkpoint")
    for file in folder.glob("tokenizer*"):
        file.unlink()
    (tmp_path / "tokenizer.model").rename(folder / "tokenizer.model")
    fields = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps({**fields, "legacy": False, "add_bos_token": True}))
    tokenizer = load_pretrained_model(folder, device="cpu")[1]
    oracle = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    for text in ("It is a cat", "USER: What é\n12"):
        assert tokenizer(text).input_ids == [1, *oracle.encode(text)]
    turns = [{"from": "human", "value": "What is this?"}, {"from": "gpt", "value": "It is a cat."}]
    labels = TextPreprocess(tokenizer, "llama")(turns)["labels"]
    assert tokenizer.decode(labels[labels >= 0]) == "It is a cat.</s>" and tokenizer.pad_token == "<unk>"
