"""Training recipes: which parts of a model are trained, in what form, and how the result is written."""

from tinyllava_switchkd.train.recipes.base import BaseTrainingRecipe, TrainingRecipeFactory, register_training_recipe
from tinyllava_switchkd.train.recipes.lora import LoRATrainingRecipe
from tinyllava_switchkd.train.recipes.qlora import QLoRATrainingRecipe

register_training_recipe("common")(BaseTrainingRecipe)

__all__ = [
    "BaseTrainingRecipe",
    "LoRATrainingRecipe",
    "QLoRATrainingRecipe",
    "TrainingRecipeFactory",
    "register_training_recipe",
]
