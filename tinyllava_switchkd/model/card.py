"""Model cards: a README.md in the hub's format, made from the files of a checkpoint's folder.

Every folder that this package trains or exports gets a card. A card that somebody else wrote is never overwritten.
``python -m tinyllava_switchkd.model.card FOLDER --license NAME --results SCORES`` adds what the files do not say.
"""

from __future__ import annotations

import json
import os
import re
import string
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from huggingface_hub import ModelCardData

from tinyllava_switchkd.cli import CommandParser
from tinyllava_switchkd.io import JsonObject, read_json, read_text, write_text

CARD = "README.md"
MARK = "<!-- Written by tinyllava_switchkd from the files of this folder; remove this line to keep your own text. -->"
FACTS = "card.json"
"""File with the facts that no other file holds: name, teacher, data, results, licence."""
FACT_KINDS: dict[str, tuple[type | tuple[type, ...], str]] = {
    **dict.fromkeys(("name", "teacher", "license", "source"), (str, "text")),
    **dict.fromkeys(("results", "settings"), (dict, "an object of fields")),
    "data": ((str, list), "a name or a list of names"),
}
"""Fact -> its type, also in words."""

SETTINGS = {
    "distill_method": "method",
    "distill_loss": "loss",
    "temperature": "temperature",
    "align_weight": "weight of the alignment",
    "switch_weight": "weight of the visual switch",
    "training_recipe": "recipe",
    "tune_type_llm": "language model",
    "tune_type_vision_tower": "vision tower",
    "tune_type_connector": "connector",
    "learning_rate": "learning rate",
    "vision_tower_lr": "learning rate of the vision tower",
    "lr_scheduler_type": "schedule",
    "warmup_steps": "warm-up",
    "per_device_train_batch_size": "batch size per device",
    "gradient_accumulation_steps": "gradient accumulation",
    "world_size": "devices",
    "global_step": "optimiser steps",
    "num_train_epochs": "epochs",
    "max_steps": "maximum steps",
    "optim": "optimiser",
    "weight_decay": "weight decay",
    "max_grad_norm": "gradient clipping",
    "seed": "seed",
}
"""Training arguments that a card shows, in this order -> what it calls them."""

KINDS = {
    "tinyllava": ("TinyLLaVA's layout", "tinyllava_switchkd"),
    "hf-llava": ("transformers' LLaVA", "transformers"),
    "onnx": ("ONNX, transformers.js's layout", "transformers.js"),
    "gguf": ("GGUF", "gguf"),
}
"""Kind of folder -> its name for readers, and the hub's library name. ``cards/KIND.md`` says how to run it."""


def write_model_card(folder: str | os.PathLike, facts: JsonObject | None = None) -> Path:
    """Write or update the card of a folder.

    Args:
        folder: a checkpoint or an export.
        facts: what no file of the folder says; stored in `FACTS`. Keys: ``name`` (of the repository), ``license`` (the
            hub's short name), ``teacher``, ``data`` (names), ``results`` (benchmark -> score), ``settings`` (argument
            -> value), ``source`` (the checkpoint that an export was made from).

    Returns:
        the card's file; unchanged if somebody else wrote it.
    """
    folder = Path(folder)
    file = folder / CARD
    if facts:
        known = read_json(folder / FACTS) if (folder / FACTS).is_file() else {}
        write_text(folder / FACTS, json.dumps({**known, **facts}, indent=2, default=str) + "\n")
    if file.is_file() and MARK.encode() not in file.read_bytes():
        return file
    write_text(file, model_card(folder))
    return file


def facts_of(folder: str | os.PathLike) -> JsonObject:
    """How a folder's model was made, as `facts` for the card of a copy or an export.

    Raises:
        ValueError: a fact has the wrong type.
    """
    folder = Path(folder)
    facts = {name: value for name, value in _read(folder, FACTS).items() if value is not None}
    for name, (kind, words) in FACT_KINDS.items():
        if name in facts and not isinstance(facts[name], kind):
            raise ValueError(f"{folder / FACTS}: {name} is {facts[name]!r}, not {words}; correct it.")
    known: JsonObject = {}
    for name in ("training_args.json", "trainer_state.json", "fingerprint.json"):
        known |= _read(folder, name)
    kept = {key: value for key, value in known.items() if key in {*SETTINGS, "data_path", "teacher_path"}}
    return {**facts, "settings": {**kept, **facts.get("settings", {})}}


