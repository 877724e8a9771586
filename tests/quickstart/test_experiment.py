"""Runs that are made once: what is reused, what is made again, and how failures are reported."""

from __future__ import annotations

import logging
import sys

import pytest

from tinyllava_switchkd.io import read_json
from tinyllava_switchkd.quickstart import base_models, report
from tinyllava_switchkd.quickstart.experiment import (
    COMMON,
    FINETUNE,
    MADE,
    PRETRAIN,
    Experiment,
    Plan,
    StageError,
    call,
    once,
    prepare_environment,
)


class Calls:
    """A fake training entry point: records its flags and writes the files of a run."""

    def __init__(self, monkeypatch) -> None:
        self.flags: list[dict[str, str]] = []
        monkeypatch.setattr("tinyllava_switchkd.train.train.main", self.main)

    def main(self, words: list[str]) -> int:
        flags = dict(zip(words[::2], words[1::2], strict=True))
        self.flags.append({key.removeprefix("--"): value for key, value in flags.items()})
        return 0


@pytest.fixture
def calls(monkeypatch):
    return Calls(monkeypatch)


SMALL = Plan(teacher_scenes=4, student_scenes=4, teacher_pt_steps=2, teacher_steps=2, student_pt_steps=2)


def test_folder_is_made_once_per_source(tmp_path):
    made = []

    def make(folder):
        assert not list(folder.iterdir())  # no files of an unfinished one
        made.append(folder)
        (folder / "content").write_text("")
        return {"seconds": 1.5}

    for source in ({"a": 1}, {"a": 1}, {"a": 2}):
        once(tmp_path / "run", source, make)
    assert len(made) == 2
    note = read_json(tmp_path / "run" / MADE)
    assert note["source"] == {"a": 2} and note["seconds"] == 1.5

    (tmp_path / "run" / MADE).write_text("{ cut off")
    once(tmp_path / "run", {"a": 2}, make)
    assert len(made) == 3


def test_unfinished_folder_is_made_again(tmp_path):
    def fail(folder):
        (folder / "left-over").write_text("")
        raise OSError("full")

    with pytest.raises(OSError):
        once(tmp_path / "run", 1, fail)
    once(tmp_path / "run", 1, lambda folder: None)
    assert [file.name for file in (tmp_path / "run").iterdir()] == [MADE]


def test_run_is_repeated_if_its_inputs_change(tmp_path, calls):
    bases = tmp_path / "bases"
    for name in ("base-siglip", "base-qwen2-student"):
        (bases / name).mkdir(parents=True)
        (bases / name / "model.safetensors").write_bytes(b"first")

    def start(seed=1):
        return Experiment(tmp_path / "out", SMALL, bases).student_start(seed)

    assert start() == start() and len(calls.flags) == 1
    start(seed=2)
    assert len(calls.flags) == 2 and calls.flags[1]["seed"] == "2"
    (bases / "base-siglip" / "model.safetensors").write_bytes(b"other")
    start()
    assert len(calls.flags) == 3
    Experiment(tmp_path / "out", SMALL, bases).student("finetune", 1)
    start_of_1 = read_json(tmp_path / "out" / "checkpoints" / calls.flags[-1]["pretrained_model_path"] / MADE)["mark"]
    (bases / "base-siglip" / "model.safetensors").write_bytes(b"third")
    Experiment(tmp_path / "out", SMALL, bases).student("finetune", 1)  # its start is made again, so it is, too
    assert len(calls.flags) == 6
    again = read_json(tmp_path / "out" / "checkpoints" / calls.flags[-1]["pretrained_model_path"] / MADE)["mark"]
    assert again != start_of_1


def test_students_of_a_seed_differ_only_in_the_compared_flags(tmp_path, calls):
    experiment = Experiment(tmp_path, SMALL)
    ways = report.ways(experiment)
    flags = {}
    for way, (stage, extra) in ways.items():
        folder = experiment.student(stage, 1, extra)
        flags[way] = {
            key: value for key, value in calls.flags[-1].items() if key not in ("output_dir", "logging_steps")
        }
        assert folder.name.endswith(f"-seed1-{stage}")  # scripts/demo.sh looks for this ending
    sft = flags["sft"]
    longer = {key for key, value in flags["sft_equal_time"].items() if sft.get(key) != value}
    assert longer == {"max_steps"} and int(flags["sft_equal_time"]["max_steps"]) == 2 * int(sft["max_steps"])
    assert {key for key, value in flags["switch_kd"].items() if sft.get(key) != value} == set(experiment.switch_kd())
    assert flags["switch_kd"]["teacher_path"] == str(experiment.teacher())


def test_flags_are_those_of_the_entry_point(tmp_path, calls):
    """Flags have the same names as in the scripts at full size."""
    from tinyllava_switchkd.train.command_line.argv import parse_arguments

    experiment = Experiment(tmp_path, SMALL)
    for stage, extra in report.ways(experiment).values():
        experiment.student(stage, 1, extra)
    for flags in calls.flags:
        words = [word for key, value in flags.items() for word in (f"--{key}", value)]
        arguments = parse_arguments(words)
        assert arguments.training.learning_rate == float(flags["learning_rate"])
        assert arguments.training.tune_type_llm == flags["tune_type_llm"]
    assert {**COMMON, **PRETRAIN}["tune_type_llm"] == "frozen" and FINETUNE["tune_type_vision_tower"] == "full"


def test_failure_shows_the_end_of_the_log(tmp_path, capsys):
    log = tmp_path / "logs" / "run.log"
    logger = logging.getLogger("tinyllava_switchkd")
    before = logger.handlers

    def fails(words):
        print("standard output")
        print("the reason", file=sys.stderr)
        logger.handlers = [logging.StreamHandler()]
        return 1

    def raises(words):
        raise ZeroDivisionError("one by nothing")

    def wrong_argument(words):
        print("there is no argument --x", file=sys.stderr)
        raise SystemExit(2)

    for command, reason in ((fails, "the reason"), (raises, "one by nothing"), (wrong_argument, "no argument --x")):
        with pytest.raises(StageError, match=rf"(?s)Teacher failed; its log is .*run\.log:.*{reason}"):
            call("Teacher", command, ["--flag", 3], log)
    assert logger.handlers is before
    assert "Teacher --flag 3" in log.read_text() and "standard output" in log.read_text()
    assert capsys.readouterr() == ("", "")


def test_shipped_bases_match_the_code():
    """They have the tokenizer and shapes that `bases` makes, and the promised size."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from tinyllava_switchkd.quickstart.bases import BasePlan

    fresh = base_models.build_tokenizer()
    for who, width in BasePlan().widths:
        folder = base_models.SHIPPED / f"base-qwen2-{who}"
        model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
        assert model.config.hidden_size == width and model.config.num_hidden_layers == BasePlan().layers
        assert tokenizer.get_vocab() == fresh.get_vocab()
    total = sum(file.stat().st_size for file in base_models.SHIPPED.rglob("*.safetensors"))
    assert 900_000 < total < 1_300_000


def test_loading_a_model_shows_no_progress_bar(monkeypatch):
    from transformers.utils import logging as transformers_logging

    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    transformers_logging.enable_progress_bar()
    prepare_environment()
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.enable_progress_bar()
    assert not shown
