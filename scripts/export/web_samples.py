"""Write the quickstart's sample images and questions for the web page: ``web_samples.py FOLDER [NUMBER]``."""

from __future__ import annotations

import sys
from pathlib import Path

from tinyllava_switchkd.io import write_json
from tinyllava_switchkd.quickstart.scenes import question_set, save_images


def main(folder: Path, number: int = 6) -> None:
    """Write test scenes, and a question of each type about the first one."""
    asked = question_set("handwriting", "test", number, seed=0)
    names = save_images(list(asked.scenes), folder / "samples", "sample")
    questions = [row["question"] for row, scene in zip(asked.questions, asked.scene_of, strict=True) if scene == 0]
    write_json(folder / "samples.json", {"images": [f"samples/{name}" for name in names], "questions": questions})


if __name__ == "__main__":
    main(Path(sys.argv[1]), *map(int, sys.argv[2:3]))
