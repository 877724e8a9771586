"""TinyLLaVA in plugin shape, with Switch-KD: train, evaluate and show small vision-language models."""

__version__ = "0.1.0"
