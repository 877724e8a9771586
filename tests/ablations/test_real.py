"""Real pretrained weights, with tiny models in their place: packages, questions, runs and measures."""

from __future__ import annotations

import itertools
import struct
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, Dinov2Config, Dinov2Model

from tests.tiny import tiny_text_config, tiny_tokenizer, write_tiny_llm, write_tiny_tower
from tinyllava_switchkd.ablations import __main__ as command
from tinyllava_switchkd.ablations import real, real_plan, real_runs
from tinyllava_switchkd.ablations import real_sources as sources
from tinyllava_switchkd.ablations.tables import WAYS
from tinyllava_switchkd.distill.losses.knee import leading


def made_pictures(of_each: int) -> list[sources.Picture]:
    """Pictures of every kind; all their things have different names."""
    names = [(kind, f"{kind} {number}") for kind in sources.KINDS for number in range(of_each)]
    return [sources.picture(f"{thing.replace(' ', '-')}.png", kind, f"A {thing}. It is nice!") for kind, thing in names]


# Pictures and questions


def test_captions_and_things():
    assert sources.picture("x.png", "food", "A red apple. Eat it!")[2:] == ("A red apple.", "red apple")
    assert sources.picture("x.png", "town", "“Yield” means you wait.").thing == ""
    assert sources.picture("x.png", "animals", "Some 2.5 m tall birds").caption == "Some 2.5 m tall birds"


def test_held_out_pictures_are_balanced_and_have_unseen_captions():
    pictures = [*made_pictures(5), sources.picture("copy.png", "food", "A food 0.")]
    train, held = sources.split(pictures, 3)
    assert Counter(one.kind for one in held) == dict.fromkeys(sources.KINDS, 3)
    assert len(train) + len(held) == len(pictures) and not {*train} & {*held}
    assert not {one.caption for one in train} & {one.caption for one in held}


def test_absent_things_reveal_no_answer():
    pictures = made_pictures(4)
    kind_of = {one.thing: one.kind for one in pictures}
    absent = sources.absent_things(pictures, 0)
    assert sorted(absent) == sorted(kind_of)  # each is asked about once absent and once present
    assert all(kind_of[thing] != one.kind for thing, one in zip(absent, pictures, strict=True))
    samples = sources.conversations(pictures, 3)
    answers = Counter(turn["value"] for one in samples for turn in one["conversations"][1::2])
    assert answers["Yes"] == answers["No"] == len(pictures) and answers["animal"] == 4
    assert all(one["conversations"][0]["value"].startswith("<image>\n") for one in samples)
    with pytest.raises(ValueError, match="another kind"):
        sources.absent_things(pictures[:4], 0)


# Models


def test_kept_layers_are_evenly_spread(tmp_path, monkeypatch):
    kept = sources.spread(30, 11)
    assert kept[0] == 0 and kept[-1] == 29 and set(np.diff(kept)) <= {2, 3, 4} and len(kept) == 11
    torch.manual_seed(0)
    full = AutoModelForCausalLM.from_config(tiny_text_config("llama", layers=3))
    full.config.quantization_config = {"quant_method": "gguf"}
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *_, **__: full)
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda *_, **__: tiny_tokenizer("qwen2_instruct"))
    sources.write_language_model(tmp_path / "x.gguf", tmp_path / "out", layers=2)
    written, state = load_file(tmp_path / "out" / "model.safetensors"), full.state_dict()
    assert "quantization_config" not in (tmp_path / "out" / "config.json").read_text()
    for ours, theirs in ((0, 0), (1, 2)):
        name = "model.layers.{}.mlp.up_proj.weight"
        assert torch.equal(written[name.format(ours)], state[name.format(theirs)])


def _message(field: int, data: bytes | str | int) -> bytes:
    """A protobuf field in its wire format."""

    def varint(value: int) -> bytes:
        low, rest = value & 127, value >> 7
        return bytes([low | 128 * bool(rest)]) + (varint(rest) if rest else b"")

    if isinstance(data, int):
        return varint(field << 3) + varint(data)
    data = data.encode() if isinstance(data, str) else data
    return varint(field << 3 | 2) + varint(len(data)) + data


def test_tower_is_read_from_onnx(tmp_path):
    torch.manual_seed(0)
    size = {"image_size": 28, "patch_size": 14, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 1}
    model = Dinov2Model(Dinov2Config(**size)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2)
    model.save_pretrained(tmp_path / "model")
    graph = b""
    for number, (name, tensor) in enumerate(load_file(tmp_path / "model" / "model.safetensors").items()):
        called, node = f"backbone.{name}", ""
        if name == "embeddings.mask_token":
            continue
        if name == "embeddings.position_embeddings":
            pieces = {"onnx::Concat_1": tensor[:, :1], "onnx::Reshape_2": tensor[:, 1:]}
            graph += _message(1, _message(1, "onnx::Concat_1") + _message(3, "/backbone/embeddings/Concat_6"))
        elif tensor.dim() == 2 and name.startswith("encoder"):
            called, node = (
                f"onnx::MatMul_{number}",
                f"/backbone/{name.removesuffix('.weight').replace('.', '/')}/MatMul",
            )
            node = node.replace("encoder/layer/", "encoder/layer.")
            pieces = {called: tensor.T}
        else:
            pieces = {called: tensor}
        if node:
            graph += _message(1, _message(1, "input") + _message(1, called) + _message(3, node))
        for piece, value in pieces.items():
            raw = b"".join(struct.pack("<f", x) for x in value.flatten().tolist())
            dims = b"".join(_message(1, dim) for dim in value.shape)
            graph += _message(5, dims + _message(2, 1) + _message(8, piece) + _message(9, raw))
    (tmp_path / "x.onnx").write_bytes(_message(1, 8) + _message(7, graph))
    sources.write_tower(tmp_path / "x.onnx", tmp_path / "dinov2", 28)
    pixels = torch.randn(1, 3, 28, 28)
    written = Dinov2Model.from_pretrained(tmp_path / "dinov2").eval()
    with torch.no_grad():
        assert torch.allclose(written(pixels)[0], model(pixels)[0], atol=1e-5)


