"""Save self-contained checkpoints to a folder or upload them to the hub."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from tinyllava_switchkd.io import read_json, write_json
from tinyllava_switchkd.model.card import CARD, facts_of, write_model_card

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import BaseImageProcessor, PreTrainedModel, PreTrainedTokenizerBase


def save_pretrained_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    image_processor: BaseImageProcessor,
    output_dir: str | os.PathLike,
    template: str | None = None,
    state_dict: dict[str, Tensor] | None = None,
) -> None:
    """Write a self-contained checkpoint: v1's layout in safetensors, tokenizer, image processor, template, model card.

    Args:
        model: a `TinyLlavaForConditionalGeneration`.
        tokenizer: the model's tokenizer.
        image_processor: saved as ``preprocessor_config.json``.
        output_dir: created if it does not exist.
        template: conversation template of the model; None keeps the configuration's.
        state_dict: weights to write instead of the model's own (gathered from a partitioned model).
    """
    if template is not None:
        model.config.template = template
    output_dir = Path(output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(output_dir, state_dict=state_dict)
    tokenizer.save_pretrained(output_dir)
    save_image_processor(image_processor, output_dir)
    write_model_card(output_dir)


def push_pretrained_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    image_processor: BaseImageProcessor,
    repo_id: str,
    template: str | None = None,
    private: bool | None = None,
    token: str | None = None,
) -> str:
    """Upload a checkpoint (see `save_pretrained_model`) to the hub; returns its address there."""
    from huggingface_hub import HfApi

    api = HfApi(token=token)
    api.create_repo(repo_id, private=private, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        own = model.config.name_or_path
        if own and Path(own, CARD).is_file():  # keep a card that somebody has written
            shutil.copy(Path(own, CARD), folder)
        save_pretrained_model(model, tokenizer, image_processor, folder, template)
        write_model_card(folder, {**(facts_of(own) if own else {}), "name": repo_id})
        return str(api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message="Upload the model"))


def save_image_processor(image_processor: BaseImageProcessor, output_dir: Path) -> None:
    """Write ``preprocessor_config.json`` with the class name that every version of transformers knows."""
    image_processor.save_pretrained(output_dir)
    file = output_dir / "preprocessor_config.json"
    fields = read_json(file)
    fields["image_processor_type"] = fields["image_processor_type"].removesuffix("Pil").removesuffix("Fast")
    write_json(file, fields, sort_keys=True)
