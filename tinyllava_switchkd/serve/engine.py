"""Chat with a checkpoint: prompts from its own template; answers are streamed, timed, and can be stopped."""

from __future__ import annotations

import hashlib
import logging
import queue
import threading
import time
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch import Tensor
from transformers import BaseImageProcessor, PreTrainedTokenizerBase, StoppingCriteria, StoppingCriteriaList

from tinyllava_switchkd.data.image import ImagePreprocess
from tinyllava_switchkd.data.text import TextPreprocess
from tinyllava_switchkd.model.chat import conversation_template, stop_token_ids
from tinyllava_switchkd.model.checkpoint import load_pretrained_model
from tinyllava_switchkd.registry import display_names
from tinyllava_switchkd.serve.conversation import Conversation, Sampling
from tinyllava_switchkd.visualize.attention_map import AttentionMap, attention_map
from tinyllava_switchkd.visualize.grid import visible_box
from tinyllava_switchkd.visualize.pieces import TextPieces

if TYPE_CHECKING:
    from tinyllava_switchkd.model.modeling import TinyLlavaForConditionalGeneration as TinyLlava

logger = logging.getLogger(__name__)

_CACHED_IMAGES = 8
_POLL_SECONDS = 0.05


@dataclass(frozen=True)
class Reply:
    """An answer, finished or in progress.

    Attributes:
        text: the answer so far.
        token_ids: its tokens.
        finish: None while in progress, then why it ended: "end" (end-of-sequence token), "length" (max_new_tokens),
            "stopped" (by the user), "time" (time limit).
        first_token: seconds to the first token, including image encoding but not the wait for other requests.
        rate: tokens per second after the first token.
        prompt_ids: [T] the prompt, one `IMAGE_TOKEN_INDEX` per image.
        images: the prompt's images.
    """

    text: str
    token_ids: tuple[int, ...]
    finish: str | None
    first_token: float | None
    rate: float | None
    prompt_ids: Tensor
    images: tuple[Image.Image, ...]