def model_card(folder: str | os.PathLike) -> str:
    """The text of a folder's card."""
    folder = Path(folder)
    config, facts = _read(folder, "config.json"), facts_of(folder)
    settings = facts["settings"]
    # Exports keep TinyLLaVA's own fields under a key or in a file.
    record = config.get("tinyllava") or config or _read(folder, "tinyllava.json")
    if not isinstance(record, dict):
        raise ValueError(f"{folder / 'config.json'}: tinyllava is {record!r}, not an object of fields.")
    name = facts.get("name") or folder.resolve().name
    kind = kind_of(folder, config)
    bases = {
        "language model": record.get("llm_model_name_or_path"),
        "vision tower": record.get("vision_model_name_or_path"),
        "second vision tower": record.get("vision_model_name_or_path2"),
        "connector": record.get("connector_type"),
        "conversation template": record.get("template", record.get("conv_version")),
        "teacher": facts.get("teacher"),
    }
    distilled = bool(settings.get("teacher_path") or facts.get("teacher"))
    sections = [
        _front_matter(kind, facts, bases, distilled, str(settings.get("distill_method") or "switch_kd")),
        MARK,
        f"# {name}",
        f"A small vision-language model ({KINDS[kind][0]}), "
        + ("distilled from a larger one" if distilled else "trained")
        + " with [tinyllava_switchkd](https://arxiv.org/abs/2604.14629).",
        "## Components",
        _table(("part", ""), [(part, _code(value)) for part, value in bases.items() if value]),
    ]
    if facts.get("source"):
        sections.append(f"Exported from {_code(facts['source'])}.")
    trained = _training(settings, facts)
    if trained:
        sections += ["## Training", trained]
    results = _results(folder, facts)
    if results:
        sections += ["## Results", results]
    files = sorted(file.name for file in folder.glob("*.gguf"))
    sections += [
        "## Run it",
        string.Template(read_text(Path(__file__).parent / "cards" / f"{kind}.md"))
        .substitute(
            name=name,
            dtype=(record.get("dtypes") or ["fp32"])[0],
            model=next((file for file in files if "mmproj" not in file), "model.gguf"),
            mmproj=next((file for file in files if "mmproj" in file), "mmproj.gguf"),
        )
        .rstrip(),
        *_cautions(record),
        "## Licence",
        _licence(facts, bases),
    ]
    return "\n\n".join(sections) + "\n"


def _cautions(record: JsonObject) -> list[str]:
    """What users of an export must know: where it is approximate, and how to prepare images."""
    found = [f"Approximate: {part}" for part in record.get("approximate") or ()]
    if measured := record.get("every_patch"):
        found.append(
            f"With every patch, {measured['equal']} of {measured['questions']} answers equal the checkpoint's; the "
            f"first token's logits differ by up to {measured['logits']:.2g}."
        )
    if record.get("images"):
        found.append(f"Images: {record['images']}")
    return found


def kind_of(folder: Path, config: JsonObject) -> str:
    """Which of `KINDS` a folder is."""
    if any(folder.glob("*.gguf")):
        return "gguf"
    if (folder / "onnx").is_dir():
        return "onnx"
    return "hf-llava" if config.get("model_type") == "llava" else "tinyllava"


def _read(folder: Path, name: str) -> JsonObject:
    return read_json(folder / name) if (folder / name).is_file() else {}


def _front_matter(kind: str, facts: JsonObject, bases: JsonObject, distilled: bool, method: str) -> str:
    """The hub's metadata. Only names in the form of a hub repository are listed as base models."""
    names = [value for part, value in bases.items() if part in ("language model", "vision tower", "teacher") and value]
    hub = [name for name in dict.fromkeys(map(str, names)) if re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name)]
    tags = [
        "tinyllava",
        *(["distillation", method.replace("_", "-")] if distilled else []),
        *([] if kind == "tinyllava" else [kind]),
    ]
    data = ModelCardData(
        library_name=KINDS[kind][1],
        pipeline_tag="image-text-to-text",
        license=facts.get("license") or "other",
        base_model=hub or None,
        tags=tags,
    )
    return f"---\n{data.to_yaml()}\n---"


def _training(settings: JsonObject, facts: JsonObject) -> str:
    rows = []
    data = facts.get("data")
    if data:
        rows.append(("data", ", ".join(map(str, data)) if isinstance(data, (list, tuple)) else str(data)))
    elif settings.get("data_path"):
        path = str(settings["data_path"])
        is_digest = re.fullmatch(r"[0-9a-f]{64}", path) is not None
        rows.append(("data", f"SHA-256 {_code(path)}" if is_digest else _code(Path(path).name)))
    distilled = bool(settings.get("teacher_path") or facts.get("teacher"))
    for key, words in SETTINGS.items():
        of_teacher = key.startswith(("distill_", "align_", "switch_")) or key == "temperature"
        value = settings.get(key)
        if value in (None, "") or (of_teacher and not distilled) or (key == "max_steps" and value == -1):
            continue
        rows.append((words, _code(value)))
    return _table(("setting", ""), rows) if rows else ""


