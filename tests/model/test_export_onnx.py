"""The ONNX export: onnxruntime computes the same as torch, alone and in batches; unsupported models are refused."""

import json
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch

pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")

from tests.model.test_export import picture, write
from tests.tiny import VOCAB_SIZE
from tinyllava_switchkd.data import ImagePreprocess, TextPreprocess
from tinyllava_switchkd.model import load_pretrained_model
from tinyllava_switchkd.model.export.__main__ import main
from tinyllava_switchkd.model.export.onnx import _Original, to_onnx
from tinyllava_switchkd.model.export.onnx_graphs import attention_masks
from tinyllava_switchkd.model.export.onnx_student import OnnxStudent
from tinyllava_switchkd.model.export.questions import Question

QUESTIONS = ("What is this?", "Is there a dog in this picture, or anything else that lives?")
NEW_TOKENS = 12


def ours(folder, template):
    """(model, prompts with -200, images, pixels): two questions of different lengths about two images."""
    model, tokenizer, processor, _ = load_pretrained_model(folder, device="cpu", dtype=torch.float32)
    text, preprocess = TextPreprocess(tokenizer, template), ImagePreprocess(processor, model.config)
    images = [picture(50, 30), picture(31, 64, seed=1)]
    prompts = [
        text([{"from": "human", "value": f"<image>\n{question}"}, {"from": "gpt", "value": None}], mode="eval")
        for question in QUESTIONS
    ]
    return model, [prompt["input_ids"] for prompt in prompts], images, [preprocess(image) for image in images]


