"""Write the tables of results.md, reproduce.md, method.md and README.md, and draw their pictures, from stored runs::

python docs/_generate_results.py                              # write the tables and draw the pictures
python docs/_generate_results.py --add playground/ablations   # first store the runs of a folder
python docs/_generate_results.py --add_real FOLDER            # first store a run of scripts/train/real_weights.sh
python docs/_generate_results.py --costs                      # first recompute the costs at full scale
python docs/_generate_results.py --check                      # exit status 1 if a text or picture is out of date

The runs are stored in ablation_runs.json, those with real weights in real_weights.json: all scores, seeds, times and
versions.
"""

from __future__ import annotations

import importlib.util
import io
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

DOCS = Path(__file__).resolve().parent
ROOT = DOCS.parent
RUNS = DOCS / "ablation_runs.json"
REAL = DOCS / "real_weights.json"
IMAGES = DOCS / "images"
TEXTS = (DOCS / "results.md", DOCS / "reproduce.md", DOCS / "method.md", ROOT / "README.md")
TABLE1 = ("switch", "sizes")
"""The tables that contain the trainings of the paper's Table 1: both pairs of teacher and student."""


def add(folder: Path) -> None:
    """Store the runs of a folder; replaces stored runs of the same way and seed."""
    from tinyllava_switchkd.io import read_json, write_json
    from tinyllava_switchkd.quickstart.report import environment

    stored, found = (read_json(path) if path.is_file() else {} for path in (RUNS, folder / "ablations.json"))
    for part in ("runs", "search", "memory", "stages", "inside", "figure"):
        stored[part] = {**stored.get(part, {}), **found.get(part, {})}
    for run in stored["runs"].values():
        run.pop("peak_mib", None)
    stored["attention"] = stored.get("attention", {})
    for seed, row in found.get("attention", {}).items():
        values = {way: [None if v is None else round(v, 4) for v in row[way]] for way in row if way != "of"}
        stored["attention"][seed] = values
    stored["versions"] = environment()
    write_json(RUNS, stored, indent=1)


def add_costs() -> None:
    """Compute and store the costs of the trainings of the paper's Table 1."""
    from tinyllava_switchkd.ablations import dry, paper
    from tinyllava_switchkd.io import read_json, write_json

    stored = read_json(RUNS)
    stored["costs"] = dry.report(paper.plan(TABLE1, {"PATH": os.environ["PATH"], "DEVICE": "cpu"}), 1, paper.RESTS_ON)
    write_json(RUNS, stored, indent=1)


def paper_scores(table: str) -> dict[str, float]:
    """Row of our table -> the paper's Avg10."""
    from tinyllava_switchkd.visualize.paper import paper_tables

    published = paper_tables()
    first, align, switch = (row["Avg10"] for row in published["table3"][:3])
    if table == "switch":
        return {"sft": first, "align": align, "switch_kd": switch}
    if table == "losses":
        names = ("fkl", "rkl", "bild_fkl", "bild_rkl", "dbild_fkl", "align")
        rows = zip(names, published["table4"], strict=True)
        return {"sft": first, **{name: row["Avg10"] for name, row in rows}}
    if table == "schemes":
        names = {"PT-SFT": "sft", "DPT-SFT": "dpt_sft", "PT-DFT": "align", "DPT-DFT": "dpt_dft"}
        return {names[name]: averages[1] for name, averages in published["table5"]["rows"].items()}
    own = {(row["method"], row["llm"]): row["Avg10"] for row in published["table1"]}
    if table == "methods":
        llm = "Qwen2.5-0.5B"
        return {"sft": first, "llava_kd": own["LLaVA-KD", llm], "switch_kd": own["Switch-KD", llm]}
    if table == "sizes":
        small, larger, teacher, both = (row[-1] for row in published["table6"]["rows"])
        ours = {"switch_kd": small, "larger_student": larger, "larger_teacher": teacher, "larger_both": both}
        return {"sft": first, "larger_sft": own["TinyLLaVA", "Qwen2.5-1.5B"], **ours}
    return {}


