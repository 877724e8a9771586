"""The plugins of docs/extend.md, run as they stand there."""

import contextlib
import json
import os
import subprocess
import sys

import pyarrow
import pyarrow.parquet
import pytest
import torch
from PIL import Image
from transformers import (
    AutoImageProcessor,
    AutoModel,
    DINOv3ViTConfig,
    DINOv3ViTModel,
    SmolLM3Config,
    SmolLM3ForCausalLM,
)

from tests.docs.pages import ROOT, files_of, import_from
from tests.eval.hub_schemas import picture as hub_picture
from tests.tiny import tiny_llava, tiny_tokenizer, write_tiny_llm, write_tiny_tower
from tinyllava_switchkd.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from tinyllava_switchkd.data import TemplateFactory, TextPreprocess
from tinyllava_switchkd.distill import LossFactory, MethodFactory, build_distiller
from tinyllava_switchkd.distill.flags import settings
from tinyllava_switchkd.eval import run as eval_run
from tinyllava_switchkd.eval.benchmarks import BenchmarkFactory, JudgeFactory, Reading
from tinyllava_switchkd.eval.prepare import main as prepare
from tinyllava_switchkd.eval.report import main as report
from tinyllava_switchkd.eval.score import main as score_command
from tinyllava_switchkd.launch import evaluate
from tinyllava_switchkd.launch.devices import Devices
from tinyllava_switchkd.model import (
    ConnectorFactory,
    LLMFactory,
    VisionTowerFactory,
    build_model,
    load_pretrained_model,
    save_pretrained_model,
)
from tinyllava_switchkd.model.export import ExportTargetFactory
from tinyllava_switchkd.model.export.__main__ import main as export
from tinyllava_switchkd.train.command_line.arguments import distill_arguments
from tinyllava_switchkd.train.recipes import TrainingRecipeFactory

PLUGINS = files_of("extend.md")
REGISTRIES = {
    "smollm3.py": (LLMFactory, "HuggingFaceTB/SmolLM3-3B"),
    "dinov3.py": (VisionTowerFactory, "facebook/dinov3-vits16-pretrain-lvd1689m"),
    "pixelshuffle.py": (ConnectorFactory, "pixelshuffle3x"),
    "zephyr.py": (TemplateFactory, "zephyr"),
    "norms.py": (TrainingRecipeFactory, "norms"),
    "hellinger.py": (LossFactory, "hellinger"),
    "visual_attention.py": (MethodFactory, "visual_attention"),
    "colours.py": (BenchmarkFactory, "colours"),
    "realworldqa.py": (BenchmarkFactory, "realworldqa"),
    "last_letter.py": (JudgeFactory, "last_letter"),
    "tower_target.py": (ExportTargetFactory, "tower"),
}


@pytest.fixture
def plugin(tmp_path):
    """Imports a plugin of the page, and takes it out of its registry afterwards."""

    def load(file):
        registry, name = REGISTRIES[file]
        assert all(entry not in name.lower() for entry in registry.list()), f"{name} is built in; pick another"
        module = import_from(tmp_path, file, PLUGINS[file])
        registry(name)
        return module

    with contextlib.ExitStack() as scopes:
        for registry, _ in REGISTRIES.values():
            scopes.enter_context(registry.scope())
        yield load


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bases")
    return {"llm": write_tiny_llm(folder / "qwen2-tiny"), "tower": write_tiny_tower(folder / "siglip-tiny")}


def picture(size=(40, 30)):
    return Image.radial_gradient("L").resize(size).convert("RGB")


def survives_a_checkpoint(model, tokenizer, image_processor, folder):
    """Saved and loaded again, a model answers the same."""
    save_pretrained_model(model, tokenizer, image_processor, folder, template="qwen2_base")
    loaded = load_pretrained_model(folder, device="cpu")[0]
    assert model.chat("What?", picture(), max_new_tokens=4) == loaded.chat("What?", picture(), max_new_tokens=4)
    own, other = model.state_dict(), loaded.state_dict()
    assert own.keys() == other.keys() and all(torch.equal(own[name], other[name]) for name in own)


def test_the_page_has_these_plugins():
    assert set(PLUGINS) == {*REGISTRIES, "pyproject.toml"}