def assert_same(source, folder, template="qwen2_base"):
    """Compare pixels, logits at every position, and greedy answers, one by one and as a left-padded batch."""
    model, prompts, images, pixels = ours(source, template)
    student = OnnxStudent(folder, threads=1)
    rows = [student.prompt_ids(question) for question in QUESTIONS]
    expected = []
    for prompt, row, image, values in zip(prompts, rows, images, pixels, strict=True):
        found = student.pixels([image])
        assert np.array_equal(found[0], values.numpy())
        with torch.no_grad():
            logits = model(prompt[None], images=values[None]).logits[0].numpy()
        mine = student.logits([row], found)[0]
        assert mine.shape == logits.shape  # the vocabulary is the model's: no column for the image's token
        assert np.abs(mine - logits).max() < 1e-4
        answer = model.generate(prompt[None], images=values[None], max_new_tokens=NEW_TOKENS, do_sample=False)[0]
        expected.append([token for token in answer.tolist() if token not in student.stops])
        assert student.generate([row], found, NEW_TOKENS) == expected[-1:]
    assert student.generate(rows, student.pixels(images), NEW_TOKENS) == expected
    return student


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A tiny student and its export in every precision."""
    folder = tmp_path_factory.mktemp("onnx")
    write(folder / "ours", image_aspect_ratio="pad")
    main(["--to", "onnx", str(folder / "ours"), str(folder / "onnx"), "--dtype", "fp32", "fp16", "int8", "q4"])
    return folder / "ours", folder / "onnx"


def test_the_same_logits_and_answers_alone_and_in_a_batch(exported):
    assert_same(*exported)


def test_a_written_placeholder_is_not_counted(exported):
    student = OnnxStudent(exported[1])
    count = student.config["image_seq_length"]
    history = [("<image>\nHi", "An <image>.")]
    for images in (2, 0):
        ids = student.prompt_ids("What is <image>?", images, history)
        assert ids.count(student.config["image_token_index"]) == images * count
    assert student.prompt_ids("<image>\nWhat?") == student.prompt_ids("What?")


def test_smaller_precisions_are_measured_and_smaller(exported):
    source, folder = exported
    measured = json.loads((folder / "measured.json").read_text())
    assert list(measured) == ["fp32", "fp16", "int8", "q4"]
    assert measured["fp32"]["equal"] == measured["fp32"]["questions"] and measured["fp32"]["logits"] < 1e-4
    sizes = [found["bytes"] for found in measured.values()]
    assert sizes == sorted(sizes, reverse=True) and sizes[-1] < sizes[0] / 2
    model, prompts, images, pixels = ours(source, "qwen2_base")
    with torch.no_grad():
        expected = model(prompts[0][None], images=pixels[0][None]).logits[0].numpy()
    for dtype, allowed in (("fp16", 0.01), ("int8", 0.5), ("q4", 2.0)):
        student = OnnxStudent(folder, dtype, threads=1)
        logits = student.logits([student.prompt_ids(QUESTIONS[0])], student.pixels(images[:1]))[0]
        assert 0 < np.abs(logits - expected).max() < allowed  # another precision, and the same model


def test_transformers_js_finds_what_it_reads(exported):
    """Names, free axes and files; test_export_web.py runs it itself."""
    _, folder = exported
    student = OnnxStudent(folder)
    decoder = student.sessions["decoder_model_merged"]
    inputs = {entry.name: entry.shape for entry in decoder.get_inputs()}
    assert inputs["inputs_embeds"] == ["batch_size", "sequence_length", 32]
    assert inputs["attention_mask"] == ["batch_size", "total_sequence_length"]
    assert inputs["past_key_values.1.value"] == ["batch_size", 2, "past_sequence_length", 8]
    assert decoder.get_outputs()[0].name == "logits" and decoder.get_outputs()[0].shape[-1] == VOCAB_SIZE
    processor = json.loads((folder / "processor_config.json").read_text())
    assert json.loads((folder / "preprocessor_config.json").read_text())["processor_class"] == "LlavaProcessor"
    patches = (28 // processor["patch_size"]) ** 2
    assert patches + processor["num_additional_image_tokens"] == student.config["image_seq_length"] == 15
    assert json.loads((folder / "tokenizer_config.json").read_text())["chat_template"]
    files = [file for file in folder.rglob("*") if file.is_file()]
    assert not [file for file in files if b"site-packages" in file.read_bytes()]  # no trace of the machine


@pytest.mark.slow
def test_weights_beyond_a_files_size_lie_beside_it(exported, tmp_path):
    source, _ = exported
    to_onnx(source, tmp_path / "onnx", ("fp32", "q4"), inline_bytes=1000)
    names = {file.name for file in (tmp_path / "onnx" / "onnx").iterdir()}
    assert {"decoder_model_merged.onnx", "decoder_model_merged.onnx_data", "vision_encoder_q4.onnx_data"} <= names
    settings = json.loads((tmp_path / "onnx" / "config.json").read_text())["transformers.js_config"]
    assert settings["use_external_data_format"]["decoder_model_merged.onnx"] == 1
    assert_same(source, tmp_path / "onnx")


# every part


QFORMER = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
CASES = {
    "tower siglip2 (NaFlex), connector linear": {"tower": "siglip2", "connector": "linear"},
    "tower clip, connector ldpv2, llm qwen3": {
        "tower": "clip",
        "connector": "ldpv2",
        "llm": "qwen3",
        "template": "chatml",
        "style": "qwen2_instruct",
    },
    "tower dinov2, connector resampler, llm llama": {
        "tower": "dinov2",
        "connector": "resampler",
        "llm": "llama",
        "template": "llama",
        "vision": {"image_size": 56},
    },
    "llm phi, connector qformer": {
        "llm": "phi",
        "connector": "qformer",
        "template": "phi",
        "qformer_config": {
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "intermediate_size": 64,
        },
    },
    "llm gemma, tower clip, connector mlp3x_gelu": {
        "llm": "gemma",
        "tower": "clip",
        "connector": "mlp3x_gelu",
        "template": "gemma",
    },
    "llm phi3 with a window, connector identity, tower open_clip": {
        "tower": "open_clip",
        "llm": "phi3",
        "connector": "identity",
        "template": "phi",
        "text": {"sliding_window": 20, "pad_token_id": 0},
    },
    "llm qwen2 with a window in some layers, tower mof": {
        "tower": "mof",
        "text": {"use_sliding_window": True, "sliding_window": 20, "max_window_layers": 1},
    },
    "llm stablelm, connector mlp1x_gelu, tower timm": {
        "llm": "stablelm",
        "tower": "timm",
        "connector": "mlp1x_gelu",
        "template": "phi",
    },
    "the real grid of 27 x 27": {"vision": {"image_size": 384, "patch_size": 14}},
    "the real grid, every patch, connector ldpv2": {
        "connector": "ldpv2",
        "vision": {"image_size": 384, "patch_size": 14},
        "vision_feature_select_strategy": "cls_patch",
    },
}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_every_part(case, tmp_path):
    arguments = CASES[case]
    write(tmp_path / "ours", **arguments)
    to_onnx(tmp_path / "ours", tmp_path / "onnx", verify=False)
    student = assert_same(tmp_path / "ours", tmp_path / "onnx", arguments.get("template", "qwen2_base"))
    count = {"the real grid of 27 x 27": 728, "the real grid, every patch, connector ldpv2": 169}.get(case)
    assert count is None or student.config["image_seq_length"] == count


def test_masks_are_transformers_own():
    """Compared with transformers' masks, with padding, a window and a cache."""
    from transformers import Qwen2Config
    from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask

    config = Qwen2Config(use_sliding_window=True, sliding_window=3, max_window_layers=1, num_hidden_layers=2)
    config._attn_implementation = "eager"
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
    found = attention_masks(config, mask, 0, 6, torch.float32)
    arguments = {
        "config": config,
        "inputs_embeds": torch.zeros(2, 6, 4),
        "attention_mask": mask,
        "past_key_values": None,
        "position_ids": None,
    }
    for kind, make in (
        ("full_attention", create_causal_mask),
        ("sliding_attention", create_sliding_window_causal_mask),
    ):
        assert torch.equal(found[kind] == 0, make(**arguments) == 0)


