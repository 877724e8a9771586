"""Distillation: losses between logits, methods, and the builder of a distiller from a teacher and a student."""

from .builder import build_distiller, check_compatible
from .distiller import KNEES, Distiller, PathwayLogits
from .losses import LogitLoss, LossFactory, knee, register_loss
from .methods import Method, MethodFactory, register_method, terms_of_all_methods
from .objective import LogitTerm
from .task import Measure, Task
from .teacher_cache import TeacherCache
from .trace import Sight, View

__all__ = [
    "KNEES",
    "Distiller",
    "LogitLoss",
    "LogitTerm",
    "LossFactory",
    "Measure",
    "Method",
    "MethodFactory",
    "PathwayLogits",
    "Sight",
    "Task",
    "TeacherCache",
    "View",
    "build_distiller",
    "check_compatible",
    "knee",
    "register_loss",
    "register_method",
    "terms_of_all_methods",
]
