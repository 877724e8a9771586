"""The tables of runs: shared runs, resuming, plans and verdicts."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from tinyllava_switchkd.ablations import __main__ as command
from tinyllava_switchkd.ablations import dry, paper, summary, tables, toy
from tinyllava_switchkd.io import read_json
from tinyllava_switchkd.launch.processes import Commands
from tinyllava_switchkd.quickstart.bases import BasePlan
from tinyllava_switchkd.quickstart.experiment import Experiment, Plan, once
from tinyllava_switchkd.statistics import mean_interval
from tinyllava_switchkd.visualize.attention import Look
from tinyllava_switchkd.visualize.attention_map import AttentionMap

ROOT = Path(__file__).parents[2]
SMALL = Plan(teacher_scenes=4, student_scenes=4, teacher_pt_steps=2, teacher_steps=2, student_pt_steps=2)


@pytest.fixture
def trained(monkeypatch):
    """Flags of the trainings made; scores depend on the flags."""
    made: list[dict[str, str]] = []

    def main(words: list[str]) -> int:
        flags = {key.removeprefix("--"): value for key, value in zip(words[::2], words[1::2], strict=True)}
        made.append(flags)
        log = [{"step": 1, "knee_teacher": 7.0}] if "teacher_path" in flags else []
        state = {"global_step": int(flags["max_steps"]), "log_history": log}
        Path(flags["output_dir"], "trainer_state.json").write_text(json.dumps(state))
        return 0

    def scores(self, checkpoint, split="test"):
        source = read_json(checkpoint / "made.json")["source"]
        score = 10.0 * ("teacher_path" in source) + 5 * float(source["learning_rate"] > 3e-3) + source["seed"]
        return {"score": score, "by_type": {}, "probe": 0.0, "seconds": 1.0, "steps": 2}

    monkeypatch.setattr("tinyllava_switchkd.train.train.main", main)
    monkeypatch.setattr(Experiment, "scores", scores)
    for name in ("attention", "figure", "inside"):
        monkeypatch.setattr(toy.Toy, name, lambda self, seed: None)
    monkeypatch.setattr(toy.Toy, "memory", lambda self, way, seed: None)
    return made


def test_shared_runs_are_trained_once(tmp_path, trained):
    names = ["switch", "losses", "schemes"]
    toy.run_tables(toy.Toy(Experiment(tmp_path, SMALL)), names, [1, 2], lambda line: None)
    ways = {key for name in names for key in tables.TABLES[name].ways}
    starts = 2 * 2  # PT and DPT, two seeds
    assert len(trained) == 2 + starts + 2 * len(ways)
    first = read_json(tmp_path / toy.RESULTS)
    assert first["runs"].keys() == {f"{way}/{seed}" for way in ways for seed in (1, 2)}

    number = len(trained)
    toy.run_tables(toy.Toy(Experiment(tmp_path, SMALL)), [*names, "knee"], [1], lambda line: None)
    assert len(trained) == number + 3  # those only in the table `knee`
    again = read_json(tmp_path / toy.RESULTS)["runs"]
    assert again.items() >= first["runs"].items() and again["row_pairs/1"]["knee_teacher"] == 7.0


def test_new_bases_differ_between_seeds(tmp_path, trained, monkeypatch):
    """Each seed has its own tower, language models and teacher; seeds and shipped bases start from other weights."""
    starts = []

    def make_bases(root, plan, say):
        starts.append(range(plan.first_start, plan.first_start + plan.starts))
        for name in ("base-siglip", "base-qwen2-teacher", "base-qwen2-student"):
            once(root / "models" / name, [name, plan.first_start], lambda folder: None)

    monkeypatch.setattr("tinyllava_switchkd.ablations.toy.make_bases", make_bases)
    toy.run_tables(toy.Toy(Experiment(tmp_path, SMALL)), ["bases"], [1, 2], lambda line: None)
    assert len(trained) == 2 * (2 + 1 + 3)  # per seed: the teacher's two stages, the students' start, three students
    for flags in trained:
        own = tmp_path / f"bases{1 if trained.index(flags) < 6 else 2}"
        for name in ("model_name_or_path", "vision_tower", "teacher_path", "output_dir"):
            assert name not in flags or Path(flags[name]).is_relative_to(own)
    assert len(set().union(range(BasePlan.starts), *starts)) == 3 * BasePlan.starts
    runs = read_json(tmp_path / toy.RESULTS)["runs"]
    assert runs.keys() == {f"anew_{way}/{seed}" for way in ("sft", "align", "switch") for seed in (1, 2)}


def test_a_distilled_start_and_its_student(tmp_path, trained):
    toy.Toy(Experiment(tmp_path, SMALL)).run(tables.WAYS["dpt_sft"], 1)
    dpt, last = trained[-2:]
    assert dpt["distill_method"] == "logit_kd" and dpt["tune_type_llm"] == "frozen"
    assert last["pretrained_model_path"] == dpt["output_dir"] and "teacher_path" not in last


def test_search_uses_validation_and_is_the_same_for_all(tmp_path, trained):
    machine = toy.Toy(Experiment(tmp_path, SMALL))
    toy.run_tables(machine, ["methods"], [1], lambda line: None)
    seeds = [int(flags["seed"]) for flags in trained if "seed100" in flags["output_dir"]]
    assert set(seeds) == {toy.TUNING_SEED}
    search = machine.stored["search"]
    rivals = [key for key in tables.TABLES["methods"].ways if key != "sft"]
    assert {len(search[key]["scores"]) for key in rivals} == {4} and len(search["sft"]["scores"]) == 2
    chosen = tables.tuned(tables.WAYS["llava_kd"], 2.0, 1.0)
    assert search["llava_kd"]["chosen"] == chosen.key  # the larger learning rate scores best here
    (run,) = [flags for flags in trained if flags["output_dir"].endswith(f"seed1-{chosen.key}")]
    assert float(run["learning_rate"]) == 4e-3 and float(run["vision_tower_lr"]) == 2e-3
    assert summary.chosen(machine.stored, tables.TABLES["methods"])["llava_kd"] == chosen.key


def test_all_weights_of_a_method_are_scaled_together():
    way = tables.tuned(tables.WAYS["llava_kd"], 1.0, 2.0)
    weights = {name: value for name, value in way.tuning.items() if name.endswith("_weight")}
    assert weights == {"response_weight": 2.0, "visual_weight": 2.0, "relation_weight": 1.0}
    assert tables.tuned(tables.WAYS["sft"], 1.0, 1.0) is tables.WAYS["sft"]


def test_interval_is_students_t():
    rng = np.random.default_rng(0)
    for count in (2, 3, 5, 30):
        a, b = rng.normal(size=(2, count))
        wanted = stats.ttest_rel(a, b).confidence_interval(0.95)
        mean, low, high = mean_interval(list(a - b))
        assert (mean, low, high) == pytest.approx(((a - b).mean(), wanted.low, wanted.high))
    assert mean_interval([3.0]) == (3.0, -math.inf, math.inf)


def test_verdicts_of_a_table():
    scores = {"sft": [50, 52, 51], "align": [60, 61, 62.5], "switch_kd": [60.5, 60, 62.8]}
    runs = {
        f"{way}/{seed}": {"way": way, "seed": seed, "score": score, "seconds": 1.0}
        for way, row in scores.items()
        for seed, score in enumerate(row, 1)
    }
    runs["sft/4"] = {**runs["sft/3"], "seed": 4, "score": 0}  # no other row has this seed
    stored, table = {"runs": runs}, tables.TABLES["switch"]
    assert summary.seeds_of(stored, table) == [1, 2, 3]
    said = summary.sentences(stored, table)
    assert any(line.startswith("with the switch is better than PT-SFT: +10.1 [") for line in said)
    assert any("with the switch is not clearly better or worse than without the switch: " in line for line in said)
    assert "| PT-SFT | 51.0 | 1.0 |" in summary.markdown_of(summary.lines(stored, table))
    one = {"runs": {key: run for key, run in runs.items() if run["seed"] == 1}}
    assert summary.sentences(one, table) == ["With one seed, no difference can be distinguished from chance."]
    assert "no seed is complete" in summary.text_of({"runs": {}}, table)


def test_rows_have_references_and_papers_rows_exist():
    for table in tables.TABLES.values():
        for key in table.ways:
            assert not tables.WAYS[table.reference(key)].distils
        assert not table.ours or table.ours in table.ways
    published = {row["method"] for row in read_json(ROOT / "tinyllava_switchkd/visualize/paper_tables.json")["table4"]}
    losses = tables.TABLES["losses"]
    assert {losses.label(key) for key in losses.ways} - {"SFT"} == published


def test_figure_stores_the_maps_of_each_model(tmp_path, monkeypatch):
    """Each model's answers and maps are stored under its name, for the same few scenes."""
    monkeypatch.setattr(Experiment, "train", lambda self, title, name, flags: Path(name))
    monkeypatch.setattr(toy, "load_pretrained_model", lambda path, device: (path.name, None, None, None))

    def look(model, _tokenizer, _processor, picture, question, max_new_tokens):
        empty = model.endswith("sft")
        weights = np.full((1, 1, 2, 2), float(len(model)))
        found = None if empty else AttentionMap(("4",), weights)
        return Look("", "" if empty else f"{model}: {question.split()[-1]}", found, ())

    monkeypatch.setattr(toy, "look", look)
    machine = toy.Toy(Experiment(tmp_path, dataclasses.replace(SMALL, test_scenes=12)))
    machine.figure(3)
    stored = read_json(tmp_path / toy.RESULTS)["figure"]["scenes"]
    assert stored["seed"] == 3 and len(stored["by_question"]) == toy.SCENES_DRAWN
    for scene in stored["by_question"].values():
        assert list(scene["maps"]) == ["Teacher", "SFT", "Switch-KD"] and scene["question"].startswith("What digit")
        assert scene["maps"]["SFT"] == {"answer": "", "cells": None}
        name = "tiny-llava-base-qwen2-student-base-siglip-seed3-switch_kd"
        assert scene["maps"]["Switch-KD"]["cells"] == [[float(len(name))] * 2] * 2


