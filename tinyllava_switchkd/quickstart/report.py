"""The quickstart's table, pictures and ``results.json``."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev

import torch
from PIL import Image

from tinyllava_switchkd import cli
from tinyllava_switchkd.io import JsonObject
from tinyllava_switchkd.quickstart import scenes
from tinyllava_switchkd.quickstart.experiment import Experiment
from tinyllava_switchkd.runtime import versions
from tinyllava_switchkd.visualize.bars import draw_bars
from tinyllava_switchkd.visualize.curves import draw_inside, draw_losses, read_history
from tinyllava_switchkd.visualize.paper import paper_tables
from tinyllava_switchkd.visualize.predictions import Prediction, draw_predictions

METHODS = {"teacher": "Teacher", "sft": "SFT", "sft_equal_time": "SFT, twice the steps", "switch_kd": "Switch-KD"}
"""Key in ``results.json`` -> label, in the table's order."""

STUDENTS = tuple(METHODS)[1:]

TYPE_TITLES = {
    "position": "by place",
    "colour": "by colour",
    "where": "where",
    "read": "read all",
    "yes_no": "yes/no",
    "choice": "choice",
}
"""Question type -> heading in the table."""

PAPER_LLM = "Qwen2.5-0.5B"


def ways(experiment: Experiment) -> dict[str, tuple[str, dict[str, object]]]:
    """Way of training a student -> (end of the folder's name, flags in addition to those of SFT).

    A step of Switch-KD takes about twice as long as one of SFT. The SFT that is given the same time therefore has twice
    the steps on every machine, so that results do not depend on how busy a machine was.
    """
    return {
        "sft": ("finetune", {}),
        "sft_equal_time": ("equal-time-finetune", {"max_steps": 2 * experiment.plan.student_steps}),
        "switch_kd": ("distill", experiment.switch_kd()),
    }


def regime(experiment: Experiment) -> str:
    """One sentence that describes the comparison."""
    plan = experiment.plan
    return (
        f"Toy scale with real handwriting: the base models can read rendered digits, the teacher is adapted on "
        f"{plan.teacher_scenes:,} handwritten scenes, and the students get {plan.student_scenes} and are trained from "
        f"the same start by SFT, by SFT with twice the steps, and by Switch-KD; with so few scenes the teacher has "
        f"much to add, so the gain says nothing about the gain at full scale."
    )


Runs = Mapping[str, Sequence[JsonObject]]
"""Method -> results of `Experiment.scores`, one per seed."""


def results_of(experiment: Experiment, runs: Runs, seeds: Sequence[int]) -> JsonObject:
    """The content of ``results.json``."""
    results: JsonObject = {method: summary(rows) for method, rows in runs.items()}
    results["paired_differences"] = {
        f"switch_kd - {other}": difference(runs["switch_kd"], runs[other]) for other in ("sft", "sft_equal_time")
    }
    questions = experiment.plan.test_scenes * len(scenes.QUESTION_TYPES)
    facts = {"versions": environment(), "regime": regime(experiment), "questions": questions}
    return {**results, "seeds": list(seeds), **facts}


def summary(rows: Sequence[JsonObject]) -> JsonObject:
    """Means over the runs of one method, standard deviations if there are several runs, and each run."""
    kinds = list(rows[0]["by_type"])
    result: JsonObject = {
        "score": mean(row["score"] for row in rows),
        "by_type": {kind: mean(row["by_type"][kind] for row in rows) for kind in kinds},
        "probe": mean(row["probe"] for row in rows),
        "seconds": mean(row["seconds"] for row in rows),
        "steps": mean(row["steps"] for row in rows),
        "each": [{name: row[name] for name in ("score", "by_type", "probe", "seconds")} for row in rows],
    }
    if len(rows) > 1:
        result["std"] = {
            "score": stdev(row["score"] for row in rows),
            "by_type": {kind: stdev(row["by_type"][kind] for row in rows) for kind in kinds},
            "probe": stdev(row["probe"] for row in rows),
        }
    return result


# Pictures


def draw(
    experiment: Experiment, results: JsonObject, runs: Runs, checkpoints: Mapping[str, Sequence[Path]], folder: Path
) -> None:
    """Draw ``losses.png``, ``knees.png``, ``scores.png`` and ``predictions.png`` of the first seed's models."""
    seed = results["seeds"][0]
    draw_losses({METHODS[way]: read_history(checkpoints[way][0]) for way in STUDENTS}, folder / "losses.png")
    draw_inside(read_history(checkpoints["switch_kd"][0]), folder / "knees.png", title=f"Switch-KD, seed {seed}")
    draw_scores(results, folder / "scores.png")
    answers = {way: runs[way][0]["answers"] for way in METHODS if way != "sft_equal_time"}
    draw_answers(experiment.questions("test"), answers, folder / "predictions.png", seed)


