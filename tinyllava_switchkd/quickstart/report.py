"""From checkpoints to the table, the pictures and ``results.json``."""

from __future__ import annotations

import importlib.metadata
import json
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from PIL import Image

from ..visualize.bars import draw_bars
from ..visualize.curves import draw_knees, draw_losses, read_history
from ..visualize.paper import paper_tables
from ..visualize.predictions import Prediction, draw_predictions
from . import evaluate, scenes
from .plan import Workspace, fingerprint
from .prepare import probe_scenes, question_set
from .runner import Runner, is_made, read_stamp, write_stamp

METHODS = {"teacher": "Teacher", "sft": "SFT", "sft_equal_time": "SFT, equal time", "switch_kd": "Switch-KD"}
"""Keys of ``results.json`` and what people read, in the table's order."""

TYPE_TITLES = {
    "position": "by place",
    "colour": "by colour",
    "where": "where",
    "read": "read all",
    "yes_no": "yes/no",
    "choice": "choice",
}
"""Question types as the table heads them."""

PAPER_LLM = "Qwen2.5-0.5B"
EVALUATION_COST = 250
"""Of asking one checkpoint, in steps of plain fine-tuning."""


def regime(space: Workspace) -> str:
    """What was compared, in one sentence."""
    plan = space.plan
    return (
        f"Toy scale, real handwriting: base models that can read rendered digits, a teacher adapted on "
        f"{plan.teacher_scenes:,} handwritten scenes, and a student that gets {plan.student_scenes}, from one point "
        f"by SFT, by SFT for as long as Switch-KD takes, and by Switch-KD; with so few scenes the teacher has much to "
        f"add, so the gain says nothing about its size at full scale."
    )


class Report:
    """Asks the checkpoints of a quickstart and lays the answers side by side.

    Args:
        space: where everything lies.
        seeds: the seeds that were trained.
    """

    def __init__(self, space: Workspace, seeds: Sequence[int]) -> None:
        self.space, self.seeds = space, seeds

    @property
    def cost(self) -> float:
        """Of `make`, in steps of plain fine-tuning."""
        return EVALUATION_COST * (1 + 3 * len(self.seeds))

    def make(self, runner: Runner) -> dict[str, Any]:
        """Ask, compare, draw, write.

        Returns:
            what ``results.json`` holds, and "text": the table and what belongs to it.
        """
        runs = self._runs(runner)
        results = self._results(runs)
        scenes.write_json(results, self.space.root / "results.json")
        self._draw(results, runs)
        text = "\n".join(self._text(results))
        (self.space.root / "results.txt").write_text(text + "\n", encoding="utf-8")
        return {**results, "text": text}

    # Scores

    def checkpoints(self) -> dict[str, list[Path]]:
        """Output folders by method, one a seed (the teacher's alone)."""
        space = self.space
        switch = [space.student_switch(seed).output for seed in self.seeds]
        return {
            "teacher": [space.teacher],
            "sft": [space.student_sft(seed).output for seed in self.seeds],
            "sft_equal_time": [space.student_sft(seed, steps=1).output for seed in self.seeds],
            "switch_kd": switch,
        }

    def _runs(self, runner: Runner) -> dict[str, list[dict[str, Any]]]:
        """Scores of every checkpoint, asked now or read back."""
        test, val, train = (
            question_set(self.space, "test"),
            question_set(self.space, "val"),
            probe_scenes(self.space),
        )
        runs: dict[str, list[dict[str, Any]]] = {}
        for method, folders in self.checkpoints().items():
            for folder in folders:
                file = self.space.root / "scores" / f"{folder.name}.json"
                mark = fingerprint(read_stamp(folder)["fingerprint"], test.questions, len(train), len(val.scenes))
                if not is_made(file, mark):
                    runner.advance(0.0, ("questions", f"asking {folder.name}"))
                    answerer = evaluate.load(folder)
                    answers = evaluate.answer_questions(answerer, test)
                    score, by_type = evaluate.accuracy(test.questions, answers)
                    digits = evaluate.probe(answerer, train, val.scenes, test.scenes)
                    content = {"score": score, "by_type": by_type, "probe": digits, "answers": answers}
                    scenes.write_json(content, file)
                    write_stamp(file, mark)
                run = json.loads(file.read_text(encoding="utf-8"))
                run["seconds"], run["steps"] = self._time(method, folder, len(runs.get(method, [])))
                runs.setdefault(method, []).append(run)
                runner.advance(EVALUATION_COST)
        return runs

    def _time(self, method: str, folder: Path, index: int) -> tuple[float, int]:
        """Seconds of training, pre-training included, and steps of the last stage."""
        if method == "teacher":
            before = self.space.teacher_stages()[0].output
        else:
            before = self.space.student_pt(self.seeds[index]).output
        last = read_stamp(folder)
        return read_stamp(before)["seconds"] + last["seconds"], last["steps"]

    def _results(self, runs: Mapping[str, list[dict[str, Any]]]) -> dict[str, Any]:
        results: dict[str, Any] = {}
        for method, rows in runs.items():
            results[method] = {
                "score": mean(row["score"] for row in rows),
                "by_type": {kind: mean(row["by_type"][kind] for row in rows) for kind in scenes.QUESTION_TYPES},
                "probe": mean(row["probe"] for row in rows),
                "seconds": mean(row["seconds"] for row in rows),
                "steps": mean(row["steps"] for row in rows),
                "each": [{name: row[name] for name in ("score", "by_type", "probe", "seconds")} for row in rows],
            }
            if len(rows) > 1:
                results[method]["std"] = {
                    "score": stdev(row["score"] for row in rows),
                    "by_type": {kind: stdev(row["by_type"][kind] for row in rows) for kind in scenes.QUESTION_TYPES},
                    "probe": stdev(row["probe"] for row in rows),
                }
        results["paired_differences"] = {
            f"switch_kd - {other}": difference(runs["switch_kd"], runs[other]) for other in ("sft", "sft_equal_time")
        }
        results["seeds"] = list(self.seeds)
        results["versions"] = versions()
        results["regime"] = regime(self.space)
        results["questions"] = self.space.plan.test_scenes * len(scenes.QUESTION_TYPES)
        return results

    # Pictures

    def _draw(self, results: Mapping[str, Any], runs: Mapping[str, list[dict[str, Any]]]) -> None:
        root, seed = self.space.root, self.seeds[0]
        folders = {method: paths[0] for method, paths in self.checkpoints().items()}
        students = {METHODS[method]: read_history(folders[method]) for method in METHODS if method != "teacher"}
        draw_losses(students, root / "losses.png")
        draw_knees(read_history(folders["switch_kd"]), root / "knees.png", title=f"Switch-KD, seed {seed}")
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
            note += f"; mean and standard deviation of {len(self.seeds)} students"
        draw_bars(bars, root / "scores.png", spread, titles, note=note)
        draw_predictions(
            self._samples(runs),
            root / "predictions.png",
            title=f"The first test scenes, one question type after the other (seed {seed})",
        )

    def _samples(self, runs: Mapping[str, list[dict[str, Any]]], number: int = 12) -> list[Prediction]:
        """Question type i of scene i: not chosen by what was answered."""
        test, kinds = question_set(self.space, "test"), len(scenes.QUESTION_TYPES)
        samples = []
        for index in range(min(number, len(test.scenes))):
            row = index * kinds + index % kinds
            question = test.questions[row]
            answers = {
                label: runs[method][0]["answers"][row]
                for method, label in METHODS.items()
                if method != "sft_equal_time"
            }
            samples.append(
                Prediction(
                    Image.fromarray(test.scenes[index].pixels),
                    question["question"].replace(scenes.SHORT_ANSWER, "").replace(scenes.LETTER_ANSWER, ""),
                    question["answer"],
                    answers,
                    {label: answer == question["answer"] for label, answer in answers.items()},
                )
            )
        return samples

    # Text

    def _text(self, results: Mapping[str, Any]) -> list[str]:
        lines = score_table(results)
        lines += [
            "",
            "probe: digits read off the vision tower's tokens by a linear classifier; seconds: PT and the rest.",
        ]
        if len(self.seeds) > 1:
            lines += ["", "Paired differences of the students, seed by seed:"]
            for name, row in results["paired_differences"].items():
                left, right = (METHODS[method] for method in name.split(" - "))
                each = ", ".join(f"{value:+.1f}" for value in row["each"])
                lines.append(f"  {left} - {right}: {row['mean']:+.2f} +- {row['std']:.2f}  ({each})")
            lines.append("One base and one teacher serve all seeds, so the spread is that of data and order alone.")
        return [*lines, "", results["regime"], "", *paper_lines()]


