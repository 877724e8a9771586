"""Files of an export: where it goes, and what older versions of transformers need in it."""

from __future__ import annotations

import os
from pathlib import Path

from tinyllava_switchkd.io import read_json, write_json

from ..card import facts_of, write_model_card


def empty_folder(output_dir: str | os.PathLike) -> Path:
    """The folder as a path.

    Raises:
        FileExistsError: there is something in it.
    """
    output_dir = Path(output_dir)
    if output_dir.exists() and (not output_dir.is_dir() or any(output_dir.iterdir())):
        raise FileExistsError(f"{output_dir} is not an empty folder; name a new one, so that nothing is mixed.")
    return output_dir


def card_of_export(source: str | os.PathLike, folder: str | os.PathLike, name: str) -> None:
    """Write the model card of an export, with what the checkpoint's folder knows beyond its configuration.

    Args:
        folder: where the export is now.
        name: what it will be called.
    """
    write_model_card(folder, {**facts_of(source), "source": Path(source).name, "name": name})


def read_by_older_versions(folder: Path) -> None:
    """Add to a folder's configuration files what transformers 4 reads under other names.

    Without ``rope_theta`` it would take its default and silently compute something else; the other names it stumbles
    over. transformers 5 reads both.
    """
    fields = read_json(folder / "config.json")
    rope = dict(fields["text_config"].get("rope_parameters") or {})
    moved = {key: rope.pop(key) for key in ("rope_theta", "partial_rotary_factor") if key in rope}
    fields["text_config"] |= moved
    if rope.get("rope_type", "default") != "default":
        fields["text_config"]["rope_scaling"] = rope
    fields["torch_dtype"] = fields.get("dtype")
    write_json(folder / "config.json", fields, sort_keys=True)

    file = folder / "tokenizer_config.json"
    fields = read_json(file)
    if fields.get("tokenizer_class") == "TokenizersBackend":
        fields["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(fields.get("extra_special_tokens"), list):
        fields["additional_special_tokens"] = fields.pop("extra_special_tokens")
    fields.setdefault("model_input_names", ["input_ids", "attention_mask"])
    for name in ("backend", "is_local", "local_files_only"):
        fields.pop(name, None)
    write_json(file, fields, sort_keys=True)

    file = folder / "processor_config.json"
    if file.is_file():  # the image processor has a file of its own, preprocessor_config.json
        write_json(file, {k: v for k, v in read_json(file).items() if k != "image_processor"}, sort_keys=True)
