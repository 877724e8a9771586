"""Export: a checkpoint in the layouts that others read, and back.

``python -m tinyllava_switchkd.model.export --to NAME MODEL OUT``; each NAME is an `ExportTarget` in a file of its own.
``hf-llava`` writes transformers' own `LlavaForConditionalGeneration` with its processor and chat template, ``v1``
TinyLLaVA v1's full layout, from any of its layouts or from a LLaVA.
"""

from .chat_template import jinja_template
from .from_llava import from_hf_llava, is_hf_llava
from .hf_llava import to_hf_llava, why_not_llava
from .targets import ExportTarget, ExportTargetFactory, register_export_target
from .verify import verify_export

__all__ = [
    "ExportTarget",
    "ExportTargetFactory",
    "from_hf_llava",
    "is_hf_llava",
    "jinja_template",
    "register_export_target",
    "to_hf_llava",
    "verify_export",
    "why_not_llava",
]
