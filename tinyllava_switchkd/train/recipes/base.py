"""The recipe that trains the weights directly, base class of the others (TinyLLaVA v1, ``training_recipe/base.py``)."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tinyllava_switchkd.model.checkpoint import build_model, load_checkpoint_weights, load_pretrained_model
from tinyllava_switchkd.model.saving import save_pretrained_model
from tinyllava_switchkd.registry import Registry
from tinyllava_switchkd.train.command_line.arguments import TrainingArguments
from tinyllava_switchkd.train.recipes.parts import describe, set_tune_type, tune_from_layer

if TYPE_CHECKING:
    from transformers import Trainer

    from tinyllava_switchkd.model.modeling import TinyLlavaForConditionalGeneration as TinyLlava

logger = logging.getLogger(__name__)

TrainingRecipeFactory: Registry[type[BaseTrainingRecipe]] = Registry("training recipe")
"""``TrainingRecipeFactory("lora")(training_arguments)`` returns a recipe."""

register_training_recipe = TrainingRecipeFactory.register
"""``@register_training_recipe("name", override=False)`` on a subclass of `BaseTrainingRecipe`."""


class BaseTrainingRecipe:
    """How a model is loaded, which parts are trained, and how it is written.

    Args:
        training_arguments: the recipe reads the tune types, the precision and `pretrained_model_path`.
    """

    def __init__(self, training_arguments: TrainingArguments) -> None:
        self.training_arguments = training_arguments

    def weights_dtype(self) -> torch.dtype:
        """The dtype of the weights. DeepSpeed keeps float32 copies of trained weights, torch's autocast does not."""
        if self.training_arguments.deepspeed:
            return self.compute_dtype()
        return torch.float32

    def compute_dtype(self) -> torch.dtype:
        return self.training_arguments.compute_dtype

    def load(self, settings: dict[str, Any]) -> TinyLlava:
        """The model on the CPU, with weights and with its tokenizer and image processor as attributes.

        Args:
            settings: arguments of `tinyllava_switchkd.model.build_model`. If the run starts from a checkpoint, most
                settings come from the checkpoint instead.
        """
        settings = {**settings, "dtype": self.weights_dtype(), "device": "cpu"}
        path = self.training_arguments.pretrained_model_path
        if path is None:
            return build_model(**settings)[0]
        kept = ("dtype", "device", "attn_implementation", "cache_dir")
        return load_pretrained_model(path, **{name: settings[name] for name in kept})[0]

    def __call__(self, model: TinyLlava) -> TinyLlava:
        """Prepare the model for training and record the tune types in its configuration."""
        model = self.training_model_converse(model)
        self.tune_type_setting(model)
        arguments = self.training_arguments
        for name in ("tune_type_llm", "tune_type_vision_tower", "tune_type_connector", "tune_vision_tower_from_layer"):
            setattr(model.config, name, getattr(arguments, name))
        logger.info(describe(model))
        return model

    def training_model_converse(self, model: TinyLlava) -> TinyLlava:
        """Hook for recipes that change the model itself (adapters, quantisation)."""
        return model

    def tune_type_setting(self, model: TinyLlava) -> None:
        """Set which parameters of each part are trained, by its tune type.

        Raises:
            ValueError: no parameter of a partially tuned tower would be trained.
        """
        arguments = self.training_arguments
        set_tune_type(model.language_model, arguments.tune_type_llm)
        set_tune_type(model.connector, arguments.tune_type_connector)
        if arguments.tune_type_vision_tower == "partially-tune":
            tune_from_layer(model.vision_tower, arguments.tune_vision_tower_from_layer)
        else:
            set_tune_type(model.vision_tower, arguments.tune_type_vision_tower)
        model.freeze_unused_parameters()
        if arguments.tune_type_vision_tower == "partially-tune" and not any(
            parameter.requires_grad for parameter in model.vision_tower.parameters()
        ):
            raise ValueError(
                f"--tune_vision_tower_from_layer {arguments.tune_vision_tower_from_layer} trains nothing of the vision "
                f"tower, because layers behind --mm_vision_select_layer {model.config.vision_feature_layer} are not "
                f"used; choose an earlier layer."
            )

    def save(self, model: TinyLlava, trainer: Trainer) -> None:
        """Write the trained model and then the trainer's state, which marks the run as finished."""
        trainer.save_model(self.training_arguments.output_dir)
        trainer.accelerator.wait_for_everyone()
        trainer.save_state()

    def write_student(self, model: TinyLlava, output_dir: str, state_dict: dict[str, Tensor] | None = None) -> None:
        """Write a self-contained checkpoint: weights in v1's layout, tokenizer, image processor, configuration.

        Args:
            model: the model to write.
            output_dir: the checkpoint's folder.
            state_dict: the complete weights, if the model does not hold all of them (ZeRO-3).
        """
        save_pretrained_model(model, model.tokenizer, model.image_processor, output_dir, state_dict=state_dict)

    def read_student(self, model: TinyLlava, folder: str) -> None:
        """Load the weights that `write_student` wrote into the model."""
        load_checkpoint_weights(model, folder)
