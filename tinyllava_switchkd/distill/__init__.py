"""Switch-KD: the knee, the distillation losses, the three pathways, and the builder that joins teacher and student."""

from .builder import build_distiller, check_compatible
from .losses import LogitLoss, LossFactory, knee, register_loss
from .switch import PathwayLogits, SupervisedTask, SwitchDistiller

__all__ = [
    "LogitLoss",
    "LossFactory",
    "PathwayLogits",
    "SupervisedTask",
    "SwitchDistiller",
    "build_distiller",
    "check_compatible",
    "knee",
    "register_loss",
]
