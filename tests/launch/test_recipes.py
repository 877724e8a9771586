"""Recipes: what they resolve to, the precedence of settings, and invalid recipes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import HfArgumentParser

from tinyllava_switchkd.launch import recipe as recipes
from tinyllava_switchkd.launch.__main__ import main
from tinyllava_switchkd.launch.devices import Devices
from tinyllava_switchkd.launch.recipe import names, path_of, read_recipe
from tinyllava_switchkd.launch.stages import Request, one_stage, parse_flags, run_name, whole_recipe
from tinyllava_switchkd.launch.variables import read
from tinyllava_switchkd.train.command_line.arguments import distill_arguments

EIGHT = Devices(tuple("01234567"), 8)
MODULE = "tinyllava_switchkd.train.train"


def request(devices=EIGHT, flags=(), **variables):
    return Request(read(variables, training=True), devices, "python", Path("/play"), parse_flags(flags))


def flags_of(training):
    words = training.command[training.command.index(MODULE) + 1 :]
    return {name[2:]: value for name, value in zip(words[::2], words[1::2], strict=True)}


def resolved(name, *args, **kwargs):
    return [flags_of(training) for training in whole_recipe(read_recipe(name), request(*args, **kwargs))]


def test_the_papers_recipes():
    for name, teacher, student in (("0.5b_from_3b", "3B", "0.5B"), ("1.5b_from_7b", "7B", "1.5B")):
        stages = resolved(f"switchkd_qwen2.5_{name}")
        assert [stage["model_name_or_path"][-len(teacher) :] for stage in stages[:2]] == [teacher] * 2
        assert all(stage["model_name_or_path"] == f"Qwen/Qwen2.5-{student}" for stage in stages[2:])
        assert {stage["vision_tower"] for stage in stages} == {"google/siglip-so400m-patch14-384"}
        assert [stage["learning_rate"] for stage in stages] == ["1e-3", "2e-5", "1e-3", "2e-5"]
        batches = [
            int(stage["per_device_train_batch_size"]) * int(stage["gradient_accumulation_steps"]) * 8
            for stage in stages
        ]
        assert batches == [256, 128, 256, 128]
        sft, dft = stages[1], stages[3]
        assert dft["teacher_path"] == sft["output_dir"] and dft["pretrained_model_path"] == stages[2]["output_dir"]
        assert (dft["temperature"], dft["align_weight"], dft["switch_weight"]) == ("3.0", "1.0", "1.0")
        assert (sft["tune_type_vision_tower"], dft["tune_type_vision_tower"]) == ("frozen", "full")
        assert "teacher_path" not in stages[0] | stages[1] | stages[2]
        assert stages[0]["data_path"] == "/play/data/text_files/blip_laion_cc_sbu_558k.json"
    clip = resolved("switchkd_clip_ldpv2")
    assert clip[3]["connector_type"] == "ldpv2" and clip[3]["vision_tower"] == "openai/clip-vit-large-patch14-336"


def test_llava_kds_three_stages():
    """DPT, SFT, DFT: seeds, learning rates, the frozen tower and the start of each stage, as in its scripts."""
    pretrain, finetune, dpt, sft, dft = resolved("llava_kd", DATA_ROOT="/d")
    assert dpt["teacher_path"] == dft["teacher_path"] == finetune["output_dir"]
    assert "teacher_path" not in sft and "distill_method" not in sft
    assert sft["pretrained_model_path"] == dpt["output_dir"] and dft["pretrained_model_path"] == sft["output_dir"]
    assert dpt["distill_method"] == dft["distill_method"] == "llava_kd"
    assert not {"distill_loss", "temperature", "switch_weight"} & (dpt.keys() | dft.keys())
    assert (dpt["seed"], sft["seed"], dft["seed"]) == ("1234", "42", "1234")
    assert (dpt["template"], dft["template"]) == ("pretrain", "qwen2_base")
    assert {stage["tune_type_vision_tower"] for stage in (pretrain, finetune, dpt, sft, dft)} == {"frozen"}
    assert dft["data_path"] == sft["data_path"] == "/d/text_files/llava_v1_5_mix665k.json"


def test_align_kd_and_logit_kd():
    _, _, pretrain, distill = resolved("align_kd")
    assert pretrain["distill_method"] == distill["distill_method"] == "align_kd"
    assert (pretrain["learning_rate"], pretrain["mm_projector_lr"]) == ("2e-5", "1e-3")
    assert (pretrain["tune_type_llm"], distill["learning_rate"], distill["image_aspect_ratio"]) == (
        "full",
        "4e-5",
        "pad",
    )
    distill = resolved("logit_kd", TEACHER_PATH="/t")[-1]
    assert (distill["distill_method"], distill["distill_loss"], distill["teacher_path"]) == ("logit_kd", "fkl", "/t")
    assert "switch_weight" not in distill


@pytest.mark.parametrize("method", ["llava_kd", "align_kd", "logit_kd"])
def test_another_method_with_the_recipes_of_switch_kd(method):
    """The settings of Switch-KD stay behind; those of a wrong name stop the first stage."""
    for name in ("switchkd_qwen2.5_0.5b_from_3b", "switchkd_clip_ldpv2"):
        distill = resolved(name, DISTILL_METHOD=method)[-1]
        words = [word for flag, value in distill.items() for word in (f"--{flag}", value)]
        given, _ = HfArgumentParser([distill_arguments()]).parse_args_into_dataclasses(
            words, return_remaining_strings=True
        )
        assert given.method().name == method


@pytest.mark.parametrize(
    "variables",
    [
        {"DISTILL_METHOD": "swich_kd"},
        {"DISTILL_LOSS": "dblid"},
        {"TEMPERATURE": "2", "DISTILL_METHOD": "llava_kd"},
        {"TEACHER_CACHE_DTYPE": "bf16"},
        {"FILL_TEACHER_CACHE": "True"},
        {"TEACHER_CACHE": "folder", "DISTILL_METHOD": "llava_kd"},
        {"ALIGN_WEIGHT": "0", "SWITCH_WEIGHT": "0"},
        {"DISTILL_VISION_TOWER_LR": "1e-5", "DISTILL_TUNE_VISION_TOWER": "frozen"},
    ],
)
def test_a_mistake_in_the_last_stage_stops_the_first(variables):
    name = next(iter(variables)).lower().removeprefix("distill_v")
    with pytest.raises(ValueError, match=f"{name}.* (is|are|needs|does|names) "):
        resolved("switchkd_qwen2.5_0.5b_from_3b", **variables)
    resolved("switchkd_qwen2.5_0.5b_from_3b", FILL_TEACHER_CACHE="False", TEACHER_CACHE="folder", SWITCH_WEIGHT="0")


@pytest.mark.parametrize("name", names())
def test_every_setting_has_its_comment(name):
    for line in path_of(name).read_text().splitlines():
        key, _, value = line.strip().partition(":")
        if value.strip() and not line.lstrip().startswith(("#", "-")) and "  #" not in line and "\t#" not in line:
            assert key in ("extends", "teacher", "student", "model", "image_folder", "data_path", "stage"), line


def test_given_teacher_skips_its_stages():
    stages = resolved("llava_kd", TEACHER_PATH="/teacher")
    assert len(stages) == 3 and stages[0]["teacher_path"] == stages[2]["teacher_path"] == "/teacher"
    assert "teacher_path" not in stages[1]
    assert resolved("llava_kd", flags=["--teacher_path", "/teacher"]) == stages


def test_words_of_extra_arguments():
    for text in (
        "--run_name 'my run' --lr_scheduler_kwargs '{\"min_lr_rate\": 0.1}'",
        '--run_name="my run" --lr_scheduler_kwargs {"min_lr_rate": 0.1}',
    ):
        own = flags_of(one_stage("pretrain", NINE, request(EXTRA_ARGS=text)))
        assert (own["run_name"], own["lr_scheduler_kwargs"]) == ("my run", '{"min_lr_rate": 0.1}')
    with pytest.raises(ValueError, match=r"EXTRA_ARGS is .* with every quotation mark closed"):
        request(EXTRA_ARGS="--run_name 'my run")


def test_precedence_of_settings(tmp_path):
    mine = tmp_path / "mine.yaml"
    mine.write_text(
        "extends: switchkd_qwen2.5_0.5b_from_3b\nsettings: {learning_rate: 3e-4, seed: 7}\n"
        "defaults: {distill: {learning_rate: 4e-4}}\n"
        "stages:\n- {stage: pretrain, model: student}\n"
        "- {stage: distill, model: student, settings: {weight_decay: 0.1, teacher_path: /t}}\n"
    )
    rates = lambda *args, **variables: [stage["learning_rate"] for stage in resolved(str(mine), *args, **variables)]  # noqa: E731
    assert rates() == ["3e-4", "4e-4"]
    assert rates(LEARNING_RATE="1e-6") == ["1e-6", "1e-6"]
    assert rates(LEARNING_RATE="1e-6", DISTILL_LEARNING_RATE="2e-6") == ["1e-6", "2e-6"]
    assert rates(LEARNING_RATE="1e-6", DISTILL_LEARNING_RATE="") == ["1e-6", "4e-4"]
    assert rates(LEARNING_RATE="1e-6", EXTRA_ARGS="--learning_rate 5e-6") == ["5e-6", "5e-6"]
    assert rates(EIGHT, ["--learning-rate", "9e-6"], EXTRA_ARGS="--learning_rate 5e-6") == ["9e-6", "9e-6"]
    assert rates(TRAIN_RECIPE="lora") == ["3e-4", "2e-4"]  # adapters are trained only in the last stage
    distill = resolved(str(mine))[-1]
    assert (distill["seed"], distill["weight_decay"], distill["teacher_path"]) == ("7", "0.1", "/t")
    assert "num_train_epochs" not in resolved(str(mine), EXTRA_ARGS="--num_train_epochs null")[0]


NINE = ["d.json", "images", "Qwen/Qwen2.5-0.5B", "g/siglip", "", "mlp2x_gelu", "base", "common", "2048"]


@pytest.mark.parametrize("older", ["conv_version", "conv-version", "conv_mode"])
def test_old_names_of_the_template(older, tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text(f"extends: align_kd\ndefaults:\n  distill: {{{older}: phi}}\n")
    distill = resolved(str(file))[-1]
    assert distill["template"] == "phi"
    assert not {"conv_version", "conv_mode"} & distill.keys()
    assert resolved("align_kd", flags=(f"--{older}", "llama"))[-1]["template"] == "llama"


def test_one_stage_with_a_teacher():
    """DPT by pretrain.sh; settings of distillation reach only stages with a teacher."""
    plain = flags_of(one_stage("pretrain", NINE, request(DISTILL_METHOD="llava_kd", TEMPERATURE="2")))
    assert not {"teacher_path", "distill_method", "temperature"} & plain.keys()
    distilled = flags_of(one_stage("pretrain", NINE, request(DISTILL_METHOD="llava_kd", TEACHER_PATH="/t")))
    assert (distilled["teacher_path"], distilled["distill_method"]) == ("/t", "llava_kd")
    ten = [*NINE[:6], "qwen2_base", *NINE[6:], "/t"]
    other = flags_of(one_stage("distill", ten, request(DISTILL_METHOD="logit_kd", ALIGN_WEIGHT="2")))
    assert other["align_weight"] == "2" and not {"distill_loss", "temperature", "switch_weight"} & other.keys()


def test_validation():
    own = flags_of(one_stage("pretrain", NINE, request(EVAL_DATA="v.json", EVAL_STEPS="50")))
    assert (own["eval_data_path"], own["eval_steps"], own["eval_strategy"]) == ("v.json", "50", "steps")
    shared = flags_of(one_stage("pretrain", NINE, request(EVAL_STEPS="50", EXTRA_ARGS="--eval_share 0.1")))
    assert (shared["eval_share"], shared["eval_steps"], shared["eval_strategy"]) == ("0.1", "50", "steps")
    assert not {"eval_steps", "eval_strategy"} & flags_of(one_stage("pretrain", NINE, request(EVAL_STEPS="50"))).keys()


@pytest.mark.parametrize("version", ["../../x", "..", "a/b", "", "-x", "x\n"])
def test_version_is_one_folder_name(version):
    with pytest.raises(ValueError, match="VERSION is"):
        one_stage("pretrain", [*NINE[:6], version, *NINE[7:]], request())
    with pytest.raises(ValueError, match="VERSION is"):
        run_name("llm", "tower", version, "pretrain")


@pytest.mark.parametrize(("index", "value"), [(8, "0"), (8, "long"), (0, ""), (7, "")])
def test_wrong_arguments(index, value):
    arguments = list(NINE)
    arguments[index] = value
    with pytest.raises(ValueError):
        one_stage("pretrain", arguments, request())


WRONG_RECIPES = {
    "": "has no stages",
    "- a\n- b\n": "must be names with values",
    "settings: [a]\n": "must be names with values",
    "setings: {}\n": "there is no part 'setings'; did you mean settings?",
    "extends: gone\n": "There is no recipe gone",
    "extends: swichkd_clip_ldpv2\n": "did you mean switchkd_clip_ldpv2?",
    "extends: mine\n": "extends itself",
    "version: ../x\n": "version is '../x'",
    "world: big\n": "world is 'big'; it must be tiny",
    "models: {student: [a]}\n": "must be a single value",
    "models: {pupil: a}\n": "there is no model 'pupil'",
    "settings: {learning_rate: {a: b}}\n": "must be a value",
    "settings: {seed: 1, seed: 2}\n": "'seed' is set twice",
    "settings: {max_steps: 1, max-steps: 2}\n": "max-steps is set twice",
    "settings: {zero: 2, deepspeed: x}\n": "deepspeed is set twice",
    "settings: {max_steps: !!float 2}\n": "without a YAML tag",
    "settings: {max_steps: !!null ''}\n": "without a YAML tag",
    "settings: {max_steps: !!python/object/apply:os.getpid []}\n": "python/object",
    "settings: {max_steps: 1\0}\n": "mine.yaml, character 24, U+0000",
    'settings: {output_dir: "\\ud800"}\n': "line 1: not a recipe (it contains half of a character)",
    "settings: {'two words': 1}\n": "not a valid name of a setting",
    "stages: {}\n": "must be a list",
    "stages: []\n": "must be a list",
    "stages:\n- {stage: sft}\n": "stage is 'sft'",
    "stages:\n- {stage: finetune, model: pupil}\n": "model is 'pupil'",
    "stages:\n- {stage: finetune, model: student, distills: perhaps}\n": "distills is 'perhaps'",
    "stages:\n- {stage: finetune, from: pretrain}\n": "there is no part of a stage 'from'",
    "stages:\n- {stage: finetune, model: student}\n": "set STUDENT_LLM",
    "extends: debug\nstages:\n- {stage: distill, model: student}\n": "needs a teacher",
    "stages:\n- {settings: {seed: 1}}\n": "output_dir is missing",
    "stages:\n- {settings: {output_dir: x, global_batch_size: 0}}\n": "global_batch_size is '0'",
    "stages:\n- {settings: {output_dir: x, precision: int8}}\n": "PRECISION is 'int8'",
    "extends: debug\ndefaults: {distill: {temperature: -1}}\n": "--temperature is '-1'",  # the last of its stages
    "extends: debug\ndefaults: {distill: {align_weight: .inf}}\n": "--align_weight is '.inf'",
    "extends: debug\nsettings: {template: phi, conv_version: phi}\n": "in two spellings of template",
    "settings: {seed: 1\n": "line",
    "a: b: c\n": "line 1",
}


@pytest.mark.parametrize("text", WRONG_RECIPES)
def test_wrong_recipes(text, tmp_path, capsys, monkeypatch):
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    monkeypatch.setenv("DEVICE", "cpu")
    monkeypatch.setenv("DRY_RUN", "1")
    assert main(["train", "--recipe", str(path)]) == 1
    out, err = capsys.readouterr()
    assert WRONG_RECIPES[text] in err and err.count("\n") == 1 and MODULE not in out


@pytest.mark.parametrize(
    ("given", "remedy"),
    [
        ({"flags": ["--output_dir", "x"]}, "OUTPUT_ROOT"),
        ({"flags": ["--pretrained_model_path", "x"]}, "--pretrained_model_path is for one .* run that stage"),
        ({"PRETRAINED_PATH": "x"}, "PRETRAINED_PATH is for one training"),
        ({"EXTRA_ARGS": "--teacher_path x"}, "set TEACHER_PATH"),
    ],
)
def test_what_is_for_one_stage_is_refused_for_several(given, remedy):
    with pytest.raises(ValueError, match=remedy):
        whole_recipe(read_recipe("debug"), request(**given))


@pytest.mark.parametrize(
    ("name", "remedy"),
    [
        ("DISTILL_LEARNING_RATE", "set LEARNING_RATE"),
        ("PRETRAIN_EXTRA_ARGS", "set EXTRA_ARGS"),
        ("CONNECTOR", "pass --connector_type"),
        ("CONV_VERSION", "pass --template"),
        ("PRETRAINED_PATH", "pass --pretrained_model_path"),
        ("FINETUNE_DATA", "change the recipe"),
    ],
)
def test_variables_that_a_runs_recipe_would_ignore(name, remedy, tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("stages:\n- settings: {output_dir: x, data_path: d.json}\n")
    assert resolved(str(path), LEARNING_RATE="1e-3", DATA_ROOT="/d")[0]["learning_rate"] == "1e-3"
    value = "--seed 1" if name.endswith("ARGS") else "1e-3"
    with pytest.raises(ValueError, match=f"{name} does nothing with the recipe recipe.*{remedy}"):
        resolved(str(path), **{name: value})


def test_the_command_lists_and_prints_recipes(capsys):
    assert main(["recipes"]) == 0
    listed = capsys.readouterr().out
    assert all(name in listed for name in names())
    assert main(["recipes", "llava_kd"]) == 0
    assert capsys.readouterr().out == (recipes.RECIPES / "llava_kd.yaml").read_text()


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["trian"], "there is no command 'trian'; did you mean train?"),
        (["train"], "Usage: tinyllava-switchkd train STAGE"),
        (["train", "sft"], "Usage: tinyllava-switchkd train STAGE"),
        (["train", "pretrain", "a"], "It takes 9 arguments, not 1."),
        (["train", "--recipe"], "--recipe takes one recipe"),
        (["train", "--recipe", "llava_dk"], "did you mean llava_kd?"),
        (["train", "--recipe", "debug", "--help"], "Usage: tinyllava-switchkd train STAGE"),
        (["eval"], "Usage: tinyllava-switchkd eval BENCHMARK MODEL_PATH [MODEL_NAME]"),
        (["eval", "pope"], "Usage: tinyllava-switchkd eval pope MODEL_PATH [MODEL_NAME]"),
        (["eval", "pope", "vlm", "../x"], "MODEL_NAME is '../x'"),
        (["eval", "pope", "vlm", ".."], "MODEL_NAME is '..'"),
        (["eval", "pop", "vlm"], "Unknown benchmark 'pop'"),
    ],
)
def test_wrong_command_lines(words, sentence, capsys, monkeypatch):
    monkeypatch.setenv("DEVICE", "cpu")
    assert main(words) == 1
    assert sentence in capsys.readouterr().err


def test_commands_do_not_import_torch():
    code = (
        "import sys, os; os.environ.update(DRY_RUN='1', DEVICE='cpu')\n"
        "from tinyllava_switchkd.launch.__main__ import main\n"
        "assert main(['train', '--recipe', 'debug']) == 0 and main(['eval', 'pope', 'vlm']) == 0\n"
        "sys.exit(any(name in sys.modules for name in ('torch', 'transformers')))"
    )
    assert subprocess.run([sys.executable, "-c", code], stdout=subprocess.DEVNULL).returncode == 0


@pytest.mark.parametrize("words", [("recipes",), ("train", "--recipe", "llava_kd"), ("--help",)])
def test_a_closed_pipe_ends_quietly(words):
    """Like `| head -1`."""
    reader, writer = os.pipe()
    os.close(reader)
    environment = {**os.environ, "DRY_RUN": "1", "DEVICE": "cpu"}
    command = [sys.executable, "-m", "tinyllava_switchkd.launch", *words]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, env=environment)
    os.close(writer)
    assert (done.returncode, "Broken pipe" in done.stderr) == (0, False)
