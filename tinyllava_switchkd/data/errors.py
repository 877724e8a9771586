"""What is raised of a sample while training."""

from __future__ import annotations


class SampleError(ValueError):
    """A sample or a batch cannot be made, in one sentence.

    A loader makes the exception of its worker anew in the main process, out of the worker's whole traceback; what is
    kept of that is the sentence.
    """

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.rpartition(f"{type(self).__name__}: ")[2].split()))
