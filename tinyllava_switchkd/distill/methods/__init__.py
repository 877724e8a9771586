"""Distillation methods, one per file. Importing this package registers them."""

from tinyllava_switchkd.distill.methods.align_kd import AlignKD
from tinyllava_switchkd.distill.methods.base import (
    DenseTerm,
    Method,
    MethodFactory,
    Views,
    make_loss,
    register_method,
    setting,
    terms_of_all_methods,
)
from tinyllava_switchkd.distill.methods.llava_kd import LLaVAKD
from tinyllava_switchkd.distill.methods.logit_kd import LogitKD
from tinyllava_switchkd.distill.methods.switch_kd import SwitchKD

__all__ = [
    "AlignKD",
    "DenseTerm",
    "LLaVAKD",
    "LogitKD",
    "Method",
    "MethodFactory",
    "SwitchKD",
    "Views",
    "make_loss",
    "register_method",
    "setting",
    "terms_of_all_methods",
]
