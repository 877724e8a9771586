"""TinyLLaVA in plugin shape, with Switch-KD: train, evaluate and show small vision-language models."""

from tinyllava_switchkd import _auto

__version__ = "0.2.0"

_auto.install()