def table_block(stored: Mapping[str, Any], name: str) -> str:
    """One table with our figures, the paper's, and the verdicts."""
    from tinyllava_switchkd.ablations import summary
    from tinyllava_switchkd.ablations.tables import TABLES

    table, published = TABLES[name], paper_scores(name)
    seeds = summary.seeds_of(stored, table)
    if not seeds:
        lines = ["Not run yet: no seed of this table is stored."]
        if published:
            lines += ["", "| | paper, Avg10 |", "|---|---:|"]
            lines += [f"| {table.label(key)} | {published[key]:.1f} |" for key in table.ways if key in published]
        return "\n".join([*lines, "", _command(table.script)])
    rows = summary.lines(stored, table)
    if published:
        rows[0] += ["paper, Avg10", "minus SFT"]
        for key, row in zip(table.ways, rows[1:], strict=True):
            value, reference = published.get(key), published[table.reference(key)]
            row += ["–" if value is None else f"{value:.1f}"]
            row += ["" if value is None or key == table.reference(key) else f"{value - reference:+.1f}"]
    said = [f"- {line}" for line in summary.sentences(stored, table)]
    count = f"{len(seeds)} seed{'s' * (len(seeds) > 1)}" + ("" if len(seeds) >= 5 else " instead of the default five")
    return "\n".join([f"{count}.", "", summary.markdown_of(rows), "", *said, "", _command(table.script)])


def _command(script: str) -> str:
    return f"`bash scripts/train/{script}`"


def search_block(stored: Mapping[str, Any]) -> str:
    """The results of the search on validation scenes."""
    from tinyllava_switchkd.ablations.summary import markdown_of
    from tinyllava_switchkd.ablations.tables import GRID, TABLES, WAYS, grid

    points = [(rate, weight) for rate in GRID["rate"] for weight in GRID["weight"]]
    rows = [["", *(f"rate x{rate:g}, weights x{weight:g}" for rate, weight in points)]]
    for key in TABLES["methods"].ways:
        found = stored["search"].get(key, {})
        cells = dict.fromkeys(points, "–")
        for point, candidate in grid(WAYS[key]).items():
            if candidate.key in found.get("scores", {}):
                mark = "**" if candidate.key == found.get("chosen") else ""
                cells[point] = f"{mark}{found['scores'][candidate.key]:.1f}{mark}"
        rows.append([WAYS[key].label, *cells.values()])
    return markdown_of(rows)


def attention_block(stored: Mapping[str, Any]) -> str:
    """Correlations of the students' attention maps with the teacher's."""
    from tinyllava_switchkd.statistics import mean_interval

    if not stored["attention"]:
        return "Not measured yet."
    lines, verdicts = ["| seed | SFT | Switch-KD | Switch-KD minus SFT | scenes |", "|---:|---:|---:|---:|---:|"], []
    for seed, row in sorted(stored["attention"].items()):
        pairs = [(a, b) for a, b in zip(row["sft"], row["switch_kd"], strict=True) if None not in (a, b)]
        columns = [[a for a, _ in pairs], [b for _, b in pairs], [b - a for a, b in pairs]]
        intervals = [mean_interval(column) for column in columns]
        cells = ["{:+.2f} [{:+.2f}, {:+.2f}]".format(*interval) for interval in intervals]
        verdicts.append("nearer" if intervals[2][1] > 0 else "farther" if intervals[2][2] < 0 else "undecided")
        lines.append(f"| {seed} | {' | '.join(cells)} | {len(pairs)} |")
    said = ", ".join(f"{name} in {verdicts.count(name)}" for name in ("nearer", "undecided", "farther"))
    count = f"{len(verdicts)} pair{'s' * (len(verdicts) > 1)} of students"
    return "\n".join([*lines, "", f"Switch-KD's maps compared with SFT's, for {count}: {said}."])


SUMMARISED = ("methods", "switch", "bridge")
"""The tables whose verdicts about our row are in the README."""