def test_inside_stores_knees_and_gradient_shares(tmp_path, monkeypatch):
    asked = []

    def train(self, title, name, flags):
        asked.append(flags)
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        row = {"step": 20, "ce": 1.0, "knee_teacher": 7.00001, "gradient/tower/ce": 0.5, "learning_rate": 1.0}
        (folder / "trainer_state.json").write_text(json.dumps({"log_history": [row, {"step": 20, "loss": 1.0}]}))
        (folder / "config.json").write_text(json.dumps({"text_config": {"vocab_size": 300}}))
        return folder

    monkeypatch.setattr(Experiment, "train", train)
    machine = toy.Toy(Experiment(tmp_path, SMALL))
    machine.inside(2)
    found = machine.stored["inside"]["switch_kd"]
    kept = [{"step": 20, "knee_teacher": 7.0, "gradient/tower/ce": 0.5}, {"step": 20}]
    assert found == {"seed": 2, "vocabulary": 300, "history": kept}
    assert asked[-1]["log_gradient_shares"] == toy.GRADIENTS_EVERY and asked[-1]["switch_weight"] == 1.0


SCRIPTS = {table.script: table.key for table in tables.TABLES.values()}


@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_call_the_command(script, tmp_path):
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\necho "$@"\n')
    python.chmod(0o755)
    environment = {**os.environ, "PYTHON": str(python)}
    done = subprocess.run(
        ["bash", ROOT / "scripts" / "train" / script, "--seeds", "2"], env=environment, capture_output=True, text=True
    )
    assert done.stdout.split() == ["-m", "tinyllava_switchkd.ablations", SCRIPTS[script], "--seeds", "2"]


