"""Runs that are killed, resumed and shared: no answer is made twice or lost, and missing ones are reported."""

from __future__ import annotations

import json
import os
import signal
from collections import Counter
from pathlib import Path

import pytest

from tests.eval import forked
from tests.eval.miniature import read_lines, write_checkpoint, write_lines, write_pope
from tinyllava_switchkd.eval.answers import AnswerFolder, check_keys
from tinyllava_switchkd.eval.benchmarks import Question
from tinyllava_switchkd.eval.generate import Answerer
from tinyllava_switchkd.eval.run import main
from tinyllava_switchkd.eval.score import score_file

QUESTIONS, DISTINCT = 36, 12  # write_pope: 4 images x 3 words, each in 3 categories


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    """Checkpoint, benchmark folder, and the answers of an undisturbed run by question id."""
    root = tmp_path_factory.mktemp("resume")
    checkpoint, data = write_checkpoint(root / "tiny-vlm"), write_pope(root / "pope")
    assert main(arguments(checkpoint, data, root / "out")) == 0
    return checkpoint, data, texts_of(read_lines(root / "out" / "answers.jsonl"))


def arguments(checkpoint, data, out, *more) -> list[str]:
    common = ["pope", "--model_path", checkpoint, "--data_dir", str(data), "--output_dir", str(out)]
    return [*common, "--max_new_tokens", "8", "--batch_size", "2", *more]


def texts_of(rows) -> dict[int, str]:
    texts = {row["question_id"]: row["text"] for row in rows}
    assert len(texts) == len(rows), "an answer is there twice"
    return texts


@pytest.fixture
def generated(monkeypatch):
    """Counts the prompts for which this process generates."""
    count = Counter()
    answer = Answerer.answer

    def counted(self, prompts, *args, **kwargs):
        count["prompts"] += len(prompts)
        return answer(self, prompts, *args, **kwargs)

    monkeypatch.setattr(Answerer, "answer", counted)
    return count


def test_the_answers_are_in_order_and_an_equal_pair_is_generated_once(setting, tmp_path, generated):
    checkpoint, data, texts = setting
    assert main(arguments(checkpoint, data, tmp_path / "out")) == 0
    rows = read_lines(tmp_path / "out" / "answers.jsonl")
    assert [row["question_id"] for row in rows] == list(range(QUESTIONS))
    assert texts_of(rows) == texts
    assert generated["prompts"] == DISTINCT
    assert len(set(texts.values())) > 3
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [".lock", "answers.jsonl", "run.json"]


@pytest.mark.parametrize("sabotage", ["kill", "kill in a line"])
def test_a_killed_run_continues_where_it_stopped(setting, tmp_path, generated, sabotage):
    checkpoint, data, texts = setting
    out = tmp_path / "out"
    process = forked.start(arguments(checkpoint, data, out), tmp_path / "log", sabotage=sabotage, after=2)
    assert forked.end(process) == -9
    part = (out / "answers.part-0.jsonl").read_text(encoding="utf-8")
    assert part.endswith(forked.HALF_A_LINE) == (sabotage == "kill in a line")
    kept = part.count("\n")
    assert kept == 2 * 2 * 3  # two batches of two prompts, each of three questions
    assert not (out / "answers.jsonl").exists()

    assert main(arguments(checkpoint, data, out)) == 0
    rows = read_lines(out / "answers.jsonl")
    assert texts_of(rows) == texts
    assert generated["prompts"] == DISTINCT - 4
    old = [json.loads(line)["answer_id"] for line in part.split("\n")[:kept]]
    assert set(old) <= {row["answer_id"] for row in rows}


def test_a_killed_run_with_workers_can_be_resumed_at_once(setting, tmp_path):
    checkpoint, data, texts = setting
    out = tmp_path / "out"
    more = ("--num_workers", "2")
    process = forked.start(arguments(checkpoint, data, out, *more), tmp_path / "log", sabotage="kill", after=1)
    forked.wait_until_gone(process)
    assert main(arguments(checkpoint, data, out)) == 0  # orphaned workers hold no lock
    assert texts_of(read_lines(out / "answers.jsonl")) == texts


def test_a_terminated_run_names_what_is_missing(setting, tmp_path):
    checkpoint, data, _ = setting
    process = forked.start(
        arguments(checkpoint, data, tmp_path / "out"), tmp_path / "log", sabotage="terminate", after=3
    )
    assert forked.end(process) == 130
    log = (tmp_path / "log").read_text()
    assert "18 of 36 questions of POPE have no answer" in log
    assert len(json.loads((tmp_path / "out" / "missing.json").read_text())) == 18


def test_a_complete_run_is_not_made_again(setting, tmp_path, generated):
    checkpoint, data, texts = setting
    for _ in range(2):
        assert main(arguments(checkpoint, data, tmp_path / "out")) == 0
    assert generated["prompts"] == DISTINCT
    assert texts_of(read_lines(tmp_path / "out" / "answers.jsonl")) == texts