def test_language_model(plugin, bases, tmp_path):
    plugin("smollm3.py")
    config = SmolLM3Config(
        vocab_size=264,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=256,
    )
    SmolLM3ForCausalLM(config).save_pretrained(tmp_path / "SmolLM3-tiny")
    tiny_tokenizer().save_pretrained(tmp_path / "SmolLM3-tiny")
    model, tokenizer, processor = build_model(str(tmp_path / "SmolLM3-tiny"), bases["tower"])
    assert type(model.language_model) is SmolLM3ForCausalLM
    survives_a_checkpoint(model, tokenizer, processor, tmp_path / "out")


def test_vision_tower(plugin, bases, tmp_path):
    plugin("dinov3.py")
    config = DINOv3ViTConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_register_tokens=4,
        image_size=28,
        patch_size=7,
    )
    base = DINOv3ViTModel(config).eval()
    base.save_pretrained(tmp_path / "dinov3-tiny")
    model, tokenizer, processor = build_model(bases["llm"], str(tmp_path / "dinov3-tiny"), vision_feature_layer=-1)
    assert model.num_image_tokens == 16
    pixels = torch.randn(2, 3, 28, 28)
    expected = base(pixels, output_hidden_states=True).hidden_states[-1][:, 5:]
    torch.testing.assert_close(model.vision_features(pixels), expected)
    assert processor(picture(), return_tensors="pt")["pixel_values"].shape == (1, 3, 28, 28)
    model.vision_tower.freeze_unused(-2)
    trained = {
        name.split("layer.")[1][0]
        for name, p in model.vision_tower.named_parameters()
        if "layer." in name and p.requires_grad
    }
    assert trained == {"0"}
    survives_a_checkpoint(model, tokenizer, processor, tmp_path / "out")


def test_connector(plugin, bases, tmp_path):
    plugin("pixelshuffle.py")
    model, tokenizer, processor = build_model(
        bases["llm"], bases["tower"], "pixelshuffle2x", vision_feature_select_strategy="cls_patch"
    )
    assert model.num_image_tokens == 4  # of 4 x 4
    pixels = torch.randn(1, 3, 28, 28)
    tokens = model.vision_features(pixels)[0]
    folded = torch.cat([tokens[i] for i in (2, 3, 6, 7)])  # the second square of the first row
    torch.testing.assert_close(model.encode_images(pixels)[0, 1], model.connector._connector(folded))
    survives_a_checkpoint(model, tokenizer, processor, tmp_path / "out")
    with pytest.raises(ValueError, match="pixelshuffle2x cannot fold 15 visual tokens"):
        build_model(bases["llm"], bases["tower"], "pixelshuffle2x")  # "patch" drops one


def test_template(plugin):
    plugin("zephyr.py")
    tokenizer = tiny_tokenizer("llama")
    encode = TextPreprocess(tokenizer, "zephyr")
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A </s> cat."}]
    prompt = encode([turns[0], {"from": "gpt", "value": None}], mode="eval")["prompt"]
    assert prompt == "<|system|>\nYou are a friendly assistant.\n<|user|>\n<image>\nWhat?\n<|assistant|>\n"
    sample = encode(turns, num_images=1)
    assert (sample["input_ids"] == IMAGE_TOKEN_INDEX).sum() == 1
    learned = sample["labels"][sample["labels"] != IGNORE_INDEX]
    assert tokenizer.decode(learned) == "A </s> cat.</s>"


def test_recipe(plugin, tmp_path):
    plugin("norms.py")
    from tinyllava_switchkd.train.command_line.arguments import TrainingArguments

    arguments = TrainingArguments(output_dir=str(tmp_path), training_recipe="norms", use_cpu=True, report_to="none")
    model = TrainingRecipeFactory(arguments.training_recipe)(arguments)(tiny_llava())
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {name.split(".")[0] for name in trained} == {"language_model", "connector"}
    assert all("norm" in name for name in trained if name.startswith("language_model"))
    assert any("layers.0.input_layernorm" in name for name in trained)


def a_batch():
    return {
        "input_ids": torch.tensor([[1, IMAGE_TOKEN_INDEX, 5, 6, 7], [1, 2, 3, 4, 5]]),
        "labels": torch.tensor([[-100, -100, -100, 6, 7], [-100, -100, -100, 4, 5]]),
        "images": torch.randn(1, 3, 28, 28),
    }


