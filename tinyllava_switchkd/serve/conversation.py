"""What one user has said to one model so far, and how the model is to answer."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from PIL import Image

from tinyllava_switchkd.constants import DEFAULT_IMAGE_TOKEN
from tinyllava_switchkd.data.template import Message
from tinyllava_switchkd.data.template.base import exchange


@dataclass(frozen=True)
class Sampling:
    """How an answer is decoded.

    Attributes:
        temperature: 0 for greedy decoding, which is what benchmarks use.
        top_p: the smallest set of tokens with this probability is sampled from.
        top_k: only the k likeliest tokens are sampled from; 0 for all.
        repetition_penalty: above 1 makes repetition less likely.
        max_new_tokens: length at which an answer is cut.

    Raises:
        ValueError: a value out of range.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0
    max_new_tokens: int = 256

    def __post_init__(self) -> None:
        ranges = {
            "temperature": (0.0, 5.0),
            "top_p": (0.01, 1.0),
            "top_k": (0, 1_000_000),
            "repetition_penalty": (0.5, 5.0),
            "max_new_tokens": (1, 100_000),
        }
        for name, (low, high) in ranges.items():
            value = getattr(self, name)
            if not isinstance(value, int | float) or not low <= value <= high:
                raise ValueError(f"{name} is a number from {low:g} to {high:g}, not {value!r}.")

    def generate_kwargs(self) -> dict[str, Any]:
        """Arguments of `generate`; everything is given, so that no generation_config.json has a say."""
        sampled = self.temperature > 0
        return {
            "max_new_tokens": int(self.max_new_tokens),
            "repetition_penalty": float(self.repetition_penalty),
            "num_beams": 1,
            "do_sample": sampled,
            "temperature": float(self.temperature) if sampled else 1.0,
            "top_p": float(self.top_p) if sampled else 1.0,
            "top_k": int(self.top_k) if sampled else 50,
        }


@dataclass(frozen=True)
class Turn:
    """A question, the images that came with it, and the answer."""

    question: str
    images: tuple[Image.Image, ...]
    answer: str


@dataclass
class Conversation:
    """One user's conversation with one model. Nothing is shared: every user and every model has an own one.

    Attributes:
        turns: what was asked and answered.
        pending: images that the next question comes with. They stay until a question was answered, so a request that
            failed or was stopped before its first word loses none.
    """

    turns: list[Turn] = field(default_factory=list)
    pending: list[Image.Image] = field(default_factory=list)

    def attach(self, image: Image.Image) -> None:
        """Add an image to the next question."""
        self.pending.append(image)

    def clear(self) -> None:
        """Forget everything."""
        self.turns.clear()
        self.pending.clear()

    def images(self) -> list[Image.Image]:
        """All images that the next prompt holds, in order."""
        return [image for turn in self.turns for image in turn.images] + self.pending

    def messages(self, question: str) -> list[Message]:
        """The conversation with its next question, as `TextPreprocess` takes it.

        An ``<image>`` that a user typed is text: only attached images get a place.
        """
        asked = [(turn.question, len(turn.images), turn.answer) for turn in self.turns]
        messages: list[Message] = []
        for text, num_images, answer in [*asked, (question, len(self.pending), None)]:
            places = f"{DEFAULT_IMAGE_TOKEN}\n" * num_images
            messages += exchange(places + _without_places(text), answer)
        return messages

    def record(self, question: str, answer: str) -> None:
        """Add an answered question, with the pending images."""
        self.turns.append(Turn(question, tuple(self.pending), answer))
        self.pending.clear()


def _without_places(text: str) -> str:
    return text.replace(DEFAULT_IMAGE_TOKEN, f"< {DEFAULT_IMAGE_TOKEN[1:]}")