def test_a_limited_run_is_continued(setting, tmp_path, generated):
    checkpoint, data, texts = setting
    out = tmp_path / "out"
    assert main(arguments(checkpoint, data, out, "--limit", "5")) == 0
    assert [row["question_id"] for row in read_lines(out / "answers.jsonl")] == list(range(5))
    run = json.loads((out / "run.json").read_text())
    assert run["limit"] == 5
    assert run["counts"] == {"questions": 36, "answered": 5, "generated": 5, "images": 2, "unreadable_images": 0}
    assert main(arguments(checkpoint, data, out)) == 0
    assert generated["prompts"] == DISTINCT  # the repeated questions take the text of the first five
    assert texts_of(read_lines(out / "answers.jsonl")) == texts
    assert main(arguments(checkpoint, data, out, "--limit", "5")) == 0
    assert len(read_lines(out / "answers.jsonl")) == QUESTIONS  # no answer is thrown away
    run = json.loads((out / "run.json").read_text())
    assert run["limit"] is None
    assert run["counts"]["answered"] == QUESTIONS


def test_a_killed_extension_of_a_limited_run_leaves_its_score(setting, tmp_path, monkeypatch):
    checkpoint, data, _ = setting
    out, file = tmp_path / "out", tmp_path / "score.json"
    assert main(arguments(checkpoint, data, out, "--limit", "6", "--score", str(file))) == 0
    score = json.loads(file.read_text())
    assert score["asked"] == {"questions": 6, "of": 36, "limit": 6}
    with monkeypatch.context() as patch:
        patch.setattr(Answerer, "answer", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
        assert main(arguments(checkpoint, data, out)) == 130
    assert score_file("pope", data, out / "answers.jsonl").to_dict() == score
    assert main(arguments(checkpoint, data, out)) == 0
    assert score_file("pope", data, out / "answers.jsonl").asked is None
    assert main(arguments(checkpoint, data, out, "--limit", "6", "--score", str(file))) == 0  # the answers are kept
    again = json.loads(file.read_text())
    assert {name: again[name] for name in score if name != "run"} == {n: score[n] for n in score if n != "run"}


def test_a_kill_between_merging_and_cleaning_up_duplicates_nothing(setting, tmp_path, generated):
    checkpoint, data, texts = setting
    out = tmp_path / "out"
    assert main(arguments(checkpoint, data, out)) == 0
    (out / "answers.part-0.jsonl").write_bytes((out / "answers.jsonl").read_bytes())
    assert main(arguments(checkpoint, data, out)) == 0
    assert texts_of(read_lines(out / "answers.jsonl")) == texts
    assert generated["prompts"] == DISTINCT
    assert not (out / "answers.part-0.jsonl").exists()


@pytest.mark.parametrize("cut", [1, 2, 40])
def test_a_truncated_file_of_a_complete_run_is_repaired(setting, tmp_path, generated, cut):
    checkpoint, data, texts = setting
    out = tmp_path / "out"
    assert main(arguments(checkpoint, data, out)) == 0
    generated.clear()
    whole = (out / "answers.jsonl").read_bytes()
    (out / "answers.jsonl").write_bytes(whole[:-cut])  # the line feed alone, the last brace, half the line
    assert main(arguments(checkpoint, data, out)) == 0
    assert texts_of(read_lines(out / "answers.jsonl")) == texts
    assert generated["prompts"] == 0  # the pair was asked in the other categories, too


# ------------------------------------------------------------------------------------------------ several processes


def start_all(argv, tmp_path, world, **sabotage_of_1):
    return [
        forked.start(argv, tmp_path / f"log{rank}", environment, **(sabotage_of_1 if rank == 1 else {}))
        for rank, environment in enumerate(forked.ranks(world))
    ]


def test_processes_share_the_work(setting, tmp_path):
    checkpoint, data, texts = setting
    processes = start_all(arguments(checkpoint, data, tmp_path / "out"), tmp_path, 3)
    assert [forked.end(process) for process in processes] == [0, 0, 0], (tmp_path / "log0").read_text()
    assert texts_of(read_lines(tmp_path / "out" / "answers.jsonl")) == texts
    assert json.loads((tmp_path / "out" / "run.json").read_text())["processes"] == 3


@pytest.mark.parametrize("sabotage", ["kill in a line", "exit as if all were well"])
def test_a_dead_process_is_noticed_and_its_share_made_up_for(setting, tmp_path, generated, sabotage):
    checkpoint, data, texts = setting
    out = tmp_path / "out"
    processes = start_all(arguments(checkpoint, data, out), tmp_path, 2, sabotage=sabotage, after=1)
    statuses = [forked.end(process) for process in processes]
    assert statuses[0] == 1
    log = (tmp_path / "log0").read_text()
    assert "12 of 36 questions of POPE have no answer" in log
    assert "repeat the command" in log
    missing = json.loads((out / "missing.json").read_text())
    assert len(missing) == 12
    assert not (out / "answers.jsonl").exists()
    assert main(arguments(checkpoint, data, out)) == 0  # with another number of processes
    assert texts_of(read_lines(out / "answers.jsonl")) == texts
    assert generated["prompts"] == 4
    assert not (out / "missing.json").exists()
    assert sorted(path.name for path in out.iterdir()) == [".lock", "answers.jsonl", "run.json"]


def test_an_error_of_all_processes_is_reported_once(setting, tmp_path):
    checkpoint, _, _ = setting
    processes = start_all(arguments(checkpoint, tmp_path / "nothing", tmp_path / "out"), tmp_path, 2)
    assert [forked.end(process) for process in processes] == [1, 1]
    assert "does not exist" in (tmp_path / "log0").read_text()
    assert "error" not in (tmp_path / "log1").read_text()


def test_processes_that_cannot_meet(setting, tmp_path, monkeypatch, capsys):
    checkpoint, data, _ = setting
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    monkeypatch.delenv("MASTER_PORT", raising=False)
    assert main(arguments(checkpoint, data, tmp_path / "out")) == 1
    assert "start the processes with torchrun or accelerate launch" in capsys.readouterr().err


def test_one_run_at_a_time(setting, tmp_path, capsys):
    checkpoint, data, _ = setting
    out = tmp_path / "out"
    argv = arguments(checkpoint, data, out)
    holder = AnswerFolder(out)
    holder.lock(0)
    process = forked.start(argv, tmp_path / "log")
    assert forked.end(process) == 1
    assert "Another run is writing to" in (tmp_path / "log").read_text()
    holder.unlock()
    process = forked.start(argv, tmp_path / "log")
    assert forked.end(process) == 0


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no disk that is always full")
def test_a_full_disk_is_reported_and_loses_no_answer(setting, tmp_path, capsys):
    checkpoint, data, texts = setting
    out = tmp_path / "out"
    assert main(arguments(checkpoint, data, out, "--limit", "3")) == 0
    part = out / "answers.part-0.jsonl"
    part.symlink_to("/dev/full")
    assert main(arguments(checkpoint, data, out)) == 1
    error = capsys.readouterr().err.strip().split("\n")[-1]
    assert error.startswith(f"error: {part}: No space left on device; the earlier answers are kept")
    part.unlink()
    (out / f".answers.jsonl.{os.getpid()}.tmp").symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left on device") as caught:  # while the answers are merged
        AnswerFolder(out).merge([{"question_id": 0, "prompt": "p", "text": "yes"}])
    assert caught.value.filename == str(out / "answers.jsonl")
    assert main(arguments(checkpoint, data, out)) == 0
    assert texts_of(read_lines(out / "answers.jsonl")) == texts


# ------------------------------------------------------------------------------------------ answers of another run


def test_answers_of_another_checkpoint_are_not_mixed_in(setting, tmp_path, capsys):
    checkpoint, data, texts = setting
    out = tmp_path / "out"
    assert main(arguments(checkpoint, data, out, "--limit", "3")) == 0
    other = write_checkpoint(tmp_path / "tiny-vlm", seed=1)
    assert main(arguments(other, data, out)) == 1
    error = capsys.readouterr().err
    assert "were made with checkpoint_digest = 'sha256:" in error
    assert main(arguments(checkpoint, data, out, "--max_new_tokens", "9")) == 1
    assert "were made with decoding = " in capsys.readouterr().err
    assert len(read_lines(out / "answers.jsonl")) == 3
    assert main(arguments(checkpoint, data, out, "--batch_size", "7")) == 0  # changes nothing in the answers
    assert texts_of(read_lines(out / "answers.jsonl")) == texts


def test_answers_of_unknown_origin_are_not_touched(setting, tmp_path, capsys):
    checkpoint, data, _ = setting
    out = tmp_path / "out"
    write_lines(out / "answers.jsonl", [{"question_id": 0, "prompt": "p", "text": "yes"}])
    assert main(arguments(checkpoint, data, out)) == 1
    assert "no run.json that says how they were made" in capsys.readouterr().err


def test_changed_data_are_noticed(setting, tmp_path, capsys):
    checkpoint, _, _ = setting
    data, out = write_pope(tmp_path / "pope", images=1), tmp_path / "out"
    assert main(arguments(checkpoint, data, out)) == 0
    before = (out / "answers.jsonl").read_bytes()
    write_pope(tmp_path / "pope", images=1, words=("cat", "dog"))
    assert main(arguments(checkpoint, data, out)) == 1
    assert "which is not in the data" in capsys.readouterr().err
    assert before == (out / "answers.jsonl").read_bytes()


def test_a_malformed_line_is_named(setting, tmp_path, capsys):
    checkpoint, data, _ = setting
    out = tmp_path / "out"
    assert main(arguments(checkpoint, data, out, "--limit", "3")) == 0
    text = (out / "answers.jsonl").read_text().replace('"text"', '"txet"', 1)
    (out / "answers.jsonl").write_text(text)
    assert main(arguments(checkpoint, data, out)) == 1
    assert f"{out / 'answers.jsonl'}, line 1: no 'text'" in capsys.readouterr().err


def test_questions_that_an_answers_file_could_not_tell_apart():
    same = [Question(1, "p", Path("a")), Question(1, "p", Path("a"))]
    check_keys(same, "here")
    with pytest.raises(ValueError, match="have the id 1 and the same text, but different images"):
        check_keys([*same, Question(1, "p", Path("b"))], "here")
