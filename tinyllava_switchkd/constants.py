"""Constants: the first three are fixed by TinyLLaVA v1 (``utils/constants.py``), for data and checkpoints."""

IGNORE_INDEX = -100
"""Label of a position that every loss ignores (image tokens, prompts, padding)."""

IMAGE_TOKEN_INDEX = -200
"""Placeholder id in ``input_ids``; the visual tokens of one image replace it."""

DEFAULT_IMAGE_TOKEN = "<image>"
"""The text that marks an image in LLaVA's JSON."""

FLOAT_DTYPES = ("float32", "float16", "bfloat16")
"""The dtypes that ``--dtype`` accepts, as names because torch is slow to import."""

SPLIT_FOLDERS = {
    "language_model": "language_model.",
    "vision_tower": "vision_tower._vision_tower.",
    "connector": "connector.",
}
"""Folders of TinyLLaVA v1's split layout -> prefix of their keys in the full layout."""

TEMPLATE_FLAGS = ("--template", "--conv_mode", "--conv_version")
"""The flag for the conversation template: our name, then LLaVA's and TinyLLaVA v1's."""
