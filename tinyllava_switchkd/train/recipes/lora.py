"""LoRA: low-rank adapters in the linear layers of some parts; the tune types decide about the other parts."""

from __future__ import annotations

import copy
import logging
import re
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tinyllava_switchkd.constants import SPLIT_FOLDERS
from tinyllava_switchkd.model.card import write_model_card
from tinyllava_switchkd.model.saving import save_image_processor
from tinyllava_switchkd.model.weights import refuse
from tinyllava_switchkd.train.recipes.base import BaseTrainingRecipe, register_training_recipe
from tinyllava_switchkd.train.recipes.parts import MODULES

if TYPE_CHECKING:
    from tinyllava_switchkd.model.modeling import TinyLlavaForConditionalGeneration as TinyLlava

logger = logging.getLogger(__name__)

ADAPTER = "default"
"""Name of the adapter inside the model (peft's)."""


@register_training_recipe("lora")
class LoRATrainingRecipe(BaseTrainingRecipe):
    """Trains LoRA matrices instead of weights in every part whose tune type is "lora".

    peft replaces layers in place. The model stays a TinyLLaVA, so the tasks work unchanged.
    """

    def training_model_converse(self, model: TinyLlava) -> TinyLlava:
        """Add adapters to the linear layers of the adapted parts and freeze everything else."""
        from peft import LoraConfig, get_peft_model

        arguments = self.training_arguments
        config = LoraConfig(
            r=arguments.lora_r,
            lora_alpha=arguments.lora_alpha,
            lora_dropout=arguments.lora_dropout,
            bias=arguments.lora_bias,
            target_modules=self.linear_names(model),
        )
        # no task type: peft's wrapper for causal language models expects methods that a TinyLLaVA lacks
        self._peft_model = get_peft_model(model, config, adapter_name=ADAPTER)
        return model

    def linear_names(self, model: TinyLlava, tune_types: tuple[str, ...] = ("lora", "qlora")) -> list[str]:
        """Full names of the linear layers in the parts with these tune types, without heads (as in v1).

        Raises:
            ValueError: there are no such layers.
        """
        names = []
        for part, module_name in MODULES.items():
            if self.training_arguments.tune_type(part) in tune_types:
                module = model.get_submodule(module_name)
                found = [name for name, child in module.named_modules() if isinstance(child, nn.Linear)]
                names += [f"{module_name}.{name}" for name in found if "head" not in name]
        if not names:
            raise ValueError(f"No part with the tune type {' or '.join(tune_types)} has a linear layer to adapt.")
        return names

    def write_student(self, model: TinyLlava, output_dir: str, state_dict: dict[str, Tensor] | None = None) -> None:
        """Write v1's LoRA folder: the adapter, and one folder per part with the weights that the adapter belongs to.

        Adapted weights keep peft's name (``….base_layer.weight``), as in v1's files.
        """
        from peft import get_peft_model_state_dict

        state = self.plain_state(model, model.state_dict() if state_dict is None else state_dict)
        folder = Path(output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        for part, prefix in SPLIT_FOLDERS.items():
            weights = {
                name[len(prefix) :]: value.detach().cpu().clone()
                for name, value in state.items()
                if name.startswith(prefix) and ".lora_" not in name and not self._is_tied(model, name)
            }
            (folder / part).mkdir(exist_ok=True)
            torch.save(weights, folder / part / "pytorch_model.bin")
        model.config.text_config.save_pretrained(folder / "language_model")
        model.config.vision_config.save_pretrained(folder / "vision_tower")
        model.config.save_pretrained(folder)
        assert model.tokenizer is not None, "it came with the model"
        model.tokenizer.save_pretrained(folder)
        save_image_processor(model.image_processor, folder)
        config = copy.copy(self._peft_model.peft_config[ADAPTER])
        config.task_type, config.inference_mode = "CAUSAL_LM", True  # as v1's
        config.save_pretrained(str(folder))
        adapter = get_peft_model_state_dict(
            self._peft_model,
            {f"base_model.model.{name}": value for name, value in state.items()},
            save_embedding_layers=False,
        )
        adapter = {name: value.detach().cpu().contiguous() for name, value in adapter.items()}
        save_file(adapter, folder / "adapter_model.safetensors", metadata={"format": "pt"})
        write_model_card(folder)

    def read_student(self, model: TinyLlava, folder: str) -> None:
        root = Path(folder)
        state: dict[str, Tensor] = {}
        for part, prefix in SPLIT_FOLDERS.items():
            weights = torch.load(root / part / "pytorch_model.bin", map_location="cpu", weights_only=True)
            state |= {prefix + name: value for name, value in weights.items()}
        for name, value in load_file(root / "adapter_model.safetensors").items():
            name = name.removeprefix("base_model.model.")
            state[re.sub(r"\.lora_([AB])\.", rf".lora_\1.{ADAPTER}.", name)] = value
        state = self.loadable_state(state)
        expected = {name for name in self.loadable_state(model.state_dict()) if not self._is_tied(model, name)}
        refuse(folder, expected - state.keys(), state.keys() - expected, ())
        model.load_state_dict(state, strict=False)

    def plain_state(self, model: TinyLlava, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """The model's weights in the form in which they are written."""
        return state

    def loadable_state(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """The subset of `state` that a resumed run reads."""
        return state

    @staticmethod
    def _is_tied(model: TinyLlava, name: str) -> bool:
        return name == "language_model.lm_head.weight" and model.config.text_config.tie_word_embeddings
