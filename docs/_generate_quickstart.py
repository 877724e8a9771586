"""Write the quickstart's tables in README.md and docs/quickstart.md, and draw its pictures, from stored results::

python docs/_generate_quickstart.py                              # write the tables and draw the pictures
python docs/_generate_quickstart.py --add playground/quickstart  # first store the results of a quickstart
python docs/_generate_quickstart.py --check                      # exit status 1 if a text or picture is out of date

The results are stored in quickstart_runs.json: one run per combination of versions and threads.
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

DOCS = Path(__file__).resolve().parent
ROOT = DOCS.parent
RUNS = DOCS / "quickstart_runs.json"
IMAGES = DOCS / "images"
TEXTS = (ROOT / "README.md", DOCS / "quickstart.md")
VERSIONS = ("torch", "transformers", "threads")
"""The properties that distinguish runs."""


def add(folder: Path) -> None:
    """Store the results of a quickstart; replaces those of the same versions and threads."""
    from tinyllava_switchkd.io import read_json, write_json
    from tinyllava_switchkd.quickstart.experiment import run_name
    from tinyllava_switchkd.quickstart.report import METHODS, shown_rows
    from tinyllava_switchkd.quickstart.scenes import question_set

    stored = read_json(RUNS) if RUNS.is_file() else {"runs": []}
    results = read_json(folder / "results.json")
    run = {name: results["versions"][name] for name in (*VERSIONS, "python")}
    run["seeds"] = results["seeds"]
    for method in METHODS:
        run[method] = [{**row, "steps": round(results[method]["steps"])} for row in results[method]["each"]]
    others = [old for old in stored["runs"] if any(old[name] != run[name] for name in VERSIONS)]
    stored["runs"] = sorted([*others, run], key=lambda row: [_numbers(row[name]) for name in VERSIONS])
    stored["questions"], stored["regime"] = results["questions"], results["regime"]
    if run is newest_of(stored["runs"]):  # its answers are shown in predictions.png
        stages = {"teacher": ("teacher", "handwriting", "finetune")}
        stages |= {"sft": ("student", "seed1", "finetune"), "switch_kd": ("student", "seed1", "distill")}
        number = results["questions"] // len(results["teacher"]["by_type"])
        rows = shown_rows(question_set("handwriting", "test", number, seed=0))
        stored["answers"] = {}
        for method, names in stages.items():
            answers = read_json(folder / "scores" / f"{run_name(*names)}-test" / "scores.json")["answers"]
            stored["answers"][method] = {str(row): answers[row] for row in rows}
    write_json(RUNS, stored, indent=1)


def newest_of(runs: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """The run with the newest versions and the fewest threads."""
    return max(runs, key=lambda run: ([_numbers(run[name]) for name in VERSIONS[:-1]], -int(run["threads"])))


def pooled(runs: Sequence[Mapping[str, Any]], method: str) -> list[Mapping[str, Any]]:
    """A method's results in all runs."""
    return [row for run in runs for row in run[method]]


def figure(values: Sequence[float]) -> str:
    """Mean and standard deviation, with one decimal."""
    return f"{mean(values):.1f} ± {stdev(values):.1f}" if len(values) > 1 else f"{mean(values):.1f}"


