"""Distillation: losses between logits, methods, and the builder of a distiller from a teacher and a student."""

from tinyllava_switchkd.distill.builder import build_distiller, check_compatible
from tinyllava_switchkd.distill.distiller import KNEES, Distiller, PathwayLogits
from tinyllava_switchkd.distill.losses import LogitLoss, LossFactory, knee, register_loss
from tinyllava_switchkd.distill.methods import Method, MethodFactory, register_method, terms_of_all_methods
from tinyllava_switchkd.distill.objective import LogitTerm
from tinyllava_switchkd.distill.task import Measure, Task
from tinyllava_switchkd.distill.teacher_cache import TeacherCache
from tinyllava_switchkd.distill.trace import Sight, View

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