def summary_block(stored: Mapping[str, Any]) -> str:
    """The verdicts about our row, one line per table."""
    from tinyllava_switchkd.ablations import summary
    from tinyllava_switchkd.ablations.tables import TABLES

    lines = []
    for table in (TABLES[name] for name in SUMMARISED):
        said = [one for one in summary.sentences(stored, table) if one.startswith(f"{table.label(table.ours)} ")]
        lines.append(f"- {table.title}: {' '.join(one[0].upper() + one[1:] for one in said)}")
    return "\n".join(lines)


def blocks(stored: Mapping[str, Any]) -> dict[str, str]:
    """NAME -> the text between ``<!-- NAME -->`` and ``<!-- /NAME -->``."""
    from tinyllava_switchkd.ablations.tables import TABLES

    of = stored["versions"]
    versions = ", ".join(f"{name} {of[name]}" for name in ("torch", "transformers", "numpy", "scikit-learn"))
    found = {f"results-{name}": table_block(stored, name) for name in TABLES}
    return {
        **found,
        **real_blocks(),
        "results-versions": f"Python {of['python']}, {versions}; {of['machine']}, one thread, no GPU.",
        "results-search": search_block(stored),
        "results-summary": summary_block(stored),
        "results-attention": attention_block(stored),
        "results-costs": f"```\n{stored['costs']}\n```",
    }


def sources(stored: Mapping[str, Any]) -> dict[str, Any]:
    """File name of a picture -> the data that it shows."""
    from tinyllava_switchkd.ablations import summary
    from tinyllava_switchkd.ablations.tables import TABLES
    from tinyllava_switchkd.quickstart.report import TYPE_TITLES

    table, found = TABLES["methods"], {}
    if seeds := summary.seeds_of(stored, table):
        models = {}
        for key in table.ways:
            rows = summary.values(stored, table, key, "by_type")
            models[table.label(key)] = {
                title: round(fmean(row[kind] for row in rows), 3) for kind, title in TYPE_TITLES.items()
            }
        found["methods.png"] = {"models": models, "seeds": seeds}
    if stored.get("inside"):
        found["inside.png"] = stored["inside"]["switch_kd"]
    if stored.get("figure"):
        found["attention.png"] = stored["figure"]["scenes"]
    return found


def draw(stored: Mapping[str, Any]) -> None:
    """Draw pictures in docs/images: methods.png, the tuned methods by kind of question, in the form of Figure 1;
    inside.png, knees, overlap and gradient shares during a run of Switch-KD; attention.png, in the form of Figure 3."""
    from tinyllava_switchkd.visualize.curves import draw_inside
    from tinyllava_switchkd.visualize.radar import draw_radar

    pictures = sources(stored)
    if shown := pictures.get("methods.png"):
        axes = {title: [title] for title in next(iter(shown["models"].values()))}
        count = len(shown["seeds"])
        note = f"Quickstart scale, per cent of test questions; mean of {count} seed{'s' * (count > 1)}"
        draw_radar(shown["models"], IMAGES / "methods", axes=axes, formats=("png",), note=note)
    if shown := pictures.get("inside.png"):
        draw_inside(shown["history"], IMAGES / "inside.png", shown["vocabulary"])
    if shown := pictures.get("attention.png"):
        draw_attention(shown["by_question"], IMAGES / "attention.png")
    _quickstart().mark(pictures)


def draw_attention(shown: Mapping[str, Any], path: Path) -> None:
    """Draw one row per scene, with the attention maps of teacher and students side by side."""
    import numpy as np
    from PIL import Image

    from tinyllava_switchkd.quickstart.scenes import question_set
    from tinyllava_switchkd.visualize.attention import Look, draw
    from tinyllava_switchkd.visualize.attention_map import AttentionMap

    asked, strips = question_set("handwriting", "test", 400, seed=0), []
    for number, scene in shown.items():
        picture = Image.fromarray(asked.scenes[asked.scene_of[int(number)]].pixels)
        looks = []
        for label, found in scene["maps"].items():
            cells = None if found["cells"] is None else np.array(found["cells"])[None, None]
            attention = None if cells is None else AttentionMap((found["answer"],), cells)
            looks.append(Look(label, found["answer"], attention, (0, 0, *picture.size)))
        file = io.BytesIO()
        draw(picture, scene["question"].splitlines()[0], looks).savefig(file, dpi=90, bbox_inches="tight")
        strips.append(Image.open(file).convert("RGB"))
    size = max(strip.width for strip in strips), sum(strip.height for strip in strips)
    whole, top = Image.new("RGB", size, "white"), 0
    for strip in strips:
        whole.paste(strip, (0, top))
        top += strip.height
    whole.save(path)