class ChatModel:
    """A model with tokenizer, image processor and template. Requests from several threads are answered in turn.

    Args:
        model: a model in eval mode.
        tokenizer: its tokenizer.
        image_processor: its image processor.
        context_len: maximum length of prompt and answer together, in positions.
        name: display name.
        template: conversation template; None for the checkpoint's own, or else v1's for its language model.

    Raises:
        ValueError: no template is known.
    """

    def __init__(
        self,
        model: TinyLlava,
        tokenizer: PreTrainedTokenizerBase,
        image_processor: BaseImageProcessor,
        context_len: int,
        name: str,
        template: str | None = None,
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.image_processor = image_processor
        self.context_len = context_len
        self.name = name
        self.template = template or conversation_template(model, tokenizer)
        self.stop_token_ids = stop_token_ids(model, tokenizer, self.template)
        self._text = TextPreprocess(tokenizer, self.template)
        self._pixels = ImagePreprocess(image_processor, model.config)
        self._features: OrderedDict[bytes, Tensor] = OrderedDict()
        self._lock = threading.Lock()  # guards the model, its attention implementation and the feature cache

    @classmethod
    def load(cls, path: str, name: str | None = None, template: str | None = None, **kwargs: Any) -> ChatModel:
        """Load a checkpoint; `kwargs` go to `load_pretrained_model`."""
        model, tokenizer, image_processor, context_len = load_pretrained_model(path, **kwargs)
        return cls(model, tokenizer, image_processor, context_len, name or display_names([path])[0], template)

    @property
    def num_parameters(self) -> int:
        """Number of parameters, including the vision tower's."""
        return sum(parameter.numel() for parameter in self.model.parameters())

    def stream(
        self,
        conversation: Conversation,
        question: str,
        sampling: Sampling | None = None,
        stop: threading.Event | None = None,
        time_limit: float | None = None,
    ) -> Iterator[Reply]:
        """Answer a question, token by token.

        The answer is added to the conversation, even if it was stopped midway, but not if it was stopped before its
        first word. Closing the iterator also stops the generation.

        Args:
            conversation: the previous turns, and the images attached to this question.
            question: the question.
            sampling: decoding settings, greedy by default.
            stop: an event that stops the answer after the current token; any thread may set it.
            time_limit: seconds after which the answer is stopped. It does not interrupt the first token.

        Yields:
            the `Reply` so far; only the last one has `finish`.

        Raises:
            ValueError: the question is empty, or the conversation is longer than the model's context.
        """
        sampling, stop = sampling or Sampling(), stop or threading.Event()
        question = question.strip()
        if not question:
            raise ValueError("The question is empty.")
        images = tuple(conversation.images())
        prompt_ids = self._text(conversation.messages(question), mode="eval", num_images=len(images))["input_ids"]
        room = self._room(prompt_ids, len(images))
        kwargs = sampling.generate_kwargs() | {"eos_token_id": self.stop_token_ids or None}
        kwargs["max_new_tokens"] = min(kwargs["max_new_tokens"], room)

        work = _Work(stop, time_limit)
        threading.Thread(target=self._generate, args=(work, prompt_ids, images, kwargs), daemon=True).start()
        pieces, text, token_ids = TextPieces(self.tokenizer), "", []
        try:
            while (token := work.tokens.get()) is not None:
                token_ids.append(token)
                piece = pieces.push(token)
                text += piece
                if piece:
                    yield Reply(text.strip(), tuple(token_ids), None, work.first_token, work.rate, prompt_ids, images)
        finally:
            work.cancelled.set()  # the thread is not joined: closing the iterator need not wait for the current token
        if work.error is not None:
            raise work.error
        text = (text + pieces.flush()).strip()
        finish = work.finish(self.stop_token_ids, token_ids)
        if text or finish == "end":
            conversation.record(question, text)
        yield Reply(text, tuple(token_ids), finish, work.first_token, work.rate, prompt_ids, images)

    def check_image(self, image: Image.Image, count: int) -> None:
        """Check that an image can be read, as the last of `count` in a conversation.

        Raises:
            ValueError: the image has a shape that the model cannot read, or there is no room for so many.
        """
        self._pixels(image)
        self._check_length(count * self.model.num_image_tokens, count)

    def attend(self, reply: Reply) -> AttentionMap:
        """The answer's attention to its images, see `attention_map`."""
        with self._lock, torch.no_grad():
            features = self._encode(reply.images)
            return attention_map(self.model, self.tokenizer, reply.prompt_ids, features, reply.token_ids)

    def visible_box(self, image: Image.Image) -> tuple[float, ...]:
        """The part of an image that the model sees, see `grid.visible_box`."""
        return visible_box(image.size, self.image_processor, self.model.config.image_aspect_ratio)

    def _room(self, prompt_ids: Tensor, num_images: int) -> int:
        """Number of positions left for the answer."""
        length = len(prompt_ids) + num_images * (self.model.num_image_tokens - 1)
        self._check_length(length, num_images)
        return self.context_len - length

    def _check_length(self, length: int, num_images: int) -> None:
        if length >= self.context_len:
            raise ValueError(
                f"The conversation takes {length} positions, {num_images * self.model.num_image_tokens} of them for "
                f"{num_images} image(s), but {self.name} reads at most {self.context_len}; start a new conversation."
            )

    def _generate(self, work: _Work, prompt_ids: Tensor, images: Sequence[Image.Image], kwargs: dict[str, Any]) -> None:
        """Generate in a separate thread; tokens, the end and errors are passed through `work`."""
        try:
            while not self._lock.acquire(timeout=_POLL_SECONDS):
                if work.is_over():
                    return
            try:
                work.begin()
                with torch.no_grad():
                    self.model.generate(
                        prompt_ids[None].to(self.model.device),
                        image_features=self._encode(images),
                        stopping_criteria=StoppingCriteriaList([work]),
                        **kwargs,
                    )
            finally:
                self._lock.release()
        except Exception as error:  # raised where the answer is read
            work.error = error
        finally:
            work.tokens.put(None)

    def _encode(self, images: Sequence[Image.Image]) -> Tensor | None:
        """Visual tokens [I, K, D]; those of recent images are cached for follow-up questions."""
        if not images:
            return None
        features = []
        for image in images:
            key = hashlib.sha256(repr(image.size).encode() + image.tobytes()).digest()
            if key not in self._features:
                pixels = self._pixels(image)[None].to(self.model.device)  # [1, 3, H, W]
                self._features[key] = self.model.encode_images(pixels)[0]  # [K, D]
            self._features.move_to_end(key)
            features.append(self._features[key])
        while len(self._features) > _CACHED_IMAGES:
            self._features.popitem(last=False)
        return torch.stack(features)


class _Work(StoppingCriteria):
    """One answer in progress: passes on each token when it is generated, keeps time, and decides when to stop.

    `generate` calls its stopping criteria after every token, whatever the decoding loop. Since the model is fed with
    embeddings, they receive only the new tokens.
    """

    def __init__(self, stop: threading.Event, time_limit: float | None) -> None:
        self.tokens: queue.SimpleQueue[int | None] = queue.SimpleQueue()
        self.cancelled = threading.Event()
        self.error: Exception | None = None
        self._stop, self._time_limit = stop, time_limit
        self._started = self._last = 0.0
        self._first: float | None = None
        self._count = 0
        self._timed_out = self._stopped = False

    def begin(self) -> None:
        """Start the clock."""
        self._started = time.perf_counter()

    def is_over(self) -> bool:
        """Whether no more tokens are wanted."""
        self._stopped = self._stop.is_set() or self.cancelled.is_set()
        return self._stopped

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: object) -> Tensor:
        token = int(input_ids[0, -1])  # waits for the device
        self._last = time.perf_counter()
        self._first = self._first or self._last
        self._count += 1
        self.tokens.put(token)
        self._timed_out = self._time_limit is not None and self._last - self._started > self._time_limit
        return torch.tensor([self.is_over() or self._timed_out], device=input_ids.device)

    @property
    def first_token(self) -> float | None:
        return None if self._first is None else self._first - self._started

    @property
    def rate(self) -> float | None:
        if self._first is None or self._last <= self._first:
            return None
        return (self._count - 1) / (self._last - self._first)

    def finish(self, stops: Sequence[int], token_ids: Sequence[int]) -> str:
        """Why the answer ended, see `Reply.finish`."""
        if token_ids and token_ids[-1] in stops:
            return "end"
        if self._stopped or self._stop.is_set():
            return "stopped"
        return "time" if self._timed_out else "length"
