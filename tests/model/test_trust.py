"""Code in untrusted folders is never run, without any prompt or waiting."""

from __future__ import annotations

import io
import json
import shutil
import sys
from pathlib import Path

import pytest

from tests.model.checkpoints import logits, save, write_v1_split
from tests.tiny import tiny_llava, write_tiny_llm, write_tiny_tower
from tinyllava_switchkd.model import TinyLlavaConfig, build_model, load_pretrained_model
from tinyllava_switchkd.model.export.onnx_student import OnnxStudent
from tinyllava_switchkd.model.layouts import read_config
from tinyllava_switchkd.model.trust import refuse_code
from tinyllava_switchkd.serve import chat

CODE = "from pathlib import Path\nPath(__file__).with_name('ran').touch()\nclass Evil: pass\n"
CLASSES = {
    "config.json": "AutoConfig",
    "tokenizer_config.json": "AutoTokenizer",
    "preprocessor_config.json": "AutoImageProcessor",
    "processor_config.json": "AutoProcessor",
    "video_preprocessor_config.json": "AutoVideoProcessor",
    "generation_config.json": "AutoModelForCausalLM",
}


@pytest.fixture(autouse=True)
def nobody_is_asked(monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("a question was asked"))


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return save(tiny_llava(), tmp_path_factory.mktemp("source") / "checkpoint")


@pytest.fixture
def folder(source, tmp_path):
    return Path(shutil.copytree(source, tmp_path / "checkpoint"))


def plant(folder: Path, file: str, value="evil.Evil", *, key="auto_map", within: str | None = None, **more) -> None:
    """Name a class in the folder in one of its files."""
    (folder / "evil.py").write_text(CODE)
    path = folder / file
    fields = json.loads(path.read_text()) if path.is_file() else {}
    part = fields.setdefault(within, {}) if within else fields
    part |= {key: {CLASSES.get(file, "AutoConfig"): value} if key == "auto_map" else value, **more}
    path.write_text(json.dumps(fields))


def refused(call, folder: Path, file: str) -> None:
    with pytest.raises(ValueError, match="never run") as error:
        call()
    message = str(error.value)
    assert message.count("\n") == 0 and str(folder / file) in message and len(message) < 400
    assert not list(folder.rglob("ran"))


@pytest.mark.parametrize("file", CLASSES)
@pytest.mark.parametrize("value", ["evil.Evil", ["evil.Evil", None], "somebody/model--evil.Evil"])
def test_a_checkpoint(folder, file, value):
    plant(folder, file, value)
    refused(lambda: load_pretrained_model(folder, device="cpu"), folder, file)


@pytest.mark.parametrize("within", ["text_config", "vision_config", "quantization_config", "anything"])
def test_a_nested_one(folder, within):
    plant(folder, "config.json", within=within)
    refused(lambda: load_pretrained_model(folder, device="cpu"), folder, "config.json")
    refused(lambda: read_config(folder), folder, "config.json")


@pytest.mark.parametrize("model_type", ["evil", "qwen2", "llava"])
def test_a_configuration_of_another_type(folder, model_type):
    plant(folder, "config.json", model_type=model_type)
    refused(lambda: load_pretrained_model(folder, device="cpu"), folder, "config.json")


@pytest.mark.parametrize(
    ("file", "key", "value"),
    [
        ("generation_config.json", "custom_generate", "evil"),
        ("config.json", "custom_pipelines", {"a": {"impl": "evil.Evil"}}),
    ],
)
def test_other_fields_that_name_code(folder, file, key, value):
    plant(folder, file, value, key=key)
    refused(lambda: load_pretrained_model(folder, device="cpu"), folder, file)


def test_a_generation_loop(folder):
    (folder / "custom_generate").mkdir()
    (folder / "custom_generate" / "generate.py").write_text(CODE)
    refused(lambda: load_pretrained_model(folder, device="cpu"), folder, "custom_generate")


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json", "preprocessor_config.json"])
def test_an_exported_student(folder, file):
    """An untrusted ONNX folder is refused before its graphs are read."""
    plant(folder, file)
    refused(lambda: OnnxStudent(folder), folder, file)


def test_the_split_layout(tmp_path):
    folder = write_v1_split(tiny_llava(), tmp_path / "split")
    (folder / "language_model" / "config.json").write_text("{}")
    plant(folder / "language_model", "config.json")
    refused(lambda: load_pretrained_model(folder, device="cpu"), folder, "language_model/config.json")


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
@pytest.mark.parametrize("model_type", [None, "evil"])
def test_a_base_language_model(tmp_path, file, model_type):
    llm, tower = write_tiny_llm(tmp_path / "llm-qwen2"), write_tiny_tower(tmp_path / "siglip-tiny")
    plant(Path(llm), file, **({"model_type": model_type} if model_type else {}))
    refused(lambda: build_model(llm, tower), tmp_path / "llm-qwen2", file)


@pytest.mark.parametrize("file", ["config.json", "preprocessor_config.json"])
@pytest.mark.parametrize("tower", ["siglip", "clip", "dinov2"])
def test_a_base_tower(tmp_path, file, tower):
    llm, folder = write_tiny_llm(tmp_path / "llm-qwen2"), write_tiny_tower(tmp_path / f"{tower}-tiny", tower)
    plant(Path(folder), file)
    refused(lambda: build_model(llm, folder), tmp_path / f"{tower}-tiny", file)