def blocks(stored: Mapping[str, Any]) -> dict[str, str]:
    """NAME -> the text between ``<!-- NAME -->`` and ``<!-- /NAME -->``."""
    from tinyllava_switchkd.quickstart.report import METHODS, TYPE_TITLES

    runs = stored["runs"]
    newest = newest_of(runs)
    lines = ["| | score | probe of the vision tower | seconds on one core |", "|---|---:|---:|---:|"]
    for method, label in METHODS.items():
        rows = pooled(runs, method)
        cells = [figure([row["score"] for row in rows]), figure([row["probe"] for row in rows])]
        seconds = mean(row["seconds"] for row in newest[method])
        label = f"**{label}**" if method == "switch_kd" else label
        lines.append(f"| {label} | {' | '.join(cells)} | {seconds:.0f} |")
    ahead = {
        other: [a["score"] - b["score"] for a, b in zip(pooled(runs, "switch_kd"), pooled(runs, other), strict=True)]
        for other in ("sft", "sft_equal_time")
    }
    students = len(ahead["sft"])
    spent = [sum(mean(row["seconds"] for row in run[method]) for method in METHODS) for run in runs]
    shortest, longest = (f"{seconds:.0f}" for seconds in (min(spent), max(spent)))
    took = shortest if shortest == longest else f"{shortest} to {longest}"
    spread_of = "Mean and standard deviation of" if students > 1 else "One run:"
    summary = (
        f"{spread_of} {students} student{'s' * (students > 1)} of each kind and {len(runs)} "
        f"teacher{'s' * (len(runs) > 1)} ({_listing(runs)}). Switch-KD is ahead of SFT by {figure(ahead['sft'])} "
        f"points (in {sum(value > 0 for value in ahead['sft'])} of {students}), and of SFT with twice the steps by "
        f"{figure(ahead['sft_equal_time'])} ({sum(value > 0 for value in ahead['sft_equal_time'])} of {students}). "
        f"Together the table's four trainings took {took} seconds on one core, depending on the machine."
    )
    kinds = list(newest["teacher"][0]["by_type"])
    head = ["torch", "transformers", "threads", "model", "overall", *(TYPE_TITLES[kind] for kind in kinds), "probe"]
    table = ["| " + " | ".join(head) + " |", "|---|---|---:|---|" + "---:|" * (len(kinds) + 2)]
    for run in runs:
        for method, label in METHODS.items():
            rows = run[method]
            values = [[row["score"] for row in rows]]
            values += [[row["by_type"][kind] for row in rows] for kind in kinds]
            values.append([row["probe"] for row in rows])
            cells = [*(str(run[name]) for name in VERSIONS), label, *map(figure, values)]
            table.append("| " + " | ".join(cells) + " |")
    for method, label in METHODS.items():
        rows = pooled(runs, method)
        values = [[row["score"] for row in rows], *([row["by_type"][kind] for row in rows] for kind in kinds)]
        values.append([row["probe"] for row in rows])
        table.append("| " + " | ".join(["all", "", "", f"**{label}**", *map(figure, values)]) + " |")
    return {
        "quickstart-table": "\n".join(lines),
        "quickstart-summary": summary,
        "quickstart-runs": "\n".join(table),
        "quickstart-spread": spread(stored),
    }


def spread(stored: Mapping[str, Any]) -> str:
    """How far the means of single runs are from the overall means, in standard deviations of a single model."""
    if len(stored["runs"]) < 2:
        return "There is only one run so far."
    far = deviations(stored)
    within = sum(value <= 2 for value in far.values())
    (where, largest) = max(far.items(), key=lambda item: item[1])
    return (
        f"{within} of {len(far)} figures of single runs (score and probe of a model, mean over seeds) lie within two "
        f"standard deviations of the README's; the farthest, {where}, is {largest:.1f} away."
    )


def deviations(stored: Mapping[str, Any]) -> dict[str, float]:
    """Run, model and measure -> distance of the run's mean from the overall mean, in overall standard deviations."""
    from tinyllava_switchkd.quickstart.report import METHODS

    found = {}
    for method, label in METHODS.items():
        for name in ("score", "probe"):
            everything = [row[name] for row in pooled(stored["runs"], method)]
            width = stdev(everything) if len(everything) > 1 else 0.0
            for run in stored["runs"]:
                distance = abs(mean(row[name] for row in run[method]) - mean(everything))
                where = f"{label}'s {name} with torch {run['torch']}, transformers {run['transformers']}, "
                where += f"{run['threads']} thread{'s' * (run['threads'] != '1')}"
                found[where] = distance / width if width else 0.0
    return found


