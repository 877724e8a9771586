"""Numbers of the table: exact matches, differences, and how they are printed."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from tinyllava_switchkd.quickstart import evaluate, scenes
from tinyllava_switchkd.quickstart.report import METHODS, difference, paper_lines, score_table


def test_accuracy_is_exact_match_by_type():
    questions = [{"type": kind, "answer": answer} for kind, answer in (("a", "3"), ("a", "5"), ("b", "Yes"))]
    score, by_type = evaluate.accuracy(questions, ["3", "5 5", "yes"])
    assert score == pytest.approx(100 / 3) and by_type == {"a": 50.0, "b": 0.0}


def test_probe_of_informed_and_random_towers():
    """A tower whose tokens are the digits scores 100; a tower of noise scores at chance."""
    splits = [scenes.make_scenes("handwriting", name, 40, seed=0) for name in ("train", "val", "test")]
    digits_of = {scene.pixels.tobytes(): scene.digits for split in splits for scene in split}
    noise = torch.Generator().manual_seed(0)

    def answerer(informed: bool):
        def features(pixels: torch.Tensor) -> torch.Tensor:
            found = torch.tensor([digits_of[image.numpy().tobytes()] for image in pixels])
            shown = torch.nn.functional.one_hot(found, 10).float()
            return shown if informed else torch.randn(shown.shape, generator=noise)

        model = SimpleNamespace(vision_features=features)
        return SimpleNamespace(model=model, pixels_of=lambda image: torch.from_numpy(np.asarray(image).copy()))

    assert evaluate.probe(answerer(True), *splits) == 100
    assert evaluate.probe(answerer(False), *splits) < 30


def test_probe_needs_one_token_per_cell():
    made = scenes.make_scenes("font", "val", 2, seed=0)
    model = SimpleNamespace(vision_features=lambda pixels: torch.zeros(len(pixels), 3, 8))
    answerer = SimpleNamespace(model=model, pixels_of=lambda image: torch.zeros(3, 2, 2))
    with pytest.raises(ValueError, match="3 tokens from an image with 4 cells"):
        evaluate.probe(answerer, made, made, made)


def test_differences_are_paired():
    left, right = [{"score": 70.0}, {"score": 60.0}], [{"score": 65.0}, {"score": 57.0}]
    assert difference(left, right) == {"each": [5.0, 3.0], "mean": 4.0, "std": pytest.approx(2**0.5)}
    assert difference(left[:1], right[:1])["std"] is None


def test_table_has_a_row_per_method_and_aligned_columns():
    row = {"score": 51.26, "by_type": {"where": 100.0, "other": 7.0}, "probe": 80.0, "seconds": 33.4, "steps": 800}
    results = {method: dict(row) for method in METHODS}
    results["sft"]["std"] = {"score": 1.04, "by_type": {"where": 0.0, "other": 2.0}, "probe": 0.5}
    lines = score_table(results)
    assert len(lines) == 2 + len(METHODS) and len(set(map(len, lines))) == 1
    assert lines[0].split() == ["overall", "where", "other", "probe", "steps", "seconds"]
    assert lines[2].split() == ["Teacher", "51.3", "100.0", "7.0", "80.0", "800", "33"]
    assert "51.3 +-1.0" in lines[3]


def test_papers_rows_of_the_half_billion_students():
    text = "\n".join(paper_lines())
    assert "Switch-KD    Qwen2.5-0.5B  Avg7  57.8  Avg10  60.1" in text
    assert "TinyLLaVA    Qwen2.5-0.5B  Avg7  52.9  Avg10  56.5" in text
    assert "Qwen2.5-1.5B" not in text
