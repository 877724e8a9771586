"""The web demo without its page: sessions, answers of several models, attention maps."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from PIL import Image

from tinyllava_switchkd.serve import render
from tinyllava_switchkd.serve.conversation import Conversation, Sampling
from tinyllava_switchkd.serve.engine import Reply
from tinyllava_switchkd.serve.images import read_image
from tinyllava_switchkd.serve.limits import DemoLimits
from tinyllava_switchkd.serve.pool import ModelPool
from tinyllava_switchkd.visualize.attention_map import AttentionMap
from tinyllava_switchkd.visualize.overlay import data_address, fit, overlay

logger = logging.getLogger(__name__)

USER_ERRORS = (ValueError, FileNotFoundError)
_THUMBNAIL = 160  # pixels of the longer side
_UPDATE_SECONDS = 0.08  # between two updates of an answer in progress


@dataclass
class Session:
    """The state of one browser tab, shared with no other tab.

    Attributes:
        conversations: one per model of the pool.
        exchanges: what the page shows.
        stop: set by the Stop button.
        attached: path of the last image added to the conversation.
        maps: attention maps of the last exchange, by model index.
    """

    conversations: list[Conversation]
    exchanges: list[render.Exchange] = field(default_factory=list)
    stop: threading.Event = field(default_factory=threading.Event)
    attached: str | None = None
    maps: dict[int, AttentionMap] = field(default_factory=dict)


class Demo:
    """Answers the page's requests.

    Args:
        pool: the models.
        limits: limits of a request.
    """

    def __init__(self, pool: ModelPool, limits: DemoLimits | None = None) -> None:
        self.pool = pool
        self.limits = limits or DemoLimits()
        self._active: set[int] = set()  # ids of the sessions being answered

    @property
    def is_busy(self) -> bool:
        """Whether a question is being answered."""
        return bool(self._active)

    def new_session(self) -> Session:
        """Start an empty session."""
        return Session([Conversation() for _ in self.pool.slots])

    def ask(self, session: Session, image_path: str | None, question: str, sampling: Sampling) -> Iterator[None]:
        """Let the models answer one after another, so that none slows down another.

        Yields whenever `session.exchanges` has something new to show.

        Args:
            session: modified in place.
            image_path: the image on the page; added to the conversation unless it was the last one added.
            question: the question.
            sampling: decoding settings.

        Raises:
            ValueError, FileNotFoundError: the input is invalid; no model was asked.
        """
        ready = self.pool.ready
        if not ready:
            raise ValueError("The models are still loading; please wait a moment.")
        question = (question or "").strip()
        if not question:
            raise ValueError("Please type a question.")
        if len(question) > self.limits.question_chars:
            raise ValueError(
                f"The question has {len(question)} characters; at most {self.limits.question_chars} are allowed."
            )
        if sampling.max_new_tokens > self.limits.max_new_tokens:
            raise ValueError(f"An answer may have at most {self.limits.max_new_tokens} tokens.")
        thumbnails = self._attach(session, image_path)
        exchange = render.Exchange(
            question, thumbnails, [render.Cell(index, self.pool.slots[index].name) for index in ready]
        )
        session.maps.clear()
        session.exchanges.append(exchange)
        self._active.add(id(session))
        try:
            for index, cell in zip(ready, exchange.cells, strict=True):
                if not session.stop.is_set():
                    cell.state = "working"
                    yield
                    yield from self._answer(session, index, cell, question, sampling)
                cell.state = "done"
            yield
        finally:
            self._active.discard(id(session))
            session.stop.clear()  # not at the start: a question can be stopped while it waits in the queue

    def read_upload(self, path: str) -> Image.Image:
        """Read an uploaded image; raises as `read_image` does."""
        return read_image(path, self.limits.image, name="The file")

    def _attach(self, session: Session, image_path: str | None) -> tuple[str, ...]:
        """Add the image on the page to all conversations if it is new to them; return thumbnails of what was added."""
        if image_path is None:
            if not any(conversation.images() for conversation in session.conversations):
                raise ValueError("There is no image yet: upload or paste one, or pick an example.")
            return ()
        if image_path == session.attached:
            return ()
        count = 1 + max(len(conversation.images()) for conversation in session.conversations)
        if count > self.limits.images:
            raise ValueError(f"A conversation may have at most {self.limits.images} images; start a new one.")
        image = self.read_upload(image_path)
        for model in self.pool.ready.values():
            model.check_image(image, count)
        for conversation in session.conversations:
            conversation.attach(image)
        session.attached = image_path
        return (data_address(image, _THUMBNAIL),)

    def _answer(
        self, session: Session, index: int, cell: render.Cell, question: str, settings: Sampling
    ) -> Iterator[None]:
        model, shown = self.pool.ready[index], 0.0
        stream = model.stream(session.conversations[index], question, settings, session.stop, self.limits.seconds)
        try:
            for cell.reply in stream:
                if time.monotonic() - shown >= _UPDATE_SECONDS:
                    yield
                    shown = time.monotonic()
        except USER_ERRORS as error:
            cell.error = str(error)
        except torch.OutOfMemoryError:
            cell.error = "There is not enough memory for this conversation; start a new one."
        except Exception:
            logger.exception("%s failed.", model.name)
            cell.error = "This model failed; the server's log has the details."
        yield

    def attend(self, session: Session, index: int) -> AttentionMap:
        """The attention map of a model's last answer, computed only once.

        Raises:
            ValueError: the model has not answered, or no map can be made of its answer.
        """
        reply = self._last_reply(session, index)
        if index not in session.maps:
            session.maps[index] = self.pool.ready[index].attend(reply)
        return session.maps[index]

    def picture(self, session: Session, index: int, token: int | None) -> Image.Image:
        """The map of a token (None: the whole answer) drawn over the images of the conversation, side by side."""
        attention, model = session.maps[index], self.pool.ready[index]
        panels = [
            overlay(image, attention.of(token, place), model.visible_box(image))
            for place, image in enumerate(self._last_reply(session, index).images)
        ]
        return side_by_side(panels)

    def _last_reply(self, session: Session, index: int) -> Reply:
        """A model's finished answer to the last question."""
        for cell in session.exchanges[-1].cells if session.exchanges else ():
            if cell.index == index and cell.reply is not None and cell.reply.finish is not None:
                return cell.reply
        raise ValueError(f"{self.pool.slots[index].name} has not answered yet: ask a question first.")


def side_by_side(panels: list[Image.Image], gap: int = 8) -> Image.Image:
    """Place pictures in a row, all at the height of the first."""
    height = panels[0].height
    panels = [panel.resize((max(1, round(panel.width * height / panel.height)), height)) for panel in panels]
    row = Image.new("RGB", (sum(panel.width for panel in panels) + gap * (len(panels) - 1), height), "white")
    left = 0
    for panel in panels:
        row.paste(panel, (left, 0))
        left += panel.width + gap
    return fit(row)