# Runs


@pytest.fixture
def experiment(tmp_path):
    """A function that makes an experiment in the same folder with tiny models."""
    pictures = made_pictures(3)
    (tmp_path / "images").mkdir()
    rng = np.random.default_rng(0)
    for one in pictures:
        Image.fromarray(rng.integers(0, 255, (28, 28, 3), np.uint8)).save(tmp_path / "images" / one.name)
    models = {
        "teacher": write_tiny_llm(tmp_path / "llama-teacher", "llama", "qwen2_instruct", layers=3),
        "student": write_tiny_llm(tmp_path / "llama-student", "llama", "qwen2_instruct", seed=1, layers=2),
        "tower": write_tiny_tower(tmp_path / "dinov2", "dinov2"),
    }
    plan = real_plan.Plan(*(2, 2, 2, 3, 2), batch_size=4, held_out=1)
    said: list[str] = []

    def make(**more):
        return real_runs.Real(tmp_path, plan, models, sources.split(pictures, 1), say=said.append, **more)

    make.said = said
    return make


def test_runs_are_measured_and_reused(experiment):
    ways = [WAYS["sft"], WAYS["switch_kd"]]
    first = experiment()
    real_runs.run_all(first, ways, [1])
    assert first.stored["runs"].keys() == {"sft/1", "switch_kd/1", "teacher/0"}
    for run in first.stored["runs"].values():
        assert {len(run[name]) for name in real.MEASURES} == {len(sources.KINDS)}
        assert set(run["there"]) <= {0.0, 50.0, 100.0} and set(run["kind"]) <= {0.0, 100.0}
    states = first.stored["states"]
    assert {"before", "during", "after sft", "after switch_kd", "before, adapted teacher"} == states.keys()
    assert states["during"]["step"] == 2
    before = states["before"]["temperatures"]["3"]
    # both have the same untrained tower, so the switch pathway equals the teacher's
    assert before["means"]["visual_switch"] == pytest.approx(0, abs=1e-6) and before["norms"]["visual_switch"] < 1e-3
    assert states["after switch_kd"]["temperatures"]["3"]["means"]["visual_switch"] > 0
    assert states["before, adapted teacher"]["temperatures"]["3"]["norms"]["visual_switch"] > 0

    lines = len(experiment.said)
    late = experiment(until=float("-inf"))  # no time left, but nothing to do either
    real_runs.run_all(late, ways, [1])
    assert len(experiment.said) == lines and late.stored["runs"] == first.stored["runs"]
    with pytest.raises(real_plan.OutOfTimeError, match="Student 2"):
        real_runs.run_all(late, ways, [1, 2])

    text = real.text_of(late.stored)
    assert all(word in text for word in ("Switch-KD", "minus SFT", "before, adapted teacher", "POPE"))


def test_pair_shares_equal_enumeration():
    logits = 4 * torch.randn(5, 40, generator=torch.Generator().manual_seed(0))
    order = leading(logits)
    found = real_runs.pair_shares(logits, order, 3.0, (1, 4))
    for row in range(5):
        z = logits[row].double().sort(descending=True).values[: int(order.k[row])]
        pairs = list(itertools.combinations(range(len(z)), 2))
        p = torch.stack([(z[m] - z[n]) / 3 for m, n in pairs]).softmax(0)
        for column, size in enumerate((1, 4)):
            wanted = sum(share for share, (m, n) in zip(p, pairs, strict=True) if m < size or n < size)
            assert float(found[row, column]) == pytest.approx(float(wanted))


def test_words_f1():
    assert real_runs.words_f1("A red apple.", "an apple") == pytest.approx(200 / 3)
    assert real_runs.words_f1("", "An apple.") == real_runs.words_f1("pear", "An apple.") == 0


def test_plan_fits_its_minutes_and_is_kept(tmp_path):
    for seeds in (1, 3):
        plan = real_plan.Plan.within(90, seeds)
        assert sum(plan.seconds(seeds)) == pytest.approx(5400, rel=0.05)
    assert real_plan.plan_of(tmp_path, plan, hub=False) == plan
    assert real_plan.plan_of(tmp_path, real_plan.Plan(), hub=False) == plan  # a second call keeps the first one's plan


def test_command_refuses_invalid_arguments(capsys, tmp_path):
    for words, said in ((["--ways", "nonsense"], "nonsense"), (["--minutes", "0"], "above 0")):
        with pytest.raises(SystemExit) as caught:
            command.main(["real", *words])
        assert caught.value.code == 2 and said in capsys.readouterr().err
