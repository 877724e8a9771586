"""TinyLLaVA with plugins and Switch-KD: train, evaluate and demo small vision-language models.

"v1" in comments means TinyLLaVA, from which this package was forked. Whatever its checkpoints, data and scores depend
on is kept as it was.
"""

from tinyllava_switchkd import _auto

__version__ = "0.2.0"

_auto.install(f"{__name__}.model.configuration", f"{__name__}.model.modeling")
