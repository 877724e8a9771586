"""recipe.yaml beside a model repeats the same training."""

from __future__ import annotations

import os

import torch
import yaml
from safetensors.torch import load_file

from tests.train.world import command_line, write_world
from tinyllava_switchkd.launch.__main__ import main as launch
from tinyllava_switchkd.train.command_line.argv import parse_arguments
from tinyllava_switchkd.train.reliability.record import recipe_of
from tinyllava_switchkd.train.train import main


def test_a_run_from_its_recipe_is_the_same_run(tmp_path, monkeypatch, capfd):
    world = write_world(tmp_path / "world")
    first, second = tmp_path / "first", tmp_path / "second"
    words = command_line(world, first, gradient_accumulation_steps=2, optim="sgd", max_grad_norm=0.5, warmup_ratio=0.5)
    assert main(words) == 0
    recipe = yaml.safe_load((first / "recipe.yaml").read_text())
    (stage,) = recipe["stages"]
    assert stage["settings"]["global_batch_size"] == "4" and stage["settings"]["precision"] == "fp32"
    assert stage["settings"]["warmup_steps"] == "0.5" and "use_cpu" not in stage["settings"]
    assert recipe["machine"]["versions"]["torch"]

    for name in ("GPUS", "LAUNCHER", "MAX_STEPS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("DEVICE", "cpu")
    monkeypatch.setenv("DRY_RUN", "1")
    assert launch(["train", "--recipe", str(first), "--output_dir", str(second)]) == 0
    command = capfd.readouterr().out.splitlines()[-1].split()
    assert main(command[command.index("tinyllava_switchkd.train.train") + 1 :]) == 0
    one, two = load_file(first / "model.safetensors"), load_file(second / "model.safetensors")
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
    again = yaml.safe_load((second / "recipe.yaml").read_text())["stages"][0]["settings"]
    assert again | {"output_dir": str(first)} == stage["settings"]


def test_secrets_are_left_out(tmp_path):
    words = command_line({name: "x" for name in ("finetune", "images", "llm", "tower")}, tmp_path / "out")
    arguments = parse_arguments([*words, "--hub_token", "hf_secret"])
    assert "hf_secret" not in str(recipe_of(arguments)) and os.fspath(tmp_path) in str(recipe_of(arguments))
