"""A tiny world on disk: base models, images and data, for runs of the entry point and of the bash scripts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tests.tiny import write_tiny_llm, write_tiny_tower

LENGTH = 96


def write_world(folder: str | Path, samples: int = 12) -> dict[str, str]:
    """Write the world; returns its paths: llm (the student's), teacher_llm, tower, images, pretrain, finetune."""
    folder = Path(folder)
    images = folder / "images"
    images.mkdir(parents=True)
    rng = np.random.default_rng(0)
    captions, chats = [], []
    for index in range(samples):
        Image.fromarray(rng.integers(0, 255, (30, 40, 3), dtype=np.uint8)).save(images / f"{index}.png")
        picture = {"id": str(index), "image": f"{index}.png"}
        captions.append({**picture, "conversations": turns("Say.\n<image>", f"number {index} of {samples}")})
        chat = turns("<image>\nWhich?", f"the {index}.") + turns("Sure?", "Yes" * (1 + index % 3))
        chats.append(
            {**picture, "conversations": chat}
            if index % 4
            else {"id": str(index), "conversations": turns("Hi", "there")}
        )
    for name, records in (("pretrain", captions), ("finetune", chats)):
        (folder / f"{name}.json").write_text(json.dumps(records))
    return {
        "llm": write_tiny_llm(folder / "qwen2-student"),
        "teacher_llm": write_tiny_llm(folder / "qwen2-teacher", seed=1, hidden=48),
        "tower": write_tiny_tower(folder / "siglip-tiny"),
        "images": str(images),
        "pretrain": str(folder / "pretrain.json"),
        "finetune": str(folder / "finetune.json"),
    }


def turns(question: str, answer: str) -> list[dict[str, str]]:
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


def command_line(world: dict[str, str], output_dir: str | Path, stage: str = "finetune", **changes: Any) -> list[str]:
    """Arguments of a short run on the CPU from base models; `changes` replace them, and None removes one."""
    arguments: dict[str, Any] = {
        "data_path": world[stage],
        "image_folder": world["images"],
        "model_name_or_path": world["llm"],
        "vision_tower": world["tower"],
        "connector_type": "mlp2x_gelu",
        "template": "pretrain" if stage == "pretrain" else "qwen2_base",
        "mm_vision_select_layer": -2,
        "model_max_length": LENGTH if stage == "pretrain" else 400,
        "output_dir": output_dir,
        "use_cpu": True,
        "report_to": "none",
        "max_steps": 2,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_steps": 100,
        "disable_tqdm": True,
    }
    if stage != "pretrain":
        arguments |= {"tune_type_llm": "full", "tune_type_vision_tower": "full"}
    arguments |= changes
    return [token for name, value in arguments.items() if value is not None for token in (f"--{name}", str(value))]
