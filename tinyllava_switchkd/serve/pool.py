"""The demo's models, loaded in the background while the page shows the progress."""

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
        name: display name.
        load: loads the model; None if `model` is given.
        model: the model once it is loaded.
        error: why it could not be loaded.
        started: when loading began (`time.monotonic`); None while earlier models are loading.
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
        """Seconds since loading began."""
        return 0.0 if self.started is None else time.monotonic() - self.started


class ModelPool:
    """The demo's models, in order of display.

    Args:
        slots: the models to load.
    """

    def __init__(self, slots: Sequence[Slot]) -> None:
        self.slots = list(slots)

    def start(self) -> threading.Thread:
        """Load the missing models one after another in a background thread."""
        thread = threading.Thread(target=self._load_all, daemon=True)
        thread.start()
        return thread

    @property
    def is_settled(self) -> bool:
        """Whether every model is loaded or has failed."""
        return all(slot.state in ("ready", "failed") for slot in self.slots)

    @property
    def ready(self) -> dict[int, ChatModel]:
        """The loaded models, by index."""
        return {index: slot.model for index, slot in enumerate(self.slots) if slot.model is not None}

    def _load_all(self) -> None:
        for slot in self.slots:
            if slot.model is not None or slot.load is None:
                continue
            slot.started = time.monotonic()
            try:
                slot.model = slot.load()
                logger.info("%s is ready after %.1f s.", slot.name, slot.seconds)
            except Exception as error:  # the page shows any error
                is_expected = isinstance(error, ValueError | OSError | ImportError)
                slot.error = str(error) if is_expected else f"{type(error).__name__}: {error}"
                logger.error("%s could not be loaded: %s", slot.name, slot.error, exc_info=not is_expected)
