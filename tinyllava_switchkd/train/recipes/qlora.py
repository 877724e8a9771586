"""QLoRA: LoRA with the frozen weights in 8 or 4 bits (bitsandbytes, CUDA)."""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from tinyllava_switchkd.train.command_line.arguments import TrainingArguments
from tinyllava_switchkd.train.recipes.base import register_training_recipe
from tinyllava_switchkd.train.recipes.lora import LoRATrainingRecipe

if TYPE_CHECKING:
    from tinyllava_switchkd.model.modeling import TinyLlavaForConditionalGeneration as TinyLlava


@register_training_recipe("qlora", "qlora_int8")
class QLoRATrainingRecipe(LoRATrainingRecipe):
    """LoRA that also quantises the adapted layers' own weights, in the parts whose tune type is "qlora".

    8 bits, as in v1's ``qlora_int8``, or 4 with ``--bits 4``, which also uses ``--quant_type`` and ``--double_quant``.
    The result is v1's LoRA folder with dequantised weights.

    Raises:
        ValueError: there is no CUDA device, or the run uses ZeRO-3.
        ImportError: bitsandbytes is not installed.
    """

    def __init__(self, training_arguments: TrainingArguments) -> None:
        super().__init__(training_arguments)
        self.check_installation()
        config = getattr(training_arguments, "hf_deepspeed_config", None)
        if config is not None and config.is_zero3():
            raise ValueError("--training_recipe qlora does not work with ZeRO-3, which cannot shard quantised weights.")

    def check_installation(self) -> None:
        """Raise an error on a machine that cannot quantise."""
        if not torch.cuda.is_available() or self.training_arguments.use_cpu:
            note = " (--estimate of qlora needs one, too)" if self.training_arguments.estimate else ""
            raise ValueError(
                f"--training_recipe {self.training_arguments.training_recipe} needs a CUDA GPU and there is none"
                f"{note}; use --training_recipe lora."
            )
        if find_spec("bitsandbytes") is None:
            raise ImportError("--training_recipe qlora needs bitsandbytes: pip install 'tinyllava_switchkd[qlora]'.")

    def training_model_converse(self, model: TinyLlava) -> TinyLlava:
        names = self.linear_names(model, ("qlora",))
        for name in names:
            model.set_submodule(name, self._quantised(model.get_submodule(name)))
        # peft chooses its layer classes by these attributes
        model.is_loaded_in_4bit = self.training_arguments.bits == 4
        model.is_loaded_in_8bit = not model.is_loaded_in_4bit
        model = super().training_model_converse(model)
        self._quantised_names = {f"{name}.base_layer" for name in names}
        return model

    def _quantised(self, linear: nn.Linear) -> nn.Module:
        """The layer, quantised on this process's device."""
        import bitsandbytes as bnb

        shape = {"input_features": linear.in_features, "output_features": linear.out_features}
        if self.training_arguments.bits == 4:
            how = {
                "compress_statistics": self.training_arguments.double_quant,
                "quant_type": self.training_arguments.quant_type,
            }
            layer = bnb.nn.Linear4bit(
                **shape, bias=linear.bias is not None, compute_dtype=self.compute_dtype(), device="meta", **how
            )
            layer.weight = bnb.nn.Params4bit(linear.weight.data, requires_grad=False, **how)
        else:
            layer = bnb.nn.Linear8bitLt(
                **shape, bias=linear.bias is not None, has_fp16_weights=False, threshold=6.0, device="meta"
            )
            layer.weight = bnb.nn.Int8Params(linear.weight.data, requires_grad=False, has_fp16_weights=False)
        layer.bias = linear.bias
        return layer.to(self.training_arguments.device)  # moving is what quantises

    def plain_state(self, model: TinyLlava, state: dict[str, Tensor]) -> dict[str, Tensor]:
        from peft.utils.integrations import dequantize_bnb_weight

        plain = {name: value for name, value in state.items() if not self._is_quantised(name)}
        for name in self._quantised_names:
            module = model.get_submodule(name)
            weight = dequantize_bnb_weight(module.weight, state=getattr(module, "state", None))
            plain[f"{name}.weight"] = weight.to(self.compute_dtype())
            if module.bias is not None:
                plain[f"{name}.bias"] = module.bias
        return plain

    def loadable_state(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        # quantised weights stay frozen and are made again from the same weights as in the first run
        return {name: value for name, value in state.items() if not self._is_quantised(name)}

    def _is_quantised(self, name: str) -> bool:
        head, found, _ = name.partition(".base_layer.")
        return bool(found) and f"{head}.base_layer" in self._quantised_names