def test_loss(plugin):
    plugin("hellinger.py")
    loss = LossFactory("hellinger")(temperature=2.0, power=0.5)
    student, teacher = torch.randn(2, 5, 11, dtype=torch.float64).unbind()
    p, q = ((x / 2.0).softmax(-1) for x in (student, teacher))
    by_definition = ((p.sqrt() - q.sqrt()).square().sum(-1) / 2).sqrt()
    torch.testing.assert_close(loss(student, teacher), by_definition)

    distiller = build_distiller(tiny_llava(), tiny_llava(seed=1), loss="hellinger", power=0.5)
    losses = distiller(a_batch())
    assert losses["align"] > 0 and losses["visual_switch"] > 0
    losses["loss"].backward()
    flags = settings()
    assert flags["power"].help == "of the distance; 1 is the distance squared."
    with pytest.raises(ValueError, match="it belongs to loss hellinger"):
        distill_arguments()(teacher_path="t", power=2.0)


def test_method(plugin):
    plugin("visual_attention.py")
    arguments = distill_arguments()(teacher_path="t", distill_method="visual_attention", student_layer=1)
    method = arguments.method()
    assert (method.attention_weight, method.student_layer, method.teacher_layer) == (1.0, 1, 0)
    student, teacher = tiny_llava().train(), tiny_llava(seed=1)
    distiller = build_distiller(student, teacher, method)
    batch = a_batch()
    losses = distiller(batch)
    # the slow way: whole models with eager attention
    maps = []
    for model, layer in ((student, 1), (teacher, 0)):
        model.language_model.set_attn_implementation("eager")
        out = model(**batch, output_attentions=True)
        visual = out.image_mask[0]
        length = int(visual.sum()) + 4
        rows = out.attentions[layer][0, :, :length, :length]
        maps.append(rows[:, ~visual[:length]][..., visual[:length]].mean(0).flatten())
        model.language_model.set_attn_implementation("sdpa")
    expected = 1 - torch.nn.functional.cosine_similarity(*maps, dim=0)
    torch.testing.assert_close(losses["attention"], expected.detach(), rtol=1e-4, atol=1e-6)
    losses["loss"].backward()
    assert student.language_model.model.layers[1].self_attn.q_proj.weight.grad.abs().max() > 0
    refused = tiny_llava(vision={"patch_size": 14})
    with pytest.raises(ValueError, match="one by one"):
        build_distiller(tiny_llava(), refused, method)