def difference(left: Sequence[Mapping[str, Any]], right: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Differences of the scores of paired runs: each, their mean, and their standard deviation (None for one pair)."""
    each = [a["score"] - b["score"] for a, b in zip(left, right, strict=True)]
    return {"each": each, "mean": mean(each), "std": stdev(each) if len(each) > 1 else None}


def score_table(results: Mapping[str, Any]) -> list[str]:
    """The table as lines of text: a row a method; with several seeds mean and standard deviation."""
    kinds = list(results["teacher"]["by_type"])
    rows = [["", "overall", *(TYPE_TITLES.get(kind, kind) for kind in kinds), "probe", "steps", "seconds"]]
    for method, label in METHODS.items():
        row, std = results[method], results[method].get("std")
        values = [(row["score"], std and std["score"])]
        values += [(row["by_type"][kind], std and std["by_type"][kind]) for kind in kinds]
        values.append((row["probe"], std and std["probe"]))
        cells = [f"{value:.1f}" + (f" +-{spread:.1f}" if spread is not None else "") for value, spread in values]
        rows.append([label, *cells, f"{row['steps']:.0f}", f"{row['seconds']:.0f}"])
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "  ".join(
            cell.ljust(width) if not column else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
    return [lines[0], "-" * len(lines[0]), *lines[1:]]


def paper_lines() -> list[str]:
    """The paper's rows of its 0.5B student and their teacher, as text."""
    table = paper_tables()["table1"]
    rows = [row for row in table if row["llm"] == PAPER_LLM]
    teacher = [row for row in table if row["llm"] == "Qwen2.5-3B"]
    lines = ["The paper's own, at full scale (arXiv 2604.14629, Table 1; averages of 7 and of 10 benchmarks):"]
    for row in [*teacher, *rows]:
        lines.append(f"  {row['method']:<12} {row['llm']:<13} Avg7 {row['Avg7']:5.1f}  Avg10 {row['Avg10']:5.1f}")
    return lines


def versions() -> dict[str, str]:
    """Versions of what the numbers depend on."""
    packages = ("tinyllava_switchkd", "torch", "transformers", "accelerate", "tokenizers", "numpy", "scikit-learn")
    found = {"python": platform.python_version(), "machine": platform.machine()}
    for package in (*packages, "matplotlib", "pillow"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            from .. import __version__

            found[package] = __version__  # run from the sources, not installed
    return found
