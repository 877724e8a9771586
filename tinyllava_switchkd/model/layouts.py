"""Read the parts of a checkpoint folder of any layout: configuration, weights, tokenizer, processor, adapter."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from torch import Tensor

from tinyllava_switchkd.io import read_json
from tinyllava_switchkd.model.configuration import TinyLlavaConfig
from tinyllava_switchkd.model.connector import ConnectorFactory
from tinyllava_switchkd.model.fields import check_adapter, check_config, check_generation
from tinyllava_switchkd.model.legacy import config_from_bench, is_bench_config
from tinyllava_switchkd.model.llm import has_tokenizer, load_tokenizer
from tinyllava_switchkd.model.processor import check_image_processor, load_image_processor
from tinyllava_switchkd.model.trust import CodeRefused, one_sentence, refuse_code
from tinyllava_switchkd.model.vision_tower import resolve_vision_tower
from tinyllava_switchkd.model.weights import read_checkpoint, refuse_unusable

T = TypeVar("T")

if TYPE_CHECKING:
    from transformers import BaseImageProcessor, PreTrainedModel, PreTrainedTokenizerBase

    from tinyllava_switchkd.model.vision_tower import VisionTower


def tokenizer_of(folder: Path, config: TinyLlavaConfig) -> PreTrainedTokenizerBase:
    """The tokenizer of a checkpoint: its own, otherwise that of its base model."""
    source = str(folder) if has_tokenizer(folder) else config.tokenizer_name_or_path
    tokenizer = load_tokenizer(
        source,
        config.text_config,
        llm=config.llm_model_name_or_path,
        model_max_length=config.tokenizer_model_max_length,
        padding_side=config.tokenizer_padding_side,
        cache_dir=config.cache_dir,
    )
    last = max(tokenizer.get_vocab().values())
    if last >= config.vocab_size:
        raise ValueError(
            f"The tokenizer in {source!r} has token ids up to {last}, but the language model has only "
            f"{config.vocab_size} embeddings; use the tokenizer that the model was trained with."
        )
    return tokenizer


def image_processor_of(folder: Path, vision_tower: VisionTower) -> BaseImageProcessor:
    """The image processor (PIL backend) of a checkpoint: its own, the base tower's, or the tower's default."""
    if (folder / "preprocessor_config.json").is_file():
        processor = load_image_processor(folder)
        check_image_processor(processor, vision_tower.image_size, folder / "preprocessor_config.json")
        return processor
    return vision_tower.image_processor


def read_config(folder: Path) -> TinyLlavaConfig:
    """The configuration of a checkpoint, which may be TinyLLaVABench's.

    Raises:
        FileNotFoundError: there is no ``config.json``.
        ValueError: it describes another kind of model.
    """
    file = folder / "config.json"
    if not file.is_file():
        raise FileNotFoundError(f"{folder} is not a TinyLLaVA checkpoint: it has no config.json.")
    refuse_code(folder)
    fields = read_json(file)
    if is_bench_config(fields):
        return made(lambda: config_from_bench(fields), file)
    if fields.get("model_type") != TinyLlavaConfig.model_type:
        remedy = (
            "; convert it with python -m tinyllava_switchkd.model.export --to v1"
            if (fields.get("model_type") == "llava" and not (folder / "onnx").is_dir())
            else ""
        )
        raise ValueError(
            f"{file} is the configuration of a {fields.get('model_type')!r} model, not of a TinyLLaVA "
            f"(model_type {TinyLlavaConfig.model_type!r}){remedy}."
        )
    check_config(fields, file)
    fields.pop("cache_dir", None)  # a path of the machine that wrote it
    return made(lambda: TinyLlavaConfig.from_dict(fields), file)


def made(make: Callable[[], T], file: Path, what: str = "a model") -> T:
    """Call `make`, with the name of the file that describes its result (`what`) added to its errors."""
    try:
        return make()
    except (FileNotFoundError, CodeRefused):
        raise
    except Exception as error:  # transformers' validators raise their own types
        raise ValueError(f"{file} describes {what} that cannot be built ({one_sentence(error)}).") from error


def open_checkpoint(folder: Path, config: TinyLlavaConfig | None = None) -> tuple[TinyLlavaConfig, dict[str, Tensor]]:
    """Configuration and tensors (under v1's names) of a checkpoint folder; a LoRA adapter in it is not merged.

    Of a ``generation_config.json``, only the stop tokens are read; they are added to the language model's.
    """
    config = config or read_config(folder)
    add_stop_tokens(config, folder / "generation_config.json")
    tensors = read_checkpoint(folder)
    tower = resolve_vision_tower(config.vision_model_name_or_path, config.vision_config)
    tower.complete_config(config.vision_config, folder, tensors)
    ConnectorFactory(config.connector_type).complete_config(config, tensors)
    return config, tensors


def add_stop_tokens(config: TinyLlavaConfig, file: Path) -> None:
    """Add the stop tokens of a ``generation_config.json``, if there is one, to the language model's configuration."""
    if not file.is_file():
        return
    fields = {"eos_token_id": read_json(file).get("eos_token_id")}
    check_generation(fields, file)
    found = token_ids(config.text_config.eos_token_id, fields["eos_token_id"])
    config.text_config.eos_token_id = found if len(found) > 1 else next(iter(found), None)


def token_ids(*settings: int | list[int] | None) -> list[int]:
    """The different ids in settings that are one id, several, or none."""
    ids = [token for setting in settings for token in (setting if isinstance(setting, list) else [setting])]
    return list(dict.fromkeys(token for token in ids if token is not None))


def merge_adapter(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """Merge the LoRA adapter in `folder` into the model.

    Raises:
        ImportError: peft is not installed.
        ValueError: the adapter cannot be read, does not fit the model, or changes only one end of tied embeddings.
    """
    try:
        from peft import PeftConfig, PeftModel, get_peft_model_state_dict
        from peft.utils import load_peft_weights
    except ImportError as error:
        raise ImportError(f"{folder} holds a LoRA adapter, which needs peft: pip install peft.") from error
    file = folder / "adapter_config.json"
    check_adapter(read_json(file), file)
    try:
        stored = load_peft_weights(str(folder), device="cpu")
    except Exception as error:  # raised by safetensors, torch, or peft if there is no file
        raise ValueError(f"The adapter's weights in {folder} cannot be read ({one_sentence(error)}).") from error
    refuse_unusable(stored, folder)
    if model.config.text_config.tie_word_embeddings:
        ends = (model.get_input_embeddings(), model.get_output_embeddings())
        for place, module in model.named_modules():
            if module in ends and any(f".{place}.lora_" in name for name in stored):
                raise ValueError(
                    f"The adapter in {folder} changes {place}, which is also the model's other end "
                    f"(tie_word_embeddings), so it cannot be merged; train an adapter without it."
                )
    peft_config = PeftConfig.from_pretrained(folder)
    peft_config.inference_mode = True
    # Use the plain PeftModel: the one for causal language models replaces generate().
    peft_config.task_type = None
    peft_config.auto_mapping = None
    try:
        adapted = PeftModel.from_pretrained(model, str(folder), config=peft_config)
    except Exception as error:  # modules that the model lacks, weights of other shapes
        raise ValueError(f"The adapter in {folder} does not fit the model ({one_sentence(error)}).") from error
    placed = get_peft_model_state_dict(adapted)
    if stored.keys() != placed.keys():
        odd = sorted(stored.keys() ^ placed.keys())
        raise ValueError(f"The adapter in {folder} does not fit the model: {len(odd)} weights differ ({odd[0]}, ...).")
    return adapted.merge_and_unload()