def test_a_dry_run_at_quickstart_scale_builds_everything(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("DRY_RUN", "1")
    monkeypatch.setattr(command, "STORED", tmp_path / "none.json")
    assert command.main([*tables.TABLES, "--output", str(tmp_path / "out")]) == 0
    out = capsys.readouterr().out
    assert "teacher larger-teacher, pretrain" in out and "student, bridge_switch" in out and "Hours of one core" in out
    assert not (tmp_path / "out").exists()


def test_dry_run_uses_stored_seconds(tmp_path, trained):
    """All stages of the table `methods`, tuned or not, with times from runs of seed 2: 8 trainings of 1 s."""
    machine = toy.Toy(Experiment(tmp_path / "made", SMALL))
    toy.run_tables(machine, ["methods"], [2], lambda line: None)
    for stage in machine.stored["stages"].values():
        stage["seconds"] = 1.0
    planned = toy.plan(["methods"], machine.stored, tmp_path)
    assert [training.seconds for training in planned] == [1.0] * 8
    assert [training.seconds for training in toy.plan(["methods"], {}, tmp_path)] == [None] * 8


TINY_QWEN = {
    "model_type": "qwen2",
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "intermediate_size": 16,
    "vocab_size": 64,
    "tie_word_embeddings": True,
}


@pytest.fixture
def tiny_configs(monkeypatch):
    """Tiny models under the paper's names; the small tower has another width and grid."""
    tower = {
        "model_type": "siglip_vision_model",
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 16,
        "image_size": 32,
        "patch_size": 8,
    }
    small = {**tower, "hidden_size": 8, "patch_size": 16}
    models = {name: TINY_QWEN if "Qwen" in name else tower for name in paper.MODELS.values()}
    models[paper.MODELS["small-tower"]] = small
    monkeypatch.setattr(dry, "CONFIGS", models)


def test_a_dry_run_at_the_papers_scale(capsys, monkeypatch, tiny_configs):
    monkeypatch.setenv("DRY_RUN", "1")
    monkeypatch.setenv("SCALE", "paper")
    monkeypatch.setenv("SEEDS", "2")
    assert command.main([name for name in tables.TABLES if name != "bases"]) == 0
    out = capsys.readouterr().out
    for words in (
        "DPT, Qwen2.5-0.5B",
        "bridge_switch, Qwen2.5-0.5B and siglip-base",
        "for 2 seeds",
        "No GPU has been",
        "mix665k.json (665,298",
    ):
        assert words in out
    assert out.count("larger-teacher: finetune") == 1  # shared by two rows


def test_new_bases_are_refused_at_the_papers_scale(capsys, monkeypatch):
    monkeypatch.setenv("DRY_RUN", "1")
    monkeypatch.setenv("SCALE", "paper")
    assert command.main(["bases"]) == 1
    assert "Qwen2.5 and SigLIP are already trained" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["TEACHER_PATH", "PRETRAINED_PATH"])
