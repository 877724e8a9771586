"""Distillation methods, one file each. Importing this package registers them."""

from .base import DenseTerm, Method, MethodFactory, Views, make_loss, register_method, setting, terms_of_all_methods
from .logit_kd import LogitKD
from .switch_kd import SwitchKD

__all__ = [
    "DenseTerm",
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
