"""The entry point: the stages in sequence, resuming with the same command, and mistakes refused in advance."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.tiny import write_tiny_llm, write_tiny_tower
from tests.train.world import command_line, write_world
from tinyllava_switchkd.model import load_pretrained_model
from tinyllava_switchkd.train.train import main


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Base models and data, and the results of pre-training and of fine-tuning (a teacher)."""
    folder = tmp_path_factory.mktemp("train")
    world = write_world(folder / "world")
    teacher = {"model_name_or_path": world["teacher_llm"]}
    world |= {name: str(folder / name) for name in ("student_pt", "teacher_pt", "teacher_sft")}
    for stage, name, changes in (
        ("pretrain", "student_pt", {}),
        ("pretrain", "teacher_pt", teacher),
        ("finetune", "teacher_sft", {**teacher, "pretrained_model_path": world["teacher_pt"]}),
    ):
        assert main(command_line(world, world[name], stage, **changes)) == 0
    return world


def distil(world, output_dir, **changes):
    stage = {"pretrained_model_path": world["student_pt"], "teacher_path": world["teacher_sft"]}
    return command_line(world, output_dir, **{**stage, **changes})


def state_of(folder):
    return load_file(Path(folder) / "model.safetensors")


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_pretraining_changes_only_the_connector_and_gives_a_complete_model(world):
    base = load_file(Path(world["llm"]) / "model.safetensors")
    state = state_of(world["student_pt"])
    for name, value in base.items():
        assert torch.equal(state[f"language_model.{name}"], value)
    model, tokenizer, processor, length = load_pretrained_model(world["student_pt"], device="cpu")
    assert (model.config.template, length) == ("pretrain", 96)
    assert tokenizer.eos_token == "<|endoftext|>" and processor.size == {"height": 28, "width": 28}
    connectors = [state[name] for name in sorted(state) if name.startswith("connector.")]
    assert len(connectors) == 4
    other = state_of(world["teacher_pt"])
    assert not torch.equal(other["connector._connector.0.weight"], state["connector._connector.0.weight"])


def test_distillation_starts_from_pretraining_and_trains_the_whole_student(world, tmp_path):
    assert main(distil(world, tmp_path, report_to=None)) == 0
    assert list((tmp_path / "runs").rglob("events.out.tfevents.*"))  # TensorBoard unless told otherwise
    before, after = state_of(world["student_pt"]), state_of(tmp_path)
    assert before.keys() == after.keys()
    changed = {name.split(".")[0] for name in after if not torch.equal(before[name], after[name])}
    assert changed == {"language_model", "vision_tower", "connector"}
    model, _, _, length = load_pretrained_model(tmp_path, device="cpu")
    assert (model.config.template, length, model.config.tune_type_vision_tower) == ("qwen2_base", 400, "full")
    log = json.loads((tmp_path / "trainer_state.json").read_text())["log_history"]
    parts = {"ce", "align", "visual_switch", "knee_teacher", "knee_student", "topk_overlap", "tokens_per_second"}
    assert parts <= log[0].keys() and len(log) == 3


def test_the_same_command_resumes_and_then_does_nothing(world, tmp_path, caplog):
    """Interrupted after its second checkpoint of four, with a third half written."""
    through, stopped = tmp_path / "through", tmp_path / "stopped"
    settings = {"max_steps": 4, "save_steps": 1}
    assert main(distil(world, through, **settings)) == 0
    shutil.copytree(through, stopped)
    for name in ("trainer_state.json", "model.safetensors"):
        (stopped / name).unlink()
    shutil.rmtree(stopped / "checkpoint-4")
    (stopped / "checkpoint-3" / "optimizer.pt").unlink()
    assert main(distil(world, stopped, **settings)) == 0
    assert same(state_of(through), state_of(stopped))

    changed = [(path, path.stat().st_mtime_ns) for path in sorted(stopped.rglob("*"))]
    assert main(distil(world, stopped, **settings)) == 0
    assert changed == [(path, path.stat().st_mtime_ns) for path in sorted(stopped.rglob("*"))]

    assert main(distil(world, stopped, **settings, overwrite_output_dir=True, learning_rate=1e-3)) == 0
    assert not same(state_of(through), state_of(stopped))


