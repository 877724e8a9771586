"""Training recipes: which parts of a model are trained, in what form, and how the result is written."""

from .base import BaseTrainingRecipe, TrainingRecipeFactory, register_training_recipe
from .lora import LoRATrainingRecipe
from .qlora import QLoRATrainingRecipe

register_training_recipe("common")(BaseTrainingRecipe)

__all__ = [
    "BaseTrainingRecipe",
    "LoRATrainingRecipe",
    "QLoRATrainingRecipe",
    "TrainingRecipeFactory",
    "register_training_recipe",
]
