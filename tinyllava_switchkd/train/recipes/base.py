"""The recipe that trains weights as they are; the others derive from it (TinyLLaVA v1, ``training_recipe/base.py``)."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tinyllava_switchkd.model.checkpoint import build_model, load_checkpoint_weights, load_pretrained_model
from tinyllava_switchkd.model.saving import save_pretrained_model
from tinyllava_switchkd.registry import Registry

from ..command_line.arguments import TrainingArguments
from .parts import describe, set_tune_type, tune_from_layer

if TYPE_CHECKING:
    from transformers import Trainer

    from tinyllava_switchkd.model.modeling import TinyLlavaForConditionalGeneration as TinyLlava

logger = logging.getLogger(__name__)

TrainingRecipeFactory: Registry[type[BaseTrainingRecipe]] = Registry("training recipe")
"""``TrainingRecipeFactory("lora")(training_arguments)`` is a recipe."""

register_training_recipe = TrainingRecipeFactory.register
"""``@register_training_recipe("name", override=False)`` on a subclass of `BaseTrainingRecipe`."""


class BaseTrainingRecipe:
    """How a model is loaded, what of it trains, and how it is written.

    Args:
        training_arguments: read are the tune types, the precision and `pretrained_model_path`.
    """

    def __init__(self, training_arguments: TrainingArguments) -> None:
        self.training_arguments = training_arguments

    def weights_dtype(self) -> torch.dtype:
        """What weights are held in: DeepSpeed keeps float32 copies of what it trains, torch's autocast does not."""
        if self.training_arguments.deepspeed:
            return self.compute_dtype()
        return torch.float32

    def compute_dtype(self) -> torch.dtype:
        """What is computed in."""
        return self.training_arguments.compute_dtype

    def load(self, settings: dict[str, Any]) -> TinyLlava:
        """The model with its weights, tokenizer and image processor (attributes of it), on the CPU.

        Args:
            settings: of a model of base models, as `tinyllava_switchkd.model.build_model` takes them; where the run
                starts from a checkpoint, that says most of it.
        """
        settings = {**settings, "dtype": self.weights_dtype(), "device": "cpu"}
        path = self.training_arguments.pretrained_model_path
        if path is None:
            return build_model(**settings)[0]
        kept = ("dtype", "device", "attn_implementation", "cache_dir")
        return load_pretrained_model(path, **{name: settings[name] for name in kept})[0]

    def __call__(self, model: TinyLlava) -> TinyLlava:
        """Bring the model into the form in which it trains, and note that in its configuration."""
        model = self.training_model_converse(model)
        self.tune_type_setting(model)
        arguments = self.training_arguments
        for name in ("tune_type_llm", "tune_type_vision_tower", "tune_type_connector", "tune_vision_tower_from_layer"):
            setattr(model.config, name, getattr(arguments, name))
        logger.info(describe(model))
        return model

    def training_model_converse(self, model: TinyLlava) -> TinyLlava:
        """Change the model itself (adapters, quantisation); nothing here."""
        return model

    def tune_type_setting(self, model: TinyLlava) -> None:
        """Set what trains in each part by its tune type.

        Raises:
            ValueError: nothing would train.
        """
        arguments = self.training_arguments
        set_tune_type(model.language_model, arguments.tune_type_llm)
        set_tune_type(model.connector, arguments.tune_type_connector)
        if arguments.tune_type_vision_tower == "partially-tune":
            tune_from_layer(model.vision_tower, arguments.tune_vision_tower_from_layer)
        else:
            set_tune_type(model.vision_tower, arguments.tune_type_vision_tower)
        model.freeze_unused_parameters()
        if not any(parameter.requires_grad for parameter in model.parameters()):
            raise ValueError(
                f"Nothing of the model would be trained with --tune_type_llm {arguments.tune_type_llm}, "
                f"--tune_type_vision_tower {arguments.tune_type_vision_tower} (from layer "
                f"{arguments.tune_vision_tower_from_layer}) and --tune_type_connector {arguments.tune_type_connector}."
            )

    def save(self, model: TinyLlava, trainer: Trainer) -> None:
        """Write the trained model, and last the trainer's state, which marks the run as finished."""
        trainer.save_model(self.training_arguments.output_dir)
        trainer.accelerator.wait_for_everyone()
        trainer.save_state()

    def write_student(self, model: TinyLlava, output_dir: str, state_dict: dict[str, Tensor] | None = None) -> None:
        """Write a self-contained checkpoint: weights in v1's layout, tokenizer, image processor, configuration.

        Args:
            model: what to write.
            output_dir: where to.
            state_dict: its complete weights, where they do not all lie in the model (ZeRO-3).
        """
        save_pretrained_model(model, model.tokenizer, model.image_processor, output_dir, state_dict=state_dict)

    def read_student(self, model: TinyLlava, folder: str) -> None:
        """Read the weights that `write_student` wrote back into the model."""
        load_checkpoint_weights(model, folder)
