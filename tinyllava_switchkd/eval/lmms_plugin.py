"""Our models in lmms-eval: `pip install 'tinyllava_switchkd[lmms]'`, then

    python -m lmms_eval --model tinyllava_switchkd --model_args pretrained=CHECKPOINT --tasks mme,pope --batch_size 16

lmms-eval (0.6 and newer) finds `manifests` through the entry-point group `lmms_eval.models`. This module has no slow
imports, because lmms-eval loads it for every model.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lmms_eval.models.registry_v2 import ModelManifest

MODEL_ID = "tinyllava_switchkd"


def manifests() -> list[ModelManifest]:
    """The models for lmms-eval to register."""
    from lmms_eval.models.registry_v2 import ModelManifest

    path = f"{__package__}.lmms_model.TinyLlavaSwitchKD"
    return [ModelManifest(model_id=MODEL_ID, simple_class_path=path, aliases=("tinyllava-switchkd", "switchkd"))]
