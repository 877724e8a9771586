"""Parquet files with the columns and types of the real data sets (from their cards on the hub)."""

from __future__ import annotations

import io
import zlib
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
TEXT = pa.string()
TEXTS = pa.list_(TEXT)
GQA_REFERENCES = pa.list_(pa.struct([("objectId", TEXT), ("value", TEXT)]))


def texts(names: str) -> dict[str, pa.DataType]:
    return dict.fromkeys(names.split(), TEXT)


SCHEMAS: dict[str, dict[str, pa.DataType]] = {
    "MME": texts("question_id image question answer category") | {"image": IMAGE},
    "POPE": texts("id question_id question answer image_source image category") | {"image": IMAGE},
    "MMBench_EN": texts("index question hint A B C D answer category image source l2-category comment split")
    | {"index": pa.int64(), "image": IMAGE},
    "MMBench": texts("index question hint answer A B C D category image source L2-category comment split")
    | {"index": pa.int64(), "image": IMAGE},
    "VQAv2": {
        "question_type": TEXT,
        "multiple_choice_answer": TEXT,
        "answers": pa.list_(pa.struct([("answer", TEXT), ("answer_confidence", TEXT), ("answer_id", pa.int64())])),
        "image_id": pa.int64(),
        "answer_type": TEXT,
        "question_id": pa.int64(),
        "question": TEXT,
        "image": IMAGE,
    },
    "GQA-images": {"id": TEXT, "image": IMAGE},
    "GQA-instructions": {
        **texts("id imageId question answer fullAnswer"),
        "isBalanced": pa.bool_(),
        "groups": pa.struct([("global", TEXT), ("local", TEXT)]),
        **texts("entailed equivalent"),
        "types": pa.struct([("structural", TEXT), ("semantic", TEXT), ("detailed", TEXT)]),
        "annotations": pa.struct([(name, GQA_REFERENCES) for name in ("question", "answer", "fullAnswer")]),
        "semantic": pa.list_(
            pa.struct([("operation", TEXT), ("argument", TEXT), ("dependencies", pa.list_(pa.int32()))])
        ),
        "semanticStr": TEXT,
    },
    "ScienceQA": texts("image question choices answer hint task grade subject topic category skill lecture solution")
    | {"image": IMAGE, "choices": TEXTS, "answer": pa.int8()},
    "MMMU": {
        **texts("id question options explanation"),
        **{f"image_{number}": IMAGE for number in range(1, 8)},
        **texts("img_type answer topic_difficulty question_type subfield"),
    },
    "textvqa": {
        "image_id": TEXT,
        "question_id": pa.int32(),
        "question": TEXT,
        "question_tokens": TEXTS,
        "image": IMAGE,
        "image_width": pa.int32(),
        "image_height": pa.int32(),
        **texts("flickr_original_url flickr_300k_url"),
        "answers": TEXTS,
        "image_classes": TEXTS,
        "set_name": TEXT,
        "ocr_tokens": TEXTS,
    },
    "VizWiz-VQA": {"question_id": TEXT, "image": IMAGE, "question": TEXT, "answers": TEXTS, "category": TEXT},
}


def picture(seed: object, kind: str = "JPEG") -> dict[str, Any]:
    """A tiny image as the hub stores it; equal seeds give equal bytes."""
    number = zlib.crc32(str(seed).encode())
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (number % 256, number // 256 % 256, number // 65536 % 256)).save(buffer, kind)
    return {"bytes": buffer.getvalue(), "path": None}


def write_parquet(path: Path, schema: str, rows: list[dict[str, Any]]) -> None:
    """Write rows under a real schema; columns that a row lacks are null."""
    fields = SCHEMAS[schema]
    unknown = {key for row in rows for key in row} - set(fields)
    if unknown:
        raise ValueError(f"{schema} has no column {', '.join(sorted(unknown))}.")
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.Table.from_pylist([{name: row.get(name) for name in fields} for row in rows], schema=pa.schema(fields))
    pq.write_table(table, path, row_group_size=16)