def test_v1s_split_pretraining_output_feeds_fine_tuning(world, tmp_path):
    """The layout that TinyLLaVA v1's pretrain.sh writes."""
    split = tmp_path / "split"
    state = state_of(world["student_pt"])
    for part, prefix in (
        ("language_model", "language_model."),
        ("vision_tower", "vision_tower._vision_tower."),
        ("connector", "connector."),
    ):
        (split / part).mkdir(parents=True)
        weights = {name[len(prefix) :]: value for name, value in state.items() if name.startswith(prefix)}
        torch.save(weights, split / part / "pytorch_model.bin")
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(Path(world["student_pt"]) / name, split)
    outputs = []
    for number, path in enumerate((split, world["student_pt"])):
        assert main(command_line(world, tmp_path / str(number), pretrained_model_path=path)) == 0
        outputs.append(state_of(tmp_path / str(number)))
    assert same(*outputs)


def test_a_checkpoint_alone_can_be_fine_tuned(world, tmp_path):
    """custom_finetune: without language model and tower; settings that are not given come from the checkpoint."""
    names = ("model_name_or_path", "vision_tower", "connector_type", "mm_vision_select_layer", "model_max_length")
    arguments = command_line(
        world, tmp_path, pretrained_model_path=world["teacher_sft"], **dict.fromkeys(names), training_recipe="lora",
        tune_type_llm="lora", tune_type_vision_tower="frozen", lora_r=2,
    )  # fmt: skip
    assert main(arguments) == 0
    model, *_, length = load_pretrained_model(tmp_path, device="cpu")
    assert (model.config.vision_feature_layer, length, model.config.hidden_size) == (-2, 400, 48)


@pytest.mark.parametrize("bits", [8, 4])
def test_distillation_from_a_quantised_teacher(world, tmp_path, bits):
    """If bitsandbytes is installed: the student is written as usual, with losses near those of the exact teacher."""
    pytest.importorskip("bitsandbytes")
    logs = []
    for name, changes in (("exact", {}), ("held", {"teacher_bits": bits, "gradient_checkpointing": True})):
        assert main(distil(world, tmp_path / name, max_steps=1, **changes)) == 0
        logs.append(json.loads((tmp_path / name / "trainer_state.json").read_text())["log_history"][0])
    exact, held = logs
    assert held["ce"] == pytest.approx(exact["ce"], rel=1e-5)
    assert held["align"] == pytest.approx(exact["align"], rel=0.2) and held["align"] != exact["align"]
    assert state_of(tmp_path / "exact").keys() == state_of(tmp_path / "held").keys()


