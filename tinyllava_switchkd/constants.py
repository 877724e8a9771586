"""Constants that TinyLLaVA v1 fixes (``utils/constants.py``): they are baked into data sets and checkpoints."""

IGNORE_INDEX = -100
"""Label of a position that no loss looks at (image tokens, prompts, padding)."""

IMAGE_TOKEN_INDEX = -200
"""Placeholder id in ``input_ids`` that one image's visual tokens replace."""

DEFAULT_IMAGE_TOKEN = "<image>"
"""The text that marks an image in LLaVA's JSON."""

FLOAT_DTYPES = ("float32", "float16", "bfloat16")
"""What ``--dtype`` takes of torch's, by name: torch itself is slow to import."""

SPLIT_FOLDERS = {
    "language_model": "language_model.",
    "vision_tower": "vision_tower._vision_tower.",
    "connector": "connector.",
}
"""The folders of TinyLLaVA v1's split layout, each with the prefix that its keys have in the full layout."""

TEMPLATE_FLAGS = ("--template", "--conv_mode", "--conv_version")
"""How commands take the name of a conversation template: our name first, then LLaVA's and TinyLLaVA v1's."""
