"""The flags as read without torch, compared with the full parser."""

from __future__ import annotations

import dataclasses
import os
import re
import subprocess
import sys

import pytest
from transformers import HfArgumentParser

from tests.train.test_arguments import V1_FINETUNE
from tinyllava_switchkd.distill.flags import method_settings, settings
from tinyllava_switchkd.distill.methods import MethodFactory
from tinyllava_switchkd.io import read_json
from tinyllava_switchkd.train.command_line import flags
from tinyllava_switchkd.train.command_line.arguments import (
    DataArguments,
    ModelArguments,
    TrainingArguments,
    distill_arguments,
)
from tinyllava_switchkd.train.command_line.argv import check_command_line
from tinyllava_switchkd.train.command_line.flags import NAMES, help_text, own_flags, transformers_flags

REQUIRED = ["--data_path", "d.json", "--output_dir", "out"]
ENTRY = [sys.executable, "-m", "tinyllava_switchkd.train.train"]


def test_the_names_are_the_full_parsers():
    groups = (ModelArguments, DataArguments, distill_arguments(), TrainingArguments)
    names = {field.name for group in groups for field in dataclasses.fields(group) if field.init}
    assert own_flags().keys() | transformers_flags().keys() == names


def test_the_types_are_the_full_parsers():
    parser = HfArgumentParser((ModelArguments, DataArguments, distill_arguments(), TrainingArguments))
    types = {action.dest: action.type for action in parser._actions}
    checked = 0
    for flag in (transformers_flags() | own_flags()).values():
        if flag.type in ("int", "float"):
            assert types[flag.name].__name__ == flag.type, flag
            checked += 1
    assert checked > 40


def test_a_v1_scripts_line_passes_and_is_only_read():
    before = dict(os.environ)
    check_command_line([*REQUIRED, *V1_FINETUNE.split()])
    assert os.environ == before


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--lerning_rate", "3"], "There is no argument --lerning_rate; did you mean --learning_rate?"),
        (["--learning_rate", "fast"], "--learning_rate is 'fast'; it must be a number."),
        (["--lora_r", "1.5"], "--lora_r is '1.5'; it must be a whole number."),
        (["--packing", "maybe"], "--packing is 'maybe'; it must be True or False."),
        (["--warmup_ratio", "3"], "--warmup_ratio is '3'"),
        (["stray"], None),
        (["--distill_method", "swich_kd"], "--distill_method is 'swich_kd'; it must be one of align_kd, llava_kd"),
        (["--training_recipe", "loar"], "--training_recipe is 'loar'; it must be one of common, lora"),
        (["--template", "vicuna"], "--template is 'vicuna'; it must be one of chatml"),
        (["--vision_tower_lr", "1e-5"], "--tune_type_vision_tower is frozen; leave the learning rate out"),
        (["--training_recipe", "lora", "--tune_type_llm", "full"], "--training_recipe lora needs a part to adapt"),
    ],
)
def test_what_is_certainly_wrong(words, sentence):
    if sentence is None:
        check_command_line([*REQUIRED, "--report_to", *words])
    else:
        with pytest.raises(ValueError) as error:
            check_command_line([*REQUIRED, *words])
        assert sentence in str(error.value)


def test_without_transformers_its_flags_are_not_refused(monkeypatch):
    monkeypatch.setattr(flags, "transformers_flags", dict)
    check_command_line([*REQUIRED, "--num_train_epochs", "2"])
    with pytest.raises(ValueError, match="--lora_r is 'x'"):
        check_command_line([*REQUIRED, "--lora_r", "x"])


def test_settings_of_methods_are_refused_as_by_the_full_parser():
    """Every setting of every method and loss, with every method and loss."""
    flags = [name for name in settings() if name != "distill_loss"]
    shipped = read_json(NAMES)["names"]  # other tests may have registered more
    for method in shipped["distill_method"]:
        chosen = MethodFactory(method)
        for loss in shipped["distill_loss"] if "distill_loss" in chosen.settings() else (None,):
            given = {} if loss is None else {"distill_loss": loss}
            for flag in flags:
                words = {"teacher_path": "t", "distill_method": method, **given, flag: "1"}
                argv = [*REQUIRED, *(word for name, value in words.items() for word in (f"--{name}", value))]
                try:
                    method_settings(chosen, {**given, flag: "1"})
                except ValueError as error:
                    with pytest.raises(ValueError, match=re.escape(str(error).split(" belongs")[0])):
                        check_command_line(argv)
                else:
                    check_command_line(argv)


def test_the_entry_answers_before_torch_is_imported(tmp_path):
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("raise SystemExit('torch is imported')")
    environment = {"PYTHONPATH": f"{tmp_path}:{':'.join(sys.path)}", "PATH": "/usr/bin:/bin"}
    run = lambda *words: subprocess.run([*ENTRY, *words], capture_output=True, text=True, env=environment)  # noqa: E731
    done = run("--help")
    assert done.returncode == 0 and done.stdout.strip() == help_text()
    for flag in ("--distill_method", "--learning_rate", "--tune_type_llm", "--temperature"):
        assert flag in done.stdout
    done = run("--data_path", "d.json", "--output_dirr", "out")
    assert (
        done.returncode == 1
        and done.stderr == "error: There is no argument --output_dirr; did you mean --output_dir?\n"
    )
    assert "torch is imported" in run(*REQUIRED).stderr