def test_benchmark(plugin, bases, tmp_path, capsys):
    plugin("colours.py")
    data, checkpoint = tmp_path / "data", tmp_path / "checkpoint"
    (data / "images").mkdir(parents=True)
    picture().save(data / "images" / "0.png")
    rows = [{"question_id": i, "image": "0.png", "text": f"Which colour? {i}", "answer": "grey"} for i in range(3)]
    (data / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    answers = [{"question_id": i, "prompt": "", "text": text} for i, text in enumerate(("Grey.", "red"))]
    (tmp_path / "answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in answers))
    from tinyllava_switchkd.eval.score import score_file

    score = score_file("colours", data, tmp_path / "answers.jsonl")
    assert score.score == pytest.approx(100 / 3) and score.missing == 1

    model, tokenizer, processor = build_model(bases["llm"], bases["tower"])
    save_pretrained_model(model, tokenizer, processor, checkpoint, template="qwen2_base")
    command = ["colours", "--model_path", checkpoint, "--data_dir", data, "--output_dir", tmp_path / "out"]
    command += ["--score", tmp_path / "score.json", "--max_new_tokens", 2, "--device", "cpu"]
    assert eval_run.main([str(word) for word in command]) == 0, capsys.readouterr().err
    assert json.loads((tmp_path / "score.json").read_text())["answered"] == 3


def test_package_with_an_entry_point(tmp_path):
    """What ``pip install`` would do, without pip: setuptools writes the metadata that entry points are read from."""
    pytest.importorskip("setuptools", minversion="77", reason="the page's pyproject.toml needs setuptools")
    (tmp_path / "pyproject.toml").write_text(PLUGINS["pyproject.toml"])
    (tmp_path / "colours.py").write_text(PLUGINS["colours.py"])
    make = "from setuptools import build_meta; build_meta.prepare_metadata_for_build_wheel('metadata')"
    (tmp_path / "metadata").mkdir()
    subprocess.run([sys.executable, "-c", make], cwd=tmp_path, check=True, capture_output=True)
    (tmp_path / "questions.jsonl").write_text('{"question_id": 7, "image": "0.png", "text": "?", "answer": "red"}\n')
    (tmp_path / "answers.jsonl").write_text('{"question_id": 7, "text": "Red"}\n')
    path = os.pathsep.join(map(str, (tmp_path, tmp_path / "metadata", ROOT)))
    command = ["-m", "tinyllava_switchkd.eval.score", "colours", "--data_dir", ".", "--answers_file", "answers.jsonl"]
    scored = subprocess.run(
        [sys.executable, *command], cwd=tmp_path, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True
    )
    assert scored.returncode == 0, scored.stderr
    assert json.loads(scored.stdout)["score"] == 100


def test_a_complete_benchmark(plugin, tmp_path, capsys):
    """From a data set's parquet files to the report, with a limit and a comparison."""
    plugin("realworldqa.py")
    rows = []
    for number in range(4):
        rows.append(
            {"question": f"How many are there ({number})?", "answer": str(number), "image": hub_picture(number)}
        )
    table = pyarrow.Table.from_pylist(rows)
    (tmp_path / "set" / "data").mkdir(parents=True)
    pyarrow.parquet.write_table(table, tmp_path / "set" / "data" / "test-00000-of-00001.parquet")
    flags = ["--repo_id", str(tmp_path / "set"), "--eval_dir", str(tmp_path), "--any_count"]
    assert prepare(["realworldqa", *flags]) == 0
    data = tmp_path / "realworldqa"
    questions = list(BenchmarkFactory("realworldqa").questions(data))
    assert [question.image.is_file() for question in questions] == [True] * 4
    variables = {"EVAL_DIR": str(tmp_path), "RESULTS_DIR": str(tmp_path)}
    request = evaluate.Request("model", "A", variables, Devices((), 1), "python", tmp_path)
    assert "realworldqa" in evaluate.every_benchmark() and evaluate.has_data("realworldqa", request)
    assert str(tmp_path / "A" / "realworldqa.json") in evaluate.evaluation("realworldqa", request)
    for model, texts in (("A", "0123"), ("B", "01xx")):
        answers = tmp_path / f"{model}.jsonl"
        lines = [
            question.answer_row(text, answer_id="", model_id="m")
            for question, text in zip(questions, texts, strict=True)
        ]
        answers.write_text("".join(json.dumps(line) + "\n" for line in lines))
        output = tmp_path / model / "realworldqa.json"
        words = ["--output", str(output), "--rows", str(output.with_suffix(".rows.jsonl"))]
        assert score_command(["realworldqa", "--data_dir", str(data), "--answers_file", str(answers), *words]) == 0
    assert json.loads((tmp_path / "B" / "realworldqa.json").read_text())["score"] == 50.0
    capsys.readouterr()
    assert (
        report([str(tmp_path / "A"), str(tmp_path / "B"), "--compare", str(tmp_path / "A"), str(tmp_path / "B")]) == 0
    )
    text = capsys.readouterr().out
    assert "RealWorldQA" in text and "McNemar, exact" in text and "-50.0" in text


def test_export_target(plugin, bases, tmp_path):
    plugin("tower_target.py")
    model, tokenizer, processor = build_model(bases["llm"], bases["tower"])
    save_pretrained_model(model, tokenizer, processor, tmp_path / "student", template="qwen2_base")
    export(["--to", "tower", str(tmp_path / "student"), str(tmp_path / "tower")])
    encoder, reader = (
        AutoModel.from_pretrained(tmp_path / "tower"),
        AutoImageProcessor.from_pretrained(tmp_path / "tower"),
    )
    pixels = reader(picture(), return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        ours = model.vision_tower(pixels, -1, "cls_patch")
        theirs = encoder(pixels, output_hidden_states=True).hidden_states[-1]
    assert torch.equal(ours, theirs) and (tmp_path / "tower" / "README.md").is_file()


def test_a_judge(plugin):
    judge = plugin("last_letter.py").last_letter
    assert judge(Reading("b", "1", "p", "A or rather B", {"A": "x", "B": "y"})) == "B"
    assert judge(Reading("b", "1", "p", "?", {"A": "x"})) is None
