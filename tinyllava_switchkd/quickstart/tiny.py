"""``python -m tinyllava_switchkd.quickstart.tiny FOLDER``: writes tiny models and pictures for the recipe `debug`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from tinyllava_switchkd.data.template.base import exchange
from tinyllava_switchkd.io import write_json
from tinyllava_switchkd.quickstart.base_models import write_llm, write_vision_tower

COLOURS = {"red": (200, 30, 30), "green": (30, 160, 60), "blue": (40, 60, 200), "yellow": (230, 210, 40)}


def write_tiny_world(folder: Path) -> None:
    """Write qwen2-teacher, qwen2-student, siglip-tiny, images, captions.json and conversations.json, if missing."""
    if (folder / "conversations.json").is_file():  # written last
        return
    write_llm(folder / "qwen2-student", width=32, layers=2)
    write_llm(folder / "qwen2-teacher", width=48, layers=2, seed=1)
    write_vision_tower(folder / "siglip-tiny", width=32)
    _write_data(folder)


def _write_data(folder: Path) -> None:
    from PIL import Image, ImageDraw

    (folder / "images").mkdir(parents=True, exist_ok=True)
    captions, conversations = [], []
    for index in range(16):
        name, rgb = list(COLOURS.items())[index % len(COLOURS)]
        picture = Image.new("RGB", (48, 48), "white")
        left = 4 + index % 5 * 3
        ImageDraw.Draw(picture).rectangle((left, left, left + 24, left + 24), fill=rgb)
        picture.save(folder / "images" / f"{index}.png")
        sample = {"id": str(index), "image": f"{index}.png"}
        captions.append({**sample, "conversations": exchange("Describe.\n<image>", f"A {name} square.")})
        conversations.append({**sample, "conversations": exchange("<image>\nWhich colour?", f"It is {name}.")})
    write_json(folder / "captions.json", captions)
    write_json(folder / "conversations.json", conversations)


def main(argv: Sequence[str] | None = None) -> int:
    (folder,) = sys.argv[1:] if argv is None else argv
    write_tiny_world(Path(folder))
    return 0


if __name__ == "__main__":
    sys.exit(main())
