"""One user's conversation with one model, and the decoding settings."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from PIL import Image

from tinyllava_switchkd.constants import DEFAULT_IMAGE_TOKEN
from tinyllava_switchkd.data.template import Message
from tinyllava_switchkd.data.template.base import as_text, exchange


@dataclass(frozen=True)
class Sampling:
    """Decoding settings.

    Attributes:
        temperature: 0 for greedy decoding, as in the benchmarks.
        top_p: sample from the smallest set of tokens with at least this total probability.
        top_k: sample from the k likeliest tokens; 0 for all tokens.
        repetition_penalty: values above 1 make repetition less likely.
        max_new_tokens: an answer is cut at this length.

    Raises:
        ValueError: a value is out of range.
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
                raise ValueError(f"{name} must be a number from {low:g} to {high:g}, not {value!r}.")

    def generate_kwargs(self) -> dict[str, Any]:
        """Arguments of `generate`, all of them, so that no generation_config.json changes a setting."""
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
    """One user's conversation with one model, shared with no other user or model.

    Attributes:
        turns: the questions answered so far.
        pending: images attached to the next question. They stay until a question has been answered, so a request that
            fails or is stopped before its first word does not lose them.
    """

    turns: list[Turn] = field(default_factory=list)
    pending: list[Image.Image] = field(default_factory=list)

    def attach(self, image: Image.Image) -> None:
        """Attach an image to the next question."""
        self.pending.append(image)

    def clear(self) -> None:
        """Forget all turns and images."""
        self.turns.clear()
        self.pending.clear()

    def images(self) -> list[Image.Image]:
        """All images in the next prompt, in order."""
        return [image for turn in self.turns for image in turn.images] + self.pending

    def messages(self, question: str) -> list[Message]:
        """The conversation including the next question, in the format of `TextPreprocess`.

        If a user types ``<image>``, it stays text: only attached images get a placeholder.
        """
        asked = [(turn.question, len(turn.images), turn.answer) for turn in self.turns]
        messages: list[Message] = []
        for text, num_images, answer in [*asked, (question, len(self.pending), None)]:
            placeholders = f"{DEFAULT_IMAGE_TOKEN}\n" * num_images
            messages += exchange(placeholders + as_text(text), answer)
        return messages

    def record(self, question: str, answer: str) -> None:
        """Add an answered question with the pending images."""
        self.turns.append(Turn(question, tuple(self.pending), answer))
        self.pending.clear()