def test_a_quantised_teacher_without_bitsandbytes(world, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("tinyllava_switchkd.model.quantized.find_spec", lambda name: None)
    assert main(distil(world, tmp_path / "out", teacher_bits=4)) == 1
    assert "error: --teacher_bits 4 needs the package bitsandbytes" in capsys.readouterr().err
    assert main(distil(world, tmp_path / "out", teacher_bits=4, estimate=True)) == 0  # needs no bitsandbytes
    told = capsys.readouterr().out
    assert "teacher" in told and "An image takes 15 visual tokens" in told
    assert not (tmp_path / "out").exists()


def spoilt(world, tmp_path, name):
    """A command line with one mistake, and words that the error must contain."""
    sft = {"pretrained_model_path": world["student_pt"]}
    records = json.loads(Path(world["finetune"]).read_text())
    data = tmp_path / "data.json"
    match name:
        case "no data file":
            return {**sft, "data_path": tmp_path / "no.json"}, ["--data_path", "no.json", "does not exist"]
        case "no image folder":
            return {**sft, "image_folder": tmp_path / "no"}, ["--image_folder", "not a folder"]
        case "missing image":
            records[1]["image"] = "gone.png"
            data.write_text(json.dumps(records))
            return {**sft, "data_path": data}, ["gone.png"]
        case "malformed JSON":
            data.write_text(json.dumps(records)[:-40])
            return {**sft, "data_path": data}, ["data.json"]
        case "role order":
            records[2]["conversations"].reverse()
            data.write_text(json.dumps(records))
            return {**sft, "data_path": data}, ["data.json"]
        case "unknown template":
            return {**sft, "template": "vicuna"}, ["'vicuna'", "qwen2_base"]
        case "template of another tokenizer":
            return {**sft, "template": "llama"}, ["'llama'", "does not fit the tokenizer", "qwen2_base"]
        case "unknown recipe":
            return {**sft, "training_recipe": "dora"}, ["'dora'", "common, lora, qlora"]
        case "unknown connector":
            return {"connector_type": "pixel_shuffle"}, ["'pixel_shuffle'", "mlp"]
        case "unknown vision tower":
            return {"vision_tower": "some/eva-02"}, ["some/eva-02", "siglip"]
        case "no language model":
            return {"model_name_or_path": tmp_path / "llm"}, ["--model_name_or_path", "does not exist"]
        case "no pretrained model":
            return {"pretrained_model_path": tmp_path / "pt"}, ["--pretrained_model_path", "pretrain.sh"]
        case "pretrained model without weights":
            shutil.copytree(
                world["student_pt"], tmp_path / "pt", ignore=shutil.ignore_patterns("*.safetensors", "check*")
            )
            return {"pretrained_model_path": tmp_path / "pt"}, [str(tmp_path / "pt"), "no weights"]
        case "another connector than the checkpoint's":
            return {**sft, "connector_type": "linear"}, ["--connector_type is linear", "mlp2x_gelu"]
        case "no teacher":
            return {**sft, "teacher_path": tmp_path / "teacher"}, ["--teacher_path", "does not exist"]
        case "unknown loss":
            return {**sft, "teacher_path": world["teacher_sft"], "distill_loss": "mse"}, ["'mse'", "dbild"]
        case "teacher of another template":
            changes = {"template": "phi", "teacher_path": world["teacher_sft"]}
            return {**sft, **changes}, ["'phi'", "'qwen2_base'"]
        case "teacher of another vision tower":
            config = Path(world["teacher_sft"]) / "config.json"
            other = tmp_path / "teacher"
            tower = write_tiny_tower(tmp_path / "siglip-wide", hidden=64)
            llm = {"model_name_or_path": world["teacher_llm"], "vision_tower": tower}
            assert config.is_file() and main(command_line(world, other, **llm)) == 0
            return {**sft, "teacher_path": other, "bridge": "none"}, ["32", "64", "--bridge auto"]
        case "teacher of another tokenizer":
            other = tmp_path / "teacher"
            llm = write_tiny_llm(tmp_path / "qwen2-instruct", style="qwen2_instruct")
            changes = {"model_name_or_path": llm, "template": "qwen2_instruct"}
            assert main(command_line(world, other, **changes)) == 0
            return {**sft, "teacher_path": other}, ["eos_token"]
        case "output is a file":
            (tmp_path / "file").write_text("")
            return {**sft, "output_dir": tmp_path / "file" / "out"}, ["--output_dir", "is a file"]
        case "unknown argument":
            return {**sft, "pretrained_path": "x"}, ["--pretrained_path", "did you mean --pretrained_model_path"]


@pytest.mark.parametrize(
    "name",
    [
        "no data file",
        "no image folder",
        "missing image",
        "malformed JSON",
        "role order",
        "unknown template",
        "template of another tokenizer",
        "unknown recipe",
        "unknown connector",
        "unknown vision tower",
        "no language model",
        "no pretrained model",
        "pretrained model without weights",
        "another connector than the checkpoint's",
        "no teacher",
        "unknown loss",
        "teacher of another template",
        "teacher of another vision tower",
        "teacher of another tokenizer",
        "output is a file",
        "unknown argument",
    ],
)
def test_mistakes_are_refused_in_one_sentence_and_nothing_is_written(world, tmp_path, capsys, name):
    changes, words = spoilt(world, tmp_path, name)
    output = tmp_path / "output"
    output.mkdir()
    (output / "mine.txt").write_text("precious")
    capsys.readouterr()
    assert main(command_line(world, **{"output_dir": output, **changes})) == 1
    message = capsys.readouterr().err
    errors = [line for line in message.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "Traceback" not in message
    for word in words:
        assert word in errors[0], errors[0]
    assert [path.name for path in output.iterdir()] == ["mine.txt"]
