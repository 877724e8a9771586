"""Converts the ten benchmarks' fixtures to the hub's data sets, the reverse of preparation.

Every function takes a fixture folder in LLaVA's layout and returns ``{file in the data set: (schema, rows)}``.
"""

from __future__ import annotations

import base64
import csv
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.eval.hub_schemas import picture

Files = dict[str, tuple[str, list[dict[str, Any]]]]


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def read_tsv(path: Path) -> list[dict[str, str]]:
    csv.field_size_limit(sys.maxsize)
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file, delimiter="\t"))


def mme(folder: Path) -> Files:
    rows = []
    release = folder / "MME_Benchmark_release_version"
    asked: dict[str, int] = {}
    for row in read_jsonl(folder / "llava_mme.jsonl"):
        image = row["image"]
        number = asked[image] = asked.get(image, -1) + 1
        texts = release / f"{image.rsplit('.', 1)[0]}.txt".replace("/images/", "/questions_answers_YN/")
        question, answer = texts.read_text(encoding="utf-8").splitlines()[number].split("\t")
        rows.append(
            {
                "question_id": image.replace("/images/", "/"),  # the hub's ids are flat
                "image": {"bytes": (release / image).read_bytes(), "path": None},
                "question": question,
                "answer": answer,
                "category": row["category"],
            }
        )
    return {"data/test-00000-of-00001-abc.parquet": ("MME", rows)}


def pope(folder: Path) -> Files:
    rows = []
    for category in ("adversarial", "popular", "random"):
        for row in read_jsonl(folder / "coco" / f"coco_pope_{category}.json"):
            stem = row["image"].removesuffix(".jpg")
            rows.append(
                {
                    "id": str(len(rows)),
                    "question_id": str(row["question_id"]),
                    "question": row["text"],
                    "answer": row["label"],
                    "image_source": stem,
                    "image": picture(stem),
                    "category": category,
                }
            )
    half = len(rows) // 2
    return {
        "data/test-00000-of-00002.parquet": ("POPE", rows[:half]),
        "data/test-00001-of-00002.parquet": ("POPE", rows[half:]),
    }


def _mmbench(table: Path, schema: str, file: str, level: str) -> Files:
    rows = []
    for row in read_tsv(table):
        row = {key: value if value not in ("", "None", "NA") else "nan" for key, value in row.items()}
        row[level] = row.pop("l2-category")
        row["index"] = int(row["index"])
        row["image"] = {"bytes": base64.b64decode(row["image"]), "path": None}
        rows.append(row)
    return {file: (schema, rows)}


def mmbench(folder: Path) -> Files:
    return _mmbench(
        folder / "mmbench_dev_20230712.tsv", "MMBench_EN", "data/dev-00000-of-00001-75b.parquet", "l2-category"
    )


def mmbench_cn(folder: Path) -> Files:
    return _mmbench(folder / "mmbench_dev_cn_20231003.tsv", "MMBench", "cn/dev-00000-of-00001.parquet", "L2-category")


def vqav2(folder: Path) -> Files:
    questions = read_json(folder / "v2_OpenEnded_mscoco_val2014_questions.json")["questions"]
    annotations = read_json(folder / "v2_mscoco_val2014_annotations.json")["annotations"]
    known = {row["question_id"]: row for row in annotations}
    rows = [{**known[row["question_id"]], **row, "image": picture(row["image_id"])} for row in questions]
    return {"data/validation-00000-of-00001.parquet": ("VQAv2", rows)}


def gqa(folder: Path) -> Files:
    truth = read_json(folder / "data" / "testdev_balanced_questions.json")
    rows = []
    for key, row in truth.items():
        row = {**row, "id": key, "entailed": str(row["entailed"]), "equivalent": str(row["equivalent"])}
        row["annotations"] = {
            name: [{"objectId": place, "value": value} for place, value in part.items()]
            for name, part in row["annotations"].items()
        }
        rows.append(row)
    images = sorted({row["imageId"] for row in rows})
    return {
        "testdev_balanced_instructions/testdev-00000-of-00001.parquet": ("GQA-instructions", rows),
        "testdev_balanced_images/testdev-00000-of-00001.parquet": (
            "GQA-images",
            [{"id": image, "image": picture(image)} for image in images],
        ),
    }


def scienceqa(folder: Path) -> Files:
    problems = read_json(folder / "problems.json")
    rows = []
    for pid in read_json(folder / "pid_splits.json")["test"]:
        row = {key: value for key, value in problems[pid].items() if key != "split"}
        rows.append({**row, "image": picture(pid, "PNG") if row["image"] else None})
    return {"ScienceQA-FULL/test-00000-of-00001.parquet": ("ScienceQA", rows)}


def mmmu(folder: Path) -> Files:
    answers = read_json(folder / "eval" / "answer_dict_val.json")
    rows = []
    for sample in read_json(folder / "anns_for_eval.json"):
        first, *_ = sample["prompt"].split("\n")
        truth = answers[sample["id"]]["ground_truth"]
        rows.append(
            {
                "id": sample["id"],
                "question": first,
                "options": str(list(sample["index2ans"].values())),
                "answer": str(truth),
                "question_type": sample["question_type"],
                "image_1": picture(sample["id"], "PNG"),
                "image_2": None if "image" in sample else picture("second", "PNG"),
                "subfield": "any",
            }
        )
    return {"data/validation-00000-of-00001.parquet": ("MMMU", rows)}


def textvqa(folder: Path) -> Files:
    truth = read_json(folder / "TextVQA_0.5.1_val.json")["data"]
    prompts = read_jsonl(folder / "llava_textvqa_val_v051_ocr.jsonl")
    rows = []
    for row, asked in zip(truth, prompts, strict=True):
        tokens = asked["text"].split("\n")[1].removeprefix("Reference OCR token: ")
        rows.append({**row, "image": picture(row["image_id"]), "ocr_tokens": tokens.split(", ") if tokens else []})
    return {"data/validation-00000-of-00001.parquet": ("textvqa", rows)}


def vizwiz(folder: Path) -> Files:
    rows = [
        {
            "question_id": row["image"].removesuffix(".jpg"),
            "image": picture(row["image"]),
            "question": row["question"],
            "answers": [answer["answer"] for answer in row["answers"]],
            "category": row["answer_type"],
        }
        for row in read_json(folder / "val.json")
    ]
    return {"data/val-00000-of-00001-777.parquet": ("VizWiz-VQA", rows)}


BENCHMARKS: dict[str, tuple[str, str, Callable[[Path], Files]]] = {
    "mme": ("MME", "lmms-lab-encoder/MME", mme),
    "mmbench": ("mmbench", "lmms-lab-encoder/MMBench_EN", mmbench),
    "mmbench_cn": ("mmbench_cn", "lmms-lab-encoder/MMBench", mmbench_cn),
    "vqav2": ("vqav2", "lmms-lab-encoder/VQAv2", vqav2),
    "gqa": ("gqa", "lmms-lab-encoder/GQA", gqa),
    "scienceqa": ("scienceqa", "lmms-lab-encoder/ScienceQA", scienceqa),
    "mmmu": ("MMMU", "lmms-lab-encoder/MMMU", mmmu),
    "textvqa": ("textvqa", "lmms-lab-encoder/textvqa", textvqa),
    "vizwiz": ("vizwiz", "lmms-lab-encoder/VizWiz-VQA", vizwiz),
    "pope": ("pope", "lmms-lab-encoder/POPE", pope),
}
"""Name -> (folder, data set, conversion)."""