def filled(text: str, parts: Mapping[str, str]) -> str:
    """Replace the texts between the marks by `parts`."""
    for name, content in parts.items():
        block = f"<!-- {name} -->\n\n{content}\n\n<!-- /{name} -->"
        text = re.sub(f"<!-- {name} -->.*?<!-- /{name} -->", lambda _, block=block: block, text, flags=re.DOTALL)
    return text


def sources(stored: Mapping[str, Any]) -> dict[str, Any]:
    """File name of a picture -> the data that it shows."""
    from tinyllava_switchkd.quickstart.report import METHODS, summary

    results = {method: summary(pooled(stored["runs"], method)) for method in METHODS}
    return {
        "quickstart.png": {**results, "questions": stored["questions"]},
        "predictions.png": {"answers": stored["answers"], "questions": stored["questions"]},
    }


def draw(stored: Mapping[str, Any]) -> None:
    """Draw docs/images/quickstart.png and predictions.png."""
    from tinyllava_switchkd.quickstart.report import draw_answers, draw_scores
    from tinyllava_switchkd.quickstart.scenes import question_set

    results = sources(stored)["quickstart.png"]
    draw_scores(results, IMAGES / "quickstart.png")
    answers = {method: {int(row): text for row, text in rows.items()} for method, rows in stored["answers"].items()}
    number = stored["questions"] // len(results["teacher"]["by_type"])
    asked = question_set("handwriting", "test", number, seed=0)
    draw_answers(asked, answers, IMAGES / "predictions.png", seed=1)
    mark(sources(stored))


MARK = "results"
"""Key of the PNG text with the digest of the results that a picture shows."""


def digest(shown: Any) -> str:
    """Digest of the results that a picture shows; unlike its pixels, it is the same on every machine."""
    rounded = json.loads(json.dumps(shown), parse_float=lambda text: round(float(text), 6))
    return hashlib.sha256(json.dumps(rounded, sort_keys=True).encode()).hexdigest()


def mark(pictures: Mapping[str, Any]) -> None:
    """Write the digest of its results into each picture."""
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    for name, shown in pictures.items():
        note = PngInfo()
        note.add_text(MARK, digest(shown))
        with Image.open(IMAGES / name) as picture:
            picture.load()
            picture.save(IMAGES / name, pnginfo=note, dpi=picture.info.get("dpi"), optimize=True)


def stale_pictures(pictures: Mapping[str, Any]) -> list[str]:
    """The pictures that are missing or show other results."""
    from PIL import Image

    found = []
    for name, shown in pictures.items():
        if not (IMAGES / name).is_file():
            found.append(name)
            continue
        with Image.open(IMAGES / name) as picture:
            if picture.text.get(MARK) != digest(shown):
                found.append(name)
    return found


def _listing(runs: Sequence[Mapping[str, Any]]) -> str:
    def values(name: str) -> str:
        return " and ".join(sorted({str(run[name]) for run in runs}, key=_numbers))

    return f"torch {values('torch')}, transformers {values('transformers')}, threads: {values('threads')}"


def _numbers(version: str) -> list[int]:
    return [int(part) for part in re.findall(r"\d+", str(version))]


def main() -> int:
    from tinyllava_switchkd.cli import CommandParser
    from tinyllava_switchkd.io import read_json, write_text

    parser = CommandParser(description="Write the quickstart's tables and draw its pictures.")
    parser.add_argument("--add", type=Path, nargs="+", default=[], help="folders of quickstarts to store")
    parser.add_argument("--check", action="store_true", help="only compare, write nothing")
    arguments = parser.parse_args()
    for folder in arguments.add:
        add(folder)
    stored = read_json(RUNS)
    stale = False
    for path in TEXTS:
        text = path.read_text(encoding="utf-8")
        if (wanted := filled(text, blocks(stored))) != text:
            stale = True
            if not arguments.check:
                write_text(path, wanted)
    if arguments.check:
        if stale := stale or bool(stale_pictures(sources(stored))):
            print("A text or picture is out of date; run python docs/_generate_quickstart.py", file=sys.stderr)
        return int(stale)
    draw(stored)
    return 0


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    sys.exit(main())