def add_real(folder: Path) -> None:
    """Store a run of `scripts/train/real_weights.sh`."""
    from tinyllava_switchkd.io import read_json, write_json

    stored = _rounded(read_json(folder / "real_weights.json"))
    for row in (*stored["runs"].values(), *stored["states"].values()):
        row.pop("of", None)
    write_json(REAL, stored, indent=1)


def _rounded(value: Any) -> Any:
    """Round all floats in a JSON value to five significant digits."""
    if isinstance(value, dict):
        return {key: _rounded(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_rounded(one) for one in value]
    return float(f"{value:.5g}") if isinstance(value, float) else value


def real_blocks() -> dict[str, str]:
    """The tables of real pretrained weights."""
    from tinyllava_switchkd.ablations import real
    from tinyllava_switchkd.ablations.summary import markdown_of
    from tinyllava_switchkd.io import read_json

    stored = read_json(REAL)
    of, plan = stored["versions"], stored["plan"]
    setting = (
        f"{stored['pictures'][0]} training pictures, {stored['pictures'][1]} held out, {plan['image_size']} pixels per "
        f"side. Teacher: {plan['teacher_pt_steps']} steps of PT and {plan['teacher_steps']} of SFT; students: "
        f"{plan['student_layers']} of 30 layers, {plan['student_pt_steps']} steps of PT and {plan['student_steps']} of "
        f"SFT or Switch-KD; {plan['batch_size']} samples per step. Python {of['python']}, torch {of['torch']}, "
        f"transformers {of['transformers']}; {of['machine']}, {of['threads']} thread, no GPU."
    )
    tables = (real.lines(stored), real.differences(stored))
    scores = "\n\n".join(markdown_of(table) for table in tables if len(table) > 1)
    return {
        "results-real-setting": setting,
        "results-real-scores": scores,
        "results-real-history": markdown_of(real.history_lines(stored)),
        "results-real-terms": markdown_of(real.state_lines(stored)),
        "method-real-temperatures": markdown_of(real.temperature_lines(stored)),
    }


def _quickstart() -> Any:
    """The module docs/_generate_quickstart.py, for its marks and pictures."""
    spec = importlib.util.spec_from_file_location("generate_quickstart", DOCS / "_generate_quickstart.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def main() -> int:
    from tinyllava_switchkd.cli import CommandParser
    from tinyllava_switchkd.io import read_json, write_text

    parser = CommandParser(description="Write the tables of results.md and reproduce.md from stored runs.")
    parser.add_argument("--add", type=Path, nargs="+", default=[], help="folders of ablations to store")
    parser.add_argument("--add_real", type=Path, help="folder of real_weights.sh to store")
    parser.add_argument("--costs", action="store_true", help="recompute the costs at full scale")
    parser.add_argument("--check", action="store_true", help="only compare, write nothing")
    arguments = parser.parse_args()
    for folder in arguments.add:
        add(folder)
    if arguments.add_real is not None:
        add_real(arguments.add_real)
    if arguments.costs:
        add_costs()
    stored, filled, stale = read_json(RUNS), _quickstart().filled, False
    for path in TEXTS:
        text = path.read_text(encoding="utf-8")
        if (wanted := filled(text, blocks(stored))) != text:
            stale = True
            if not arguments.check:
                write_text(path, wanted)
    if arguments.check:
        if stale := stale or bool(_quickstart().stale_pictures(sources(stored))):
            print("A text or picture is out of date; run python docs/_generate_results.py", file=sys.stderr)
        return int(stale)
    draw(stored)
    return 0


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    sys.exit(main())
