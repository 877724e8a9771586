"""docs/train.md against the scripts and the trainer: commands, environment variables, logged metrics."""

import os
import re
import shlex
import subprocess
import sys

import pytest

from tests.docs.pages import DOCS, ROOT, first_cells, read, section
from tests.launch.scripts import run_here
from tests.train.toy import toy_arguments, toy_task, toy_trainer
from tinyllava_switchkd.data import TemplateFactory
from tinyllava_switchkd.distill import LossFactory
from tinyllava_switchkd.launch.recipe import read_recipe
from tinyllava_switchkd.launch.variables import MACHINE, TRAINING
from tinyllava_switchkd.model import ConnectorFactory
from tinyllava_switchkd.train.command_line.argv import translate_argv

FINETUNE = "conversations.json images Qwen/Qwen2.5-0.5B siglip '' mlp2x_gelu qwen2_base base common 2048"


def codes(cells):
    """Every `code` of some table cells."""
    return {code for cell in cells for code in re.findall(r"`([^`]+)`", cell)}


def commands(page="train.md"):
    """The commands of a page that call a training script with its arguments; "..." stands for finetune.sh's."""
    text = re.sub(r" *\\\n *", " ", read(page))
    lines = re.findall(r"^(?:[A-Z_]+=\S+ )*bash scripts/train/\S+\.sh .*$", text, re.MULTILINE)
    return [line.split("  #")[0].replace("...", FINETUNE).strip() for line in lines]


TOLD = 'bash() { printf "%s\\0" "$@"; printf "\\1\\0"; env -0; }; '
"""What a command's `bash` would be given, words and environment, as bash reads the line."""


@pytest.mark.parametrize("command", commands(), ids=lambda command: " ".join(command.split()[:3]))
def test_commands_are_accepted(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "hosts").write_text("node0 slots=2\nnode1 slots=2\n")
    environment = {"PATH": os.environ["PATH"], "PYTHON": sys.executable, "DRY_RUN": "1"}
    environment["CUDA_VISIBLE_DEVICES"] = "0,1,2,3,4,5,6,7"  # what the page is written for; nothing is started
    read = subprocess.run(["bash", "-c", TOLD + command], env=environment, capture_output=True, text=True, check=True)
    (script, *words), variables = (part.split("\0") for part in read.stdout.rstrip("\0").split("\0\1\0"))
    run = run_here(ROOT / script, *words, environment=dict(one.split("=", 1) for one in variables))
    assert run.returncode == 0, run.stderr
    words = shlex.split(run.stdout.splitlines()[-1])
    assert "tinyllava_switchkd.train.train" in words
    translate_argv(words[words.index("tinyllava_switchkd.train.train") + 1 :])


def test_there_are_commands():
    assert len(commands()) >= 10


def test_environment_variables_are_the_launchers():
    documented = codes(first_cells(section("train.md", "Environment variables")))
    documented |= set(re.findall(r"`([A-Z_]+)`", section("train.md", "The paper's setting")))
    parts_of_data_root = {f"{stage}_{what}" for stage in ("PRETRAIN", "FINETUNE") for what in ("DATA", "IMAGES")}
    assert {*MACHINE, *TRAINING} - parts_of_data_root == documented - parts_of_data_root


def test_variables_of_one_stage():
    table = section("train.md", "Environment variables").split("These hold for every stage")[0]
    own = {name for name, variable in (MACHINE | TRAINING).items() if variable.of_a_stage}
    assert codes(first_cells(table)) == own


def test_defaults_that_the_table_gives():
    base = read_recipe("tinyllava")
    checked = 0
    for row in section("train.md", "Environment variables").splitlines():
        names = re.findall(r"`([A-Z_]+)`", row.split("|")[1]) if row.startswith("| `") else []
        given = row.split("|")[2] if names else ""
        for name, value in zip(names, given.split(", "), strict=False):
            setting = TRAINING[name].setting if name in TRAINING else ""
            layers = (base.settings, base.switch_kd, base.adapters)
            defaults = {own[setting] for layer in layers for own in layer.values() if setting in own}
            words = re.split(r"[ ;,]+", value.strip())
            same = {default.rstrip("0").rstrip(".") if "." in default else default for default in defaults}
            assert not defaults or (defaults | same) & set(words), f"{name}: {defaults}"
            checked += bool(defaults)
    assert checked > 15


@pytest.mark.parametrize("distil", [False, True])
def test_logged_metrics(distil, tmp_path):
    documented = codes(first_cells(section("train.md", "What is logged")))
    trainer = toy_trainer(toy_arguments(tmp_path, max_steps=1), toy_task(distil))
    trainer.train()
    logged = {name for entry in trainer.state.log_history for name in entry} - {"step"}
    assert logged <= documented
    if distil:
        of_flags = {"eval_...", "gradient/PLACE/TERM"}  # logged only where a flag asks for them
        assert documented - of_flags == logged


def built_in(registry) -> set[str]:
    """Names of the package's own entries; other tests may have registered more."""
    return {name for name in registry.list() if registry(name).__module__.startswith("tinyllava_switchkd.")}


def test_names_that_can_be_used():
    names = section("train.md", "One stage at a time")
    listed = codes(line for line in names.splitlines() if line.startswith(("| connectors", "| templates", "| losses")))
    for registry in (TemplateFactory, LossFactory):
        missing = built_in(registry) - listed - {"dbild_rkl"}  # another name of dbild
        assert not missing, f"{registry.kind}s that the page does not list: {missing}"
    assert built_in(ConnectorFactory) - listed == {"mlp", "ldpnetv2"}  # mlp2x_gelu, and ldpv2's other name


def test_data_sizes_are_the_scripts():
    for name, size in (("pretrain", "27 GB"), ("finetune", "75 GB")):
        assert f"{size}" in (ROOT / "scripts" / "data" / f"prepare_{name}.sh").read_text()
        assert size in (DOCS / "train.md").read_text()