def draw_scores(results: JsonObject, path: Path) -> None:
    """Draw the table as a bar chart."""
    bars = {
        label: {"score": results[method]["score"], **results[method]["by_type"], "probe": results[method]["probe"]}
        for method, label in METHODS.items()
    }
    spread = {
        label: {"score": std["score"], **std["by_type"], "probe": std["probe"]}
        for method, label in METHODS.items()
        if (std := results[method].get("std")) is not None
    }
    titles = {"score": "overall", **TYPE_TITLES, "probe": "probe of\nthe tower"}
    note = f"{results['questions']:,} questions about test scenes, answered by generate()"
    if spread:
        note += f"; mean and standard deviation of {len(results['switch_kd']['each'])} students"
    draw_bars(bars, path, spread, titles, note=note)


def shown_rows(asked: scenes.QuestionSet) -> list[int]:
    """The twelve questions to show: type i about scene i, so that the choice does not depend on the answers."""
    kinds = len(scenes.QUESTION_TYPES)
    return [index * kinds + index % kinds for index in range(min(12, len(asked.scenes)))]


def draw_answers(
    asked: scenes.QuestionSet, answers: Mapping[str, Sequence[str] | Mapping[int, str]], path: Path, seed: int
) -> None:
    """Draw a sheet of test scenes with the answers of every method's model.

    Args:
        asked: the scenes and questions.
        answers: method -> question number -> answer.
        path: file to write.
        seed: seed of the students, for the title.
    """
    samples = []
    for row in shown_rows(asked):
        question = asked.questions[row]
        said = {METHODS[method]: texts[row] for method, texts in answers.items()}
        samples.append(
            Prediction(
                Image.fromarray(asked.scenes[asked.scene_of[row]].pixels),
                question["question"].replace(scenes.SHORT_ANSWER, "").replace(scenes.LETTER_ANSWER, ""),
                question["answer"],
                said,
                {label: answer == question["answer"] for label, answer in said.items()},
            )
        )
    draw_predictions(samples, path, title=f"The first test scenes, one question type after the other (seed {seed})")


# Text


def text_of(results: JsonObject) -> str:
    """The text to print: the table, its notes, and the paper's results."""
    lines = score_table(results)
    lines += [
        "",
        "probe: digits that a linear classifier reads from the vision tower's tokens; steps, seconds: of the last "
        "training stage, on one core.",
    ]
    if len(results["seeds"]) > 1:
        lines += ["", "Paired differences of the students, seed by seed:"]
        for name, row in results["paired_differences"].items():
            left, right = (METHODS[method] for method in name.split(" - "))
            each = ", ".join(f"{value:+.1f}" for value in row["each"])
            lines.append(f"  {left} - {right}: {row['mean']:+.2f} +- {row['std']:.2f}  ({each})")
        lines.append("All seeds share the bases and the teacher, so the spread is only that of data and order.")
    return "\n".join([*lines, "", results["regime"], "", *paper_lines()])


def difference(left: Sequence[JsonObject], right: Sequence[JsonObject]) -> JsonObject:
    """Differences between the scores of paired runs: each, mean, and standard deviation (None for one pair)."""
    each = [a["score"] - b["score"] for a, b in zip(left, right, strict=True)]
    return {"each": each, "mean": mean(each), "std": stdev(each) if len(each) > 1 else None}


def score_table(results: JsonObject) -> list[str]:
    """The table as lines of text: one row per method, with mean and standard deviation if there are several seeds."""
    kinds = list(results["teacher"]["by_type"])
    rows = [["", "overall", *(TYPE_TITLES.get(kind, kind) for kind in kinds), "probe", "steps", "seconds"]]
    for method, label in METHODS.items():
        row, std = results[method], results[method].get("std")
        values = [(row["score"], std and std["score"])]
        values += [(row["by_type"][kind], std and std["by_type"][kind]) for kind in kinds]
        values.append((row["probe"], std and std["probe"]))
        cells = [f"{value:.1f}" + (f" +-{spread:.1f}" if spread is not None else "") for value, spread in values]
        rows.append([label, *cells, f"{row['steps']:.0f}", f"{row['seconds']:.0f}"])
    return cli.table(rows)


def paper_lines() -> list[str]:
    """The paper's results for its 0.5B students and their teacher, as lines of text."""
    table = paper_tables()["table1"]
    rows = [row for row in table if row["llm"] == PAPER_LLM]
    teacher = [row for row in table if row["llm"] == "Qwen2.5-3B"]
    lines = ["The paper's results at full scale (arXiv 2604.14629, Table 1; averages of 7 and of 10 benchmarks):"]
    for row in [*teacher, *rows]:
        lines.append(f"  {row['method']:<12} {row['llm']:<13} Avg7 {row['Avg7']:5.1f}  Avg10 {row['Avg10']:5.1f}")
    return lines


def environment() -> dict[str, str]:
    """What the numbers depend on: versions, type of machine, threads."""
    packages = ("torch", "transformers", "accelerate", "tokenizers", "numpy", "scikit-learn", "matplotlib", "pillow")
    return versions(packages) | {"machine": platform.machine(), "threads": str(torch.get_num_threads())}
