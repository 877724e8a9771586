"""The distillation losses between logits, and their registry. Importing this registers all of them."""

from .base import LogitLoss, LossFactory, register_loss
from .knee import knee
from .pairs import BiLDForwardKL, BiLDReverseKL, DBiLDForwardKL, DBiLDReverseKL, LogitDifferenceKL
from .vocabulary import ForwardKL, FullVocabularyKL, ReverseKL

__all__ = [
    "BiLDForwardKL",
    "BiLDReverseKL",
    "DBiLDForwardKL",
    "DBiLDReverseKL",
    "ForwardKL",
    "FullVocabularyKL",
    "LogitDifferenceKL",
    "LogitLoss",
    "LossFactory",
    "ReverseKL",
    "knee",
    "register_loss",
]