def _results(folder: Path, facts: JsonObject) -> str:
    parts = []
    if facts.get("results"):
        parts.append(_table(("benchmark", "score"), [(str(k), f"{v}") for k, v in facts["results"].items()]))
    measured = _read(folder, "measured.json")
    if measured:
        try:
            rows = [
                (
                    dtype,
                    f"{found['bytes'] / 1e6:.1f} MB",
                    f"{found['equal']} of {found['questions']}",
                    f"{found['logits']:.2g}",
                )
                for dtype, found in measured.items()
            ]
        except (TypeError, KeyError, ValueError):
            raise ValueError(f"{folder / 'measured.json'} was not written by an export; delete it.") from None
        head = ("precision", "size", "answers equal to the checkpoint's", "largest difference of a logit")
        parts.append(_table(head, rows))
    return "\n\n".join(parts)


def _licence(facts: JsonObject, bases: JsonObject) -> str:
    if facts.get("license"):
        return f"The weights: {facts['license']}. The software: Apache-2.0."
    names = " and ".join(str(bases[part]) for part in ("language model", "vision tower") if bases.get(part))
    return (
        f"The weights derive from {names or 'the base models'}, whose licences apply to them. The software: Apache-2.0."
    )


def _code(value: object) -> str:
    return f"`{value}`"


def _table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    lines = [head, tuple("---" for _ in head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def read_scores(paths: Iterable[Path]) -> dict[str, str]:
    """Benchmark -> score with what is partial about it, from score files of one model, and folders of them.

    Raises:
        ValueError: a path has no scores, or the files are not all of one model.
    """
    scores: dict[str, str] = {}
    models: dict[str, Path] = {}
    for path in paths:
        count = len(scores)
        for file in sorted(path.rglob("*.json")) if path.is_dir() else [path]:
            found = json.loads(file.read_bytes()) if path.is_dir() else read_json(file, what="score file")
            if isinstance(found, dict) and isinstance(found.get("score"), (int, float)) and "benchmark" in found:
                split = f" ({found['split']})" if found.get("split") else ""
                name = f"{found['benchmark']}{split}"
                if name in scores:
                    raise ValueError(f"{file} is a second score on {name}; give the score files of one evaluation.")
                scores[name] = f"{found['score']:.1f}{_partial(found)}"
                if isinstance(run := found.get("run"), dict) and run.get("model_name"):
                    models.setdefault(str(run["model_name"]), file)
                if len(models) > 1:
                    raise ValueError(
                        f"{' and '.join(map(str, models.values()))} are scores of different models "
                        f"({', '.join(models)}); give those of one."
                    )
        if len(scores) == count:
            raise ValueError(f"{path} holds no scores; give a score file that tinyllava_switchkd.eval has written.")
    return scores


def _partial(score: JsonObject) -> str:
    """What a reader must know about a score: how much was asked, how much is missing, and who read the answers."""
    notes = []
    if isinstance(asked := score.get("asked"), dict):
        first = "first " if "limit" in asked else ""
        notes.append(f"{first}{asked.get('questions')} of {asked.get('of')} questions")
    if score.get("missing"):
        notes.append(f"{score['missing']} missing")
    if score.get("judge"):
        notes.append("some answers read by a judge")
    return f" ({', '.join(notes)})" if notes else ""


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    parser = CommandParser(
        prog="python -m tinyllava_switchkd.model.card",
        description="Add facts to a folder's model card. Exports of the folder and uploads to the hub keep them.",
    )
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="a trained or exported model")
    parser.add_argument("--name", help="name of the repository on the hub")
    parser.add_argument("--license", help="license of the weights, in the hub's notation (apache-2.0)")
    parser.add_argument("--teacher", help="the teacher's name on the hub, or any other name")
    parser.add_argument("--data", nargs="+", help="names of the data sets")
    parser.add_argument("--results", nargs="+", type=Path, metavar="SCORES", help="score files, or folders of them")
    args = parser.parse_args(argv)
    facts = {name: getattr(args, name) for name in ("name", "license", "teacher", "data") if getattr(args, name)}
    try:
        if not (args.folder / "config.json").is_file() and not any(args.folder.glob("*.gguf")):
            raise FileNotFoundError(f"{args.folder} is not a model's folder: it has no config.json.")
        if args.results:
            facts["results"] = read_scores(args.results)
        file = write_model_card(args.folder, facts)
        if MARK.encode() not in file.read_bytes():
            raise ValueError(f"{file} was not written by this command and stays as it is; the facts are in {FACTS}.")
    except (ValueError, OSError) as error:
        print(f"python -m tinyllava_switchkd.model.card: {error}", file=sys.stderr)
        raise SystemExit(1) from None
    print(file)


if __name__ == "__main__":
    main()
