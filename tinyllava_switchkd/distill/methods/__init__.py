"""Distillation methods, one per file. Importing this package registers them."""

from .align_kd import AlignKD
from .base import DenseTerm, Method, MethodFactory, Views, make_loss, register_method, setting, terms_of_all_methods
from .llava_kd import LLaVAKD
from .logit_kd import LogitKD
from .switch_kd import SwitchKD

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
