"""The distillation losses between logits and their registry. Importing this package registers them."""

from .base import LogitLoss, LossFactory, register_loss
from .knee import knee
from .pairs import BiLDForwardKL, BiLDReverseKL, DBiLDForwardKL, DBiLDReverseKL, LogitDifferenceKL
from .vocabulary import (
    ForwardKL,
    GeneralizedJSD,
    ReverseKL,
    SkewForwardKL,
    SkewReverseKL,
    TotalVariation,
    VocabularyLoss,
)

__all__ = [
    "BiLDForwardKL",
    "BiLDReverseKL",
    "DBiLDForwardKL",
    "DBiLDReverseKL",
    "ForwardKL",
    "GeneralizedJSD",
    "LogitDifferenceKL",
    "LogitLoss",
    "LossFactory",
    "ReverseKL",
    "SkewForwardKL",
    "SkewReverseKL",
    "TotalVariation",
    "VocabularyLoss",
    "knee",
    "register_loss",
]
