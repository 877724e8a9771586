"""The demo's models: loaded in the background, so that the page can say how far it is."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tinyllava_switchkd.serve.engine import ChatModel

logger = logging.getLogger(__name__)


@dataclass
class Slot:
    """One model of the demo.

    Attributes:
        name: what people see.
        load: makes the model; None where it is there.
        model: the model once it is there.
        error: why it could not be loaded.
        started: when loading began (`time.monotonic`), None while it waits for the models before it.
    """

    name: str
    load: Callable[[], ChatModel] | None = None
    model: ChatModel | None = None
    error: str | None = None
    started: float | None = None

    @property
    def state(self) -> str:
        """``waiting``, ``loading``, ``ready`` or ``failed``."""
        if self.error is not None:
            return "failed"
        if self.model is not None:
            return "ready"
        return "waiting" if self.started is None else "loading"

    @property
    def seconds(self) -> float:
        """How long loading has taken so far."""
        return 0.0 if self.started is None else time.monotonic() - self.started


class ModelPool:
    """The models that answer side by side, in their order.

    Args:
        slots: what to load.
    """

    def __init__(self, slots: Sequence[Slot]) -> None:
        self.slots = list(slots)

    def start(self) -> threading.Thread:
        """Load what is missing, one after another, in a thread of its own."""
        thread = threading.Thread(target=self._load_all, daemon=True)
        thread.start()
        return thread

    @property
    def is_settled(self) -> bool:
        """Whether every model is there or has failed."""
        return all(slot.state in ("ready", "failed") for slot in self.slots)

    @property
    def ready(self) -> dict[int, ChatModel]:
        """The models that can answer, by their places."""
        return {index: slot.model for index, slot in enumerate(self.slots) if slot.model is not None}

    def _load_all(self) -> None:
        for slot in self.slots:
            if slot.model is not None or slot.load is None:
                continue
            slot.started = time.monotonic()
            try:
                slot.model = slot.load()
                logger.info("%s is ready after %.1f s.", slot.name, slot.seconds)
            except Exception as error:  # whatever it is, the page has to say so
                is_expected = isinstance(error, ValueError | OSError | ImportError)
                slot.error = str(error) if is_expected else f"{type(error).__name__}: {error}"
                logger.error("%s could not be loaded: %s", slot.name, slot.error, exc_info=not is_expected)
