"""An export's folder: written completely or not at all, and readable by older versions of transformers."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from tinyllava_switchkd.io import JsonObject, read_json, write_json
from tinyllava_switchkd.model.card import facts_of, write_model_card

RECORD = "tinyllava"
"""Key in an export's ``config.json`` for TinyLLaVA's own settings, so that it can be converted back exactly."""

_FULL = re.compile(r"No space left|Disk quota exceeded|os error (28|122)\b|Errno (28|122)\b|requested and \d+ written")


def empty_folder(output_dir: str | os.PathLike) -> Path:
    """The folder as a path; called before a model is read, so that a long export does not fail at its end.

    Raises:
        FileExistsError: it is not empty.
        OSError: it cannot be created or written.
    """
    output_dir = Path(output_dir)
    if os.path.lexists(output_dir) and (not output_dir.is_dir() or any(output_dir.iterdir())):
        raise FileExistsError(f"{output_dir} is not an empty folder; name a new one, so that no files are mixed.")
    place = next(folder for folder in (output_dir, *output_dir.absolute().parents) if os.path.lexists(folder))
    if not place.is_dir():
        raise NotADirectoryError(f"{output_dir} cannot be created: {place} is not a folder; name another.")
    if not os.access(place, os.W_OK | os.X_OK):
        raise PermissionError(f"{output_dir} cannot be created: {place} is not writable; name another folder.")
    return output_dir


@contextlib.contextmanager
def whole_folder(source: str | os.PathLike, output_dir: str | os.PathLike) -> Iterator[Path]:
    """A temporary folder that becomes `output_dir`, with a model card, if the block ends without an exception.

    It is created beside `output_dir`, or inside if that exists (it may be the current folder or a mounted disk). The
    card includes the facts of the folder of the checkpoint `source`.

    Raises:
        FileExistsError: `output_dir` is not empty.
        OSError: the disk is full or not writable.
    """
    output_dir = empty_folder(output_dir)
    exists = output_dir.is_dir()
    parent = output_dir.absolute() if exists else output_dir.absolute().parent
    missing = [folder for folder in (parent, *parent.parents) if not folder.exists()]  # innermost first
    unfinished = None
    try:
        parent.mkdir(parents=True, exist_ok=True)
        try:
            unfinished = Path(tempfile.mkdtemp(prefix=f".{output_dir.absolute().name}.", dir=parent))
        except OSError as error:
            raise type(error)(f"{output_dir} cannot be created ({error.strerror}); name another folder.") from error
        yield unfinished
        name = output_dir.resolve().name
        write_model_card(unfinished, {**facts_of(source), "source": Path(source).name, "name": name})
        if exists:
            for file in unfinished.iterdir():
                file.rename(output_dir / file.name)
        else:
            unfinished.chmod(0o755)  # mkdtemp gives access only to the owner
            unfinished.rename(output_dir)
    except BaseException as error:
        if unfinished is not None:
            shutil.rmtree(unfinished, ignore_errors=True)
        for folder in missing:
            with contextlib.suppress(OSError):
                folder.rmdir()
        if not isinstance(error, Exception) or not _FULL.search(f"{error} {error.__cause__ or ''}"):
            raise
        free = shutil.disk_usage(next(folder for folder in (parent, *parent.parents) if folder.exists())).free
        raise OSError(
            f"{output_dir} cannot be written: its disk has only {free / 1e6:.0f} MB free; free some space or name a "
            f"folder on another disk."
        ) from error
    finally:
        if unfinished is not None and exists:
            shutil.rmtree(unfinished, ignore_errors=True)


def require(*packages: str) -> None:
    """Check that packages of the extra ``export`` are installed.

    Raises:
        ImportError: names the missing packages.
    """
    if missing := [name for name in packages if importlib.util.find_spec(name) is None]:
        raise ImportError(
            f"This export needs {', '.join(missing)}; install it with pip install 'tinyllava_switchkd[export]'."
        )


def read_by_older_versions(folder: Path) -> None:
    """Add the field names of transformers 4 to a folder's configuration files; transformers 5 reads both.

    Without ``rope_theta``, version 4 would silently use its default and compute something else. Without the others it
    fails.
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
    fields = tokenizer_settings(folder)
    if isinstance(fields.get("extra_special_tokens"), list):
        fields["additional_special_tokens"] = fields.pop("extra_special_tokens")
    fields.setdefault("model_input_names", ["input_ids", "attention_mask"])
    write_json(file, fields, sort_keys=True)

    file = folder / "processor_config.json"
    if file.is_file():  # the image processor has a file of its own, preprocessor_config.json
        write_json(file, {k: v for k, v in read_json(file).items() if k != "image_processor"}, sort_keys=True)


def tokenizer_settings(folder: Path) -> JsonObject:
    """A folder's ``tokenizer_config.json``, with a class name that all versions know and without local settings."""
    fields = read_json(folder / "tokenizer_config.json")
    if fields.get("tokenizer_class") == "TokenizersBackend":
        fields["tokenizer_class"] = "PreTrainedTokenizerFast"
    return {key: value for key, value in fields.items() if key not in ("backend", "is_local", "local_files_only")}
