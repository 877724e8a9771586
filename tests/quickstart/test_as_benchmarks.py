"""The held-out questions as benchmarks: right answers score 100 with the project's own scorers."""

from __future__ import annotations

import json

import pytest
from PIL import Image

from tinyllava_switchkd.eval.benchmarks import BenchmarkFactory
from tinyllava_switchkd.eval.score import score_file
from tinyllava_switchkd.quickstart import scenes
from tinyllava_switchkd.quickstart.as_benchmarks import BENCHMARKS, write_benchmarks
from tinyllava_switchkd.quickstart.scenes import QuestionSet


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    root = tmp_path_factory.mktemp("eval")
    made = scenes.make_scenes("handwriting", "test", 8, seed=0)
    questions = scenes.test_questions(made, [f"t_{index}.png" for index in range(8)], seed=0)
    write_benchmarks(QuestionSet(made, questions, [index // 6 for index in range(48)]), root)
    return root, questions


def answers(root, name, folder, text_of) -> None:
    rows = []
    for question in BenchmarkFactory(name).questions(root / name):
        rows.append(question.answer_row(text_of(question), answer_id="x", model_id="m"))
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.parametrize("name", BENCHMARKS)
def test_right_answers_score_100(written, tmp_path, name):
    root, questions = written
    truth = {str(row["question_id"]): row["answer"] for row in questions}

    def right(question) -> str:
        if name == "mmbench" and question.question_id >= 1_000_000:  # the rotated copy
            return {"A": "B", "B": "A"}[truth[str(question.question_id - 1_000_000)]]
        return truth[str(question.question_id)]

    answers(root, name, tmp_path, right)
    score = score_file(name, root / name, tmp_path / f"{name}.jsonl")
    assert score.score == pytest.approx(100) and score.missing == 0 and score.fallback == 0
    answers(root, name, tmp_path, lambda question: "Yes" if name == "pope" else "A")
    assert score_file(name, root / name, tmp_path / f"{name}.jsonl").score < 100


@pytest.mark.parametrize("name", BENCHMARKS)
def test_prompts_are_those_of_the_quickstart(written, name):
    """The benchmark's prompts are exactly those on which the models were trained."""
    root, questions = written
    known = {row["question"] for row in questions}
    asked = list(BenchmarkFactory(name).questions(root / name))
    originals = [question for question in asked if not (name == "mmbench" and question.question_id >= 1_000_000)]
    assert originals and {question.prompt for question in originals} <= known
    assert len(asked) == {"vqav2": 32, "pope": 8, "mmbench": 8, "scienceqa": 4}[name]
    for question in asked:
        if not isinstance(question.image, bytes):
            with Image.open(question.image) as image:
                assert image.size == (32, 32)
