"""Standard errors and tests, compared with brute force, closed forms and scipy."""

from __future__ import annotations

import itertools
import math
import random
import statistics

import pytest

from tests.eval.scorers import FOLDERS, answer_rows, data_dir, write_rows
from tinyllava_switchkd.eval.benchmarks import BENCHMARKS, BenchmarkFactory
from tinyllava_switchkd.eval.report import main as report
from tinyllava_switchkd.eval.score import main as score
from tinyllava_switchkd.eval.score import score_file
from tinyllava_switchkd.statistics import (
    cluster_sums,
    compare,
    holm,
    mcnemar_clustered,
    mcnemar_exact,
    standard_error,
    total,
)

MEAN = BenchmarkFactory("gqa").headline


def units(values, per_cluster=1):
    return [(place // per_cluster, place, {"value": float(value), "count": 1.0}) for place, value in enumerate(values)]


@pytest.mark.parametrize("name", BENCHMARKS)
def test_the_headline_of_the_units_is_the_score(name):
    result = score_file(name, data_dir(name), data_dir(name) / "answers.jsonl")
    benchmark = BenchmarkFactory(name)
    assert benchmark.headline(total(cluster_sums(benchmark.units(result.rows)))) == pytest.approx(result.score)
    assert result.to_dict()["details"]["standard_error"] == result.standard_error > 0


def test_one_question_a_picture_gives_the_usual_standard_error():
    values = [1, 0, 0, 1, 1, 0, 1, 0.3, 0.6]
    usual = 100 * statistics.stdev(values) / math.sqrt(len(values))
    assert standard_error(units(values), MEAN) == pytest.approx(usual, rel=1e-6)


def test_questions_of_one_picture_are_one_cluster():
    """Asking every question four times gives the same standard error as asking it once."""
    values = [1, 0, 0, 1, 1, 0, 1, 0]
    four = [value for value in values for _ in range(4)]
    once = standard_error(units(values), MEAN)
    assert standard_error(units(four, per_cluster=4), MEAN) == pytest.approx(once, rel=1e-6)
    assert standard_error(units(four), MEAN) < 0.6 * once
    assert standard_error(units([1]), MEAN) is None


def test_a_picture_may_be_number_zero():
    """VQAv2's rows have picture numbers; a question without one is its own cluster."""
    rows = [{"question_id": str(n), "value": 1.0, "cluster": c} for n, c in enumerate([0, 0, 7, None, ""])]
    clusters = [cluster for cluster, *_ in BenchmarkFactory("vqav2").units(rows)]
    assert clusters == [0, 0, 7, "3", "4"]


@pytest.mark.parametrize("name", ["pope", "mme"])
def test_the_linearised_error_is_that_of_resampling(name):
    result = score_file(name, data_dir(name), data_dir(name) / "answers.jsonl")
    benchmark = BenchmarkFactory(name)
    sums = cluster_sums(benchmark.units(result.rows))
    draw, clusters = random.Random(0), list(sums)
    scores = []
    for _ in range(2000):
        sample = {place: sums[draw.choice(clusters)] for place in range(len(clusters))}
        scores.append(benchmark.headline(total(sample)))
    assert result.standard_error == pytest.approx(statistics.stdev(scores), rel=0.25)


@pytest.mark.parametrize(("gained", "lost"), [(0, 0), (1, 0), (5, 1), (12, 30), (7, 7), (400, 340)])
def test_mcnemar_is_the_binomial_test_and_the_chi_square(gained, lost):
    scipy = pytest.importorskip("scipy.stats")
    changes = [1] * gained + [-1] * lost + [0] * 9
    if gained + lost:
        assert mcnemar_exact(changes) == pytest.approx(scipy.binomtest(gained, gained + lost).pvalue, rel=1e-9)
        statistic = (gained - lost) ** 2 / (gained + lost)
        assert mcnemar_clustered(changes) == pytest.approx(scipy.chi2.sf(statistic, 1), rel=1e-9)
    else:
        assert mcnemar_exact(changes) == mcnemar_clustered(changes) == 1.0


def test_clusters_count_once_in_mcnemar():
    """Changes in clusters of ten are a tenth of the evidence."""
    assert mcnemar_clustered([10, 10, 10, -10]) == pytest.approx(mcnemar_clustered([1, 1, 1, -1]))


def test_the_interval_is_that_of_all_resamples():
    """Four pictures have only 4^4 resamples, so all can be enumerated."""
    a, b = [1, 0, 0, 0, 1, 1, 0, 0], [1, 1, 0, 1, 0, 1, 1, 1]
    found = compare(units(a, 2), units(b, 2), MEAN)
    changes = [sum(b[2 * c : 2 * c + 2]) - sum(a[2 * c : 2 * c + 2]) for c in range(4)]
    every = sorted(100 * sum(changes[c] for c in chosen) / 8 for chosen in itertools.product(range(4), repeat=4))
    assert (found.first, found.second, found.difference) == (37.5, 75.0, 37.5)
    assert found.low == pytest.approx(every[int(0.025 * len(every))], abs=12.6)  # steps of 12.5
    assert found.high == pytest.approx(every[int(0.975 * len(every))], abs=12.6)
    assert (found.test, found.questions, found.clusters, found.gained, found.lost) == (
        "McNemar, by picture",
        8,
        4,
        4,
        1,
    )
    assert found.p == mcnemar_clustered(changes)


def test_comparison_is_symmetric_and_needs_the_same_questions():
    a, b = units([1, 0, 0, 1, 0]), units([1, 1, 0, 0, 1])
    forth, back = compare(a, b, MEAN), compare(list(reversed(b)), a, MEAN)
    assert (forth.difference, forth.p, forth.low) == pytest.approx((-back.difference, back.p, -back.high))
    assert forth.test == "McNemar, exact"
    with pytest.raises(ValueError, match="the questions are not the same: 1 are in only one of the two"):
        compare(a, b[1:], MEAN)


def test_holm():
    assert holm({"a": 0.01, "b": 0.04, "c": 0.03}) == pytest.approx({"a": 0.03, "c": 0.06, "b": 0.06})


def test_report_compares_two_models(tmp_path, capsys):
    for model, change in (("A", False), ("B", True)):
        for name in ("pope", "gqa"):
            rows = answer_rows(name)
            for place, row in enumerate(rows):
                if change and place % 3 == 0:
                    row["text"] = "no"
            answers = write_rows(tmp_path / f"{model}{name}.jsonl", rows)
            output = tmp_path / model / f"{name}.json"
            flags = ["--output", str(output), "--rows", str(output.with_suffix(".rows.jsonl"))]
            assert score([name, "--data_dir", str(data_dir(name)), "--answers_file", str(answers), *flags]) == 0
    capsys.readouterr()
    assert (
        report(["--compare", f"SFT={tmp_path / 'A'}", str(tmp_path / "B"), "--output_dir", str(tmp_path / "out")]) == 0
    )
    text = capsys.readouterr().out
    assert "A: SFT. B: B." in text and "bootstrap over pictures" in text and "McNemar, by picture" in text
    assert "| GQA |" in (tmp_path / "out" / "compare.md").read_text()
    assert report([str(tmp_path / "A")]) == 0
    assert "standard error" in capsys.readouterr().out
    (tmp_path / "B" / "pope.rows.jsonl").unlink()
    assert report(["--compare", str(tmp_path / "A"), str(tmp_path / "B")]) == 1
    assert "There are no verdicts" in capsys.readouterr().err
    assert len(FOLDERS) == len(BENCHMARKS)