def test_one_teacher_or_start_is_refused_at_the_papers_scale(name, capsys, monkeypatch):
    monkeypatch.setenv("DRY_RUN", "1")
    monkeypatch.setenv("SCALE", "paper")
    monkeypatch.setenv(name, "/t")
    assert command.main(["switch"]) == 1
    assert f"{name} is one model, but the tables train teachers" in capsys.readouterr().err


def test_hours_are_operations_divided_by_rate(tiny_configs):
    """Computed by hand for a frozen tower and a trained language model without a teacher."""
    models = (paper.MODELS["student"], paper.MODELS["tower"])
    flags = {"connector_type": "linear", "mm_vision_select_layer": -1, "model_max_length": 64}
    flags["tune_type_vision_tower"] = "frozen"
    planned = dry.Planned("x", "finetune", flags, models, None, gpus=2, samples=10)
    language = 4 * (16 * 16 + 16) - 16 + 3 * 16 * 16 + 64 * 16  # q, k, v with bias, o without, MLP, head
    tower = 2 * (4 * (16 * 16 + 16) + 2 * 16 * 16 + 32)
    wanted = 6 * language * (15 + dry.TEXT_TOKENS["finetune"]) + 2 * tower * 16
    assert dry.operations(planned) == wanted
    assert dry.hours(planned) == pytest.approx(10 * wanted / (2 * dry.PEAK * dry.SHARE * 3600))
    assert "36 %" in (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8") and dry.SHARE == 0.36


def test_the_papers_settings_reach_the_commands():
    steps = paper.Paper({"DEVICE": "cpu", "OUTPUT_ROOT": "/out"}).steps(tables.WAYS["llava_kd"], 3)
    assert [step.name.split(":")[0].split(",")[0] for step in steps] == ["teacher", "teacher", "PT", "llava_kd"]
    flags = steps[-1].flags
    assert flags["distill_method"] == "llava_kd" and flags["seed"] == "3" and "temperature" not in flags
    assert flags["teacher_path"] == steps[1].training.output_dir
    assert flags["pretrained_model_path"] == steps[2].training.output_dir
    switch = paper.Paper({"DEVICE": "cpu"}).steps(tables.WAYS["switch_kd"], 1)[-1].flags
    assert (switch["temperature"], switch["align_weight"], switch["switch_weight"]) == ("3.0", "1.0", "1.0")
    assert switch["learning_rate"] == "2e-5" and switch["tune_type_vision_tower"] == "full"


@pytest.mark.parametrize("table", [table for table in tables.TABLES if table != "bases"])
def test_rows_of_a_table_differ_in_method_and_models_only(table):
    at_scale = paper.Paper({"DEVICE": "cpu", "OUTPUT_ROOT": "/out"})
    ways = [tables.WAYS[key] for key in tables.TABLES[table].ways]
    may_differ = {name for way in ways for name in (way.tuning or {})} | {
        *("model_name_or_path", "vision_tower", "output_dir", "pretrained_model_path"),
        *("teacher_path", "teacher_bits"),
    }
    last = [at_scale.steps(way, 1)[-1].flags for way in ways]
    first, *others = [{name: value for name, value in flags.items() if name not in may_differ} for flags in last]
    assert first["tune_type_vision_tower"] == "full" and all(other == first for other in others)


def test_run_at_the_papers_scale_resumes(tmp_path, monkeypatch):
    monkeypatch.setenv("DEVICE", "cpu")
    monkeypatch.setenv("OUTPUT_ROOT", str(tmp_path / "out"))
    ran, fail_at = [], [4]

    def run(self, words, environment):
        ran.append(words)
        return int(len(ran) == fail_at[0])

    monkeypatch.setattr(Commands, "run", run)
    monkeypatch.setattr(paper, "_row", lambda folder, name: {"score": 1.0, "seconds": None})
    with pytest.raises(paper.StageError, match="exit code 1"):
        paper.run_tables(["switch"], [1], tmp_path, lambda line: None)
    fail_at[0] = -1
    assert list(read_json(tmp_path / "ablations.json")["runs"]) == ["sft/1"]
    ran.clear()
    paper.run_tables(["switch"], [1], tmp_path, lambda line: None)
    assert sum("eval" in words for words in ran) == 2  # SFT was finished
    assert set(read_json(tmp_path / "ablations.json")["runs"]) == {"sft/1", "align/1", "switch_kd/1"}


@pytest.mark.parametrize("seeds", ["0", "many", "-1"])
def test_wrong_number_of_seeds(seeds, capsys):
    with pytest.raises(SystemExit):
        command.main(["switch", "--seeds", seeds])
    assert "must be at least 1" in capsys.readouterr().err


def test_runs_share_a_teacher_cache_if_the_method_can_use_it(tmp_path, trained, monkeypatch):
    """A cache does not change a run's mark, so a training with it is not made again without it."""
    machine = toy.Toy(Experiment(tmp_path, SMALL), str(tmp_path / "cache"))
    for key in ("switch_kd", "fkl", "llava_kd", "align_kd", "dpt_sft"):
        machine.train(tables.WAYS[key], 1)
    found = {flags["distill_method"]: flags.get("teacher_cache") for flags in trained if "teacher_path" in flags}
    there = str(tmp_path / "cache")
    assert found == {"switch_kd": there, "logit_kd": there, "llava_kd": None, "align_kd": None}
    number = len(trained)
    toy.Toy(Experiment(tmp_path, SMALL)).train(tables.WAYS["fkl"], 1)
    assert len(trained) == number
    environment = {"TEACHER_CACHE": there, "TEACHER_CACHE_DTYPE": "bf16", "DEVICE": "cpu"}
    steps = {key: paper.Paper(environment).steps(tables.WAYS[key], 1) for key in ("fkl", "llava_kd", "align_kd")}
    assert {key: all_[-1].flags.get("teacher_cache") for key, all_ in steps.items()} == {
        **dict.fromkeys(("llava_kd", "align_kd")),
        "fkl": there,
    }
    assert not any("teacher_cache" in step.flags for all_ in steps.values() for step in all_[:-1])
