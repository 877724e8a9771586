"""The frozen teacher, which is hidden from optimisers, checkpoints and ZeRO."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from tinyllava_switchkd.model.quantized import is_quantized, keep_differentiable

if TYPE_CHECKING:
    from tinyllava_switchkd.model.modeling import TinyLlavaForConditionalGeneration as TinyLlava


class Held:
    """Keeps a module out of its owner's `parameters()`, `state_dict()` and `modules()`.

    No optimiser, checkpoint or ZeRO stage ever sees it. `follow` moves it with its owner.

    Args:
        module: the module to hold.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def follow(self, fn: Callable[[Tensor], Tensor], *args: object, **kwargs: object) -> None:
        """Move or cast the module as `nn.Module._apply` does; a quantised module is not changed."""
        if not is_quantized(self.module):
            self.module._apply(fn, *args, **kwargs)


class FrozenTeacher(Held):
    """A frozen TinyLLaVA whose connector and language model still pass gradients to their input.

    Its dropout is removed. It is in training mode only while activations are checkpointed, because transformers
    requires that.

    Args:
        model: the teacher; changed in place.

    Raises:
        ValueError: it is quantised in a way that blocks gradients.
    """

    module: TinyLlava

    def __init__(self, model: TinyLlava) -> None:
        super().__init__(model)
        model.requires_grad_(False).eval()
        _remove_dropout(model)
        keep_differentiable(model)

    @property
    def head(self) -> nn.Linear:
        """Hidden states -> logits."""
        return self.module.language_model.get_output_embeddings()

    def connect(self, features: Tensor) -> Tensor:
        """Vision features [images, patches, width] of any dtype -> visual tokens."""
        connector = self.module.connector
        weight = next((p for p in connector.parameters() if p.is_floating_point()), features)
        return connector(features.to(weight.dtype))

    @contextmanager
    def checkpointing(self) -> Iterator[None]:
        """Checkpoint activations inside the ``with`` block, if `checkpoint_activations` enabled it."""
        language_model = self.module.language_model
        language_model.train(any(getattr(part, "gradient_checkpointing", False) for part in language_model.modules()))
        try:
            yield
        finally:
            language_model.eval()

    def checkpoint_activations(self, enable: bool, **kwargs: object) -> None:
        """Turn activation checkpointing of the language model on or off (`kwargs` as in transformers)."""
        if not enable:
            self.module.language_model.gradient_checkpointing_disable()
            return
        if getattr(self.module, "is_loaded_in_8bit", False):
            # bitsandbytes' 8-bit layers keep their inputs outside the hooks that non-reentrant checkpointing uses.
            given = kwargs.get("gradient_checkpointing_kwargs")
            chosen = {**(given if isinstance(given, dict) else {}), "use_reentrant": True}
            kwargs = {**kwargs, "gradient_checkpointing_kwargs": chosen}
        self.module.language_model.gradient_checkpointing_enable(**kwargs)

    def sees_as(self, student: TinyLlava) -> bool:
        """Whether both vision towers give the same features of the same pixels; then one pass is enough for both."""
        for name in ("vision_feature_layer", "vision_feature_select_strategy"):
            if getattr(student.config, name) != getattr(self.module.config, name):
                return False
        ours, theirs = student.vision_tower.state_dict(), self.module.vision_tower.state_dict()
        return ours.keys() == theirs.keys() and all(
            weight.numel()  # empty under ZeRO-3
            and weight.shape == theirs[name].shape
            and torch.equal(weight.to(theirs[name]), theirs[name])
            for name, weight in ours.items()
        )


def _remove_dropout(model: nn.Module) -> None:
    """Remove dropout, so that the logits are the same in training mode."""
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
        for name in ("attention_dropout", "dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
