"""Scores of a checkpoint on scenes: its answers from generate(), and a linear probe of its vision tower."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from tinyllava_switchkd.eval.generate import Answerer
from tinyllava_switchkd.io import JsonObject
from tinyllava_switchkd.quickstart.scenes import QuestionSet, Scene

BATCH_SIZE = 128
MAX_NEW_TOKENS = 8
"""The longest answer has five tokens: four digits and the end."""

PROBE_STRENGTHS = (0.01, 0.1, 1.0)
"""Inverse regularisation strengths of the probe; the best one on validation scenes is used."""


def answer_questions(answerer: Answerer, question_set: QuestionSet) -> list[str]:
    """Greedy answers to all questions in order, each asked in its own conversation."""
    features = _in_batches(question_set.scenes, answerer.encode_images, answerer)
    answers: list[str] = []
    for start in range(0, len(question_set.questions), BATCH_SIZE):
        rows = range(start, min(start + BATCH_SIZE, len(question_set.questions)))
        prompts = [answerer.prompt_ids(question_set.questions[row]["question"]) for row in rows]
        images = [features[question_set.scene_of[row]][None] for row in rows]
        answers += answerer.answer(prompts, images, max_new_tokens=MAX_NEW_TOKENS)
    return answers


def accuracy(questions: Sequence[JsonObject], answers: Sequence[str]) -> tuple[float, dict[str, float]]:
    """Exact matches in per cent: over all questions, and by type in order of appearance."""
    right: dict[str, list[bool]] = {}
    for question, answer in zip(questions, answers, strict=True):
        right.setdefault(question["type"], []).append(answer == question["answer"])
    every = [match for matches in right.values() for match in matches]
    return 100 * float(np.mean(every)), {kind: 100 * float(np.mean(matches)) for kind, matches in right.items()}


def probe(answerer: Answerer, train: Sequence[Scene], val: Sequence[Scene], test: Sequence[Scene]) -> float:
    """Accuracy in per cent of a linear classifier that reads the test digits from the vision tower's tokens.

    It is fitted on scenes of training digits. It uses only the tower, not the connector or language model, so
    differences between ways of training are due to the tower.

    Raises:
        ValueError: the tower does not have one token per cell.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    sets = {}
    for name, scenes in (("train", train), ("val", val), ("test", test)):
        features = _in_batches(scenes, answerer.model.vision_features, answerer)  # [scenes, cells, width]
        digits = np.array([scene.digits for scene in scenes])  # [scenes, cells]
        if features.shape[1] != digits.shape[1]:
            raise ValueError(
                f"The vision tower makes {features.shape[1]} tokens from an image with {digits.shape[1]} cells; the "
                f"probe needs one token per cell."
            )
        sets[name] = features.flatten(0, 1).float().cpu().numpy(), digits.reshape(-1)
    fits = [
        make_pipeline(StandardScaler(), LogisticRegression(C=strength, max_iter=500)).fit(*sets["train"])
        for strength in PROBE_STRENGTHS
    ]
    best = max(fits, key=lambda fit: fit.score(*sets["val"]))
    return 100 * float(best.score(*sets["test"]))


def load(checkpoint: Path) -> Answerer:
    """Load a fine-tuned checkpoint on the CPU."""
    return Answerer.from_pretrained(checkpoint, device="cpu")


@torch.inference_mode()
def _in_batches(
    scenes: Sequence[Scene], compute: Callable[[torch.Tensor], torch.Tensor], answerer: Answerer
) -> torch.Tensor:
    pixels = torch.stack([answerer.pixels_of(Image.fromarray(scene.pixels)) for scene in scenes])  # [scenes, 3, H, W]
    return torch.cat([compute(batch) for batch in pixels.split(BATCH_SIZE)])
