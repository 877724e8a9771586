"""TinyLLaVA in plugin shape, with Switch-KD: train, evaluate and show small vision-language models.

"v1" in comments is TinyLLaVA, which this began as a fork of; what its checkpoints, data and scores rest on stays as it
was.
"""

from tinyllava_switchkd import _auto

__version__ = "0.2.0"

_auto.install(f"{__name__}.model.configuration", f"{__name__}.model.modeling")
