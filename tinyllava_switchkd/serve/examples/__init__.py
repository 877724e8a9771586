"""The demo's example images, drawn by this project, each with a question."""

from __future__ import annotations

from pathlib import Path

FOLDER = Path(__file__).parent

_SHORT = "\nAnswer the question using a single word or phrase."

EXAMPLES = (
    ("digits_1.png", f"What digit is top-left?{_SHORT}"),
    ("digits_2.png", f"Where is the purple digit?{_SHORT}"),
    ("digits_3.png", f"What are the digits?{_SHORT}"),
    ("street.png", "How many trees are there, and what colour is the door?"),
    ("fruit.png", "What lies to the left of the banana?"),
    ("chart.png", "Which day has the highest bar?"),
)
"""File in `FOLDER` and question. The digit images are scenes of the quickstart; its models know nothing else."""