# refusals


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"template": "pretrain"}, "'pretrain' does not write one question"),
        (
            {"text": {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}},
            "position angles .'dynamic'. depend on the sequence length.* --allow_approximate",
        ),
    ],
    ids=["template", "positions"],
)
def test_what_does_not_fit_is_refused_before_anything_is_written(arguments, reason, tmp_path, capsys):
    write(tmp_path / "ours", **arguments)
    with pytest.raises(SystemExit) as exit_:
        main(["--to", "onnx", str(tmp_path / "ours"), str(tmp_path / "onnx")])
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert exit_.value.code == 1 and re.search(reason, error)
    assert [path.name for path in tmp_path.iterdir()] == ["ours"]


@pytest.mark.slow
def test_approximate_positions_are_measured(tmp_path, caplog):
    """Exact for sequences up to the original length; for longer ones the command prints the difference."""
    caplog.set_level("INFO", logger="tinyllava_switchkd")
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [4.0] * 4}
    text = {"pad_token_id": 0, "original_max_position_embeddings": 64, "rope_parameters": rope}
    write(tmp_path / "ours", llm="phi3", template="phi", text=text)
    main(["--to", "onnx", str(tmp_path / "ours"), str(tmp_path / "onnx"), "--allow_approximate"])
    found = json.loads((tmp_path / "onnx" / "measured.json").read_text())["fp32"]
    assert found["logits"] > 1e-3  # the template alone is longer than 64
    assert "Approximate: The language model's position angles ('longrope')" in caplog.text
    assert f"{found['equal']} of 4 answers equal" in caplog.text
    config = json.loads((tmp_path / "onnx" / "config.json").read_text())
    assert len(config["tinyllava"]["approximate"]) == 1

    model, *_ = load_pretrained_model(tmp_path / "ours", device="cpu", dtype=torch.float32)
    ids = list(range(5, 45))
    with torch.no_grad():
        logits = model.language_model(torch.tensor([ids])).logits[0].numpy()
    assert np.abs(OnnxStudent(tmp_path / "onnx", threads=1).logits([ids])[0] - logits).max() < 1e-4


@pytest.mark.slow
def test_a_wrong_graph_is_noticed_and_not_written(tmp_path, monkeypatch):
    """An export that computes something else never gets its name."""
    from tinyllava_switchkd.model.export import onnx

    write(tmp_path / "ours")
    trace = onnx.trace_embed_tokens

    def broken(model):
        model.get_input_embeddings().weight.data[5:] *= 1.5
        return trace(model)

    monkeypatch.setattr(onnx, "trace_embed_tokens", broken)
    with pytest.raises(ValueError, match="compute something else"):
        to_onnx(tmp_path / "ours", tmp_path / "onnx")
    assert [path.name for path in tmp_path.iterdir()] == ["ours"]


def test_a_precision_that_cannot_hold_the_models_numbers_is_named():
    original = object.__new__(_Original)
    zeros = np.zeros((1, 3, 4, 4), np.float32)
    original.questions, original.prompts = [Question("What is this?", picture())], [[1, -200]]
    original.pixels, original.answers, original.stops = [zeros], [[1]], set()
    original.logits = np.zeros((2, 8), np.float32)
    student = SimpleNamespace(
        config={"image_token_index": 9, "image_seq_length": 1},
        prompt_ids=lambda text: [1, 9],
        pixels=lambda images: zeros,
        logits=lambda rows, pixels: np.full((1, 2, 8), np.nan, np.float32),
    )
    with pytest.raises(ValueError, match=r"numbers that fp16 cannot represent.* leave fp16 out"):
        original.compare(student, "fp16", exact=True)