def test_a_tokenizer_of_another_folder(tmp_path):
    llm, tower = write_tiny_llm(tmp_path / "llm-qwen2"), write_tiny_tower(tmp_path / "siglip-tiny")
    other = Path(shutil.copytree(llm, tmp_path / "tokenizer"))
    plant(other, "tokenizer_config.json")
    refused(lambda: build_model(llm, tower, tokenizer_name_or_path=str(other)), other, "tokenizer_config.json")


def test_folders_that_a_checkpoint_only_names(folder, tmp_path):
    """A checkpoint without its own files is completed from the base models that it names."""
    llm, tower = write_tiny_llm(tmp_path / "llm-qwen2"), write_tiny_tower(tmp_path / "siglip-tiny")
    for name in ("tokenizer.json", "tokenizer_config.json", "preprocessor_config.json"):
        (folder / name).unlink()
    fields = json.loads((folder / "config.json").read_text())
    fields |= {"tokenizer_name_or_path": llm, "vision_model_name_or_path": tower}
    fields["vision_config"]["model_name_or_path"] = tower
    (folder / "config.json").write_text(json.dumps(fields))
    load_pretrained_model(folder, device="cpu")
    plant(Path(tower), "preprocessor_config.json")
    refused(lambda: load_pretrained_model(folder, device="cpu"), Path(tower), "preprocessor_config.json")
    plant(Path(llm), "tokenizer_config.json")
    refused(lambda: load_pretrained_model(folder, device="cpu"), Path(llm), "tokenizer_config.json")


def test_names_that_are_looked_up(tmp_path):
    folder = tmp_path / "somemodel"
    folder.mkdir()
    plant(folder, "config.json", model_type="qwen2")
    refused(lambda: TinyLlavaConfig(llm_model_name_or_path=str(folder)), folder, "config.json")


def test_an_adapter_imports_nothing(folder, tmp_path, monkeypatch):
    from tests.model.adapters import write_adapter

    adapter = write_adapter(folder, tmp_path / "lora")
    (tmp_path / "evil.py").write_text(CODE)
    monkeypatch.syspath_prepend(str(tmp_path))
    file = adapter / "adapter_config.json"
    fields = json.loads(file.read_text())
    mapping = {"auto_mapping": {"base_model_class": "Evil", "parent_library": "evil"}}
    file.write_text(json.dumps(fields | mapping))  # what peft itself writes, naming a module
    load_pretrained_model(adapter, device="cpu")
    file.write_text(json.dumps(fields | {"megatron_config": {"a": 1}, "megatron_core": "evil"}))
    with pytest.raises(ValueError, match=r"adapter_config\.json.*megatron"):
        load_pretrained_model(adapter, device="cpu")
    assert not (tmp_path / "ran").exists() and "evil" not in sys.modules


class TestNeeded:
    """An auto_map that names only installed classes, as in published models, is ignored."""

    @pytest.mark.parametrize("module", ["modeling_tinyllava_phi", "modeling_tinyllava_gemma"])
    def test_v1_s_published_checkpoints_load(self, folder, module):
        (folder / f"{module}.py").write_text(CODE)
        plant(folder, "config.json", f"{module}.TinyLlavaForConditionalGeneration")
        fields = json.loads((folder / "config.json").read_text())
        fields["auto_map"]["AutoConfig"] = "configuration.TinyLlavaConfig"
        (folder / "config.json").write_text(json.dumps(fields))
        assert logits(load_pretrained_model(folder, device="cpu")[0]).isfinite().all()
        assert not (folder / "ran").exists()

    def test_microsoft_s_phi3(self, tmp_path):
        fields = {"model_type": "phi3", "auto_map": {"AutoConfig": "configuration_phi3.Phi3Config"}}
        fields["auto_map"]["AutoModelForCausalLM"] = "modeling_phi3.Phi3ForCausalLM"
        (tmp_path / "config.json").write_text(json.dumps(fields))
        refuse_code(tmp_path)
        fields["auto_map"]["AutoTokenizer"] = "evil.Phi3Evil"
        (tmp_path / "config.json").write_text(json.dumps(fields))
        refused(lambda: refuse_code(tmp_path), tmp_path, "config.json")

    def test_an_empty_one(self, folder):
        plant(folder, "tokenizer_config.json", key="other", auto_map={})
        refuse_code(folder)


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json", "preprocessor_config.json"])
def test_the_command_line_neither_asks_nor_waits(folder, file, monkeypatch, capsys):
    """Input on stdin is still unread afterwards."""
    plant(folder, file)
    monkeypatch.setattr("sys.stdin", io.StringIO("y\ny\ny\n"))
    assert chat.main(["--model_path", str(folder), "--question", "What?"]) == 1
    out, err = capsys.readouterr()
    assert sys.stdin.read() == "y\ny\ny\n" and out == "" and "[y/N]" not in err
    assert err.count("error:") == 1 and str(folder / file) in err and "Traceback" not in err
    assert not (folder / "ran").exists()
