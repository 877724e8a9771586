"""Language models: the `LLMFactory` and its entries.

An entry is a function without arguments that returns ``(ModelCls, (TokenizerCls, post_load))``, as in TinyLLaVA v1
(``model/llm``). `post_load` sets v1's padding and unknown tokens, which existing checkpoints were trained with.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import transformers
from transformers import AutoConfig, AutoTokenizer, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from tinyllava_switchkd.io import read_json
from tinyllava_switchkd.model.trust import CodeRefused, one_sentence, refuse_code
from tinyllava_switchkd.registry import Registry, base_name

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "tokenizer.model")

PostLoad = Callable[[PreTrainedTokenizerBase], PreTrainedTokenizerBase]
LLMEntry = tuple[type[PreTrainedModel], tuple[type[AutoTokenizer], PostLoad]]
"""Class of a language model, class of its tokenizer, and a function that is applied to the loaded tokenizer."""


def read_model_type(name_or_path: str) -> str | None:
    """``model_type`` in the ``config.json`` of a folder or hub repository; None if there is none."""
    folder = Path(name_or_path)
    if folder.is_dir():
        file = folder / "config.json"
        if not file.is_file():
            return None
        config = read_json(file)
    elif not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name_or_path):
        return None  # not the form of a hub name: do not ask the hub
    else:
        try:
            config, _ = PretrainedConfig.get_config_dict(name_or_path)
        except (OSError, ValueError):  # no such repository or no network: the registry then lists its names
            return None
    return config.get("model_type")


def read_base_config(name_or_path: str, cache_dir: str | None = None) -> PretrainedConfig:
    """Configuration of a base model, without remote code.

    Raises:
        FileNotFoundError: there is no such folder with a ``config.json``, and no answer from the hub.
        ValueError: transformers cannot read the configuration.
    """
    folder = Path(name_or_path)
    if (folder / "config.json").is_file():
        refuse_code(folder)
        read_json(folder / "config.json")  # for its clear errors
    try:
        return AutoConfig.from_pretrained(name_or_path, cache_dir=cache_dir, trust_remote_code=False)
    except OSError as error:
        raise FileNotFoundError(
            f"The configuration of the base model {name_or_path!r} could not be read: there is no such folder with a "
            f"config.json, and it could not be loaded from the hub."
        ) from error
    except Exception as error:  # of transformers and its validators
        raise ValueError(
            f"transformers cannot read the configuration of the base model {name_or_path!r} without running the "
            f"author's code ({one_sentence(error)})."
        ) from error


LLMFactory: Registry[LLMEntry] = Registry(
    "language model", fuzzy=True, fallback=read_model_type, resolve=lambda entry: entry()
)
register_llm = LLMFactory.register


def resolve_llm(name_or_path: str, text_config: PretrainedConfig) -> LLMEntry:
    """The entry for a language model: by its name, or by the type of `text_config` if the name does not fit that.

    Names can mislead: the folder ``graphite-v2`` contains ``phi``.
    """
    # Use the name only if it contains a registered one; otherwise the registry would ask the hub, in vain.
    names = [name_or_path] if any(entry in base_name(name_or_path) for entry in LLMFactory.list()) else []
    candidates = [*names, text_config.model_type]
    errors = []
    for candidate in candidates:
        try:
            entry = LLMFactory(candidate)
        except ValueError as error:
            errors.append(str(error))
            continue
        if isinstance(text_config, entry[0].config_class):
            return entry
    raise ValueError(
        errors[-1]
        if errors
        else f"No registered language model takes a text_config of type {text_config.model_type!r} "
        f"(looked for {' and '.join(map(repr, candidates))}); registered: {', '.join(LLMFactory.list())}."
    )


def pad_is_unk(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """v1's rule for phi, gemma and llama: pad with the unknown token, or the end token if there is none."""
    tokenizer.pad_token = tokenizer.unk_token or tokenizer.pad_token or tokenizer.eos_token
    return tokenizer


def unk_is_pad(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """v1's rule for Qwen: the unknown token is the padding token."""
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    tokenizer.unk_token = tokenizer.pad_token
    return tokenizer


def keep_tokens(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """v1's rule for StableLM: change nothing; without a padding token, pad with the end token."""
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    return tokenizer


def _entry(model_class: str, post_load: PostLoad) -> Callable[[], LLMEntry]:
    return lambda: (getattr(transformers, model_class), (AutoTokenizer, post_load))


for _names, _model_class, _post_load in (
    (("qwen2", "qwen"), "Qwen2ForCausalLM", unk_is_pad),  # "qwen2" matches Qwen2.5, "qwen" matches Qwen1.5
    (("qwen3",), "Qwen3ForCausalLM", unk_is_pad),
    (("llama", "tinyllama"), "LlamaForCausalLM", pad_is_unk),
    (("phi",), "PhiForCausalLM", pad_is_unk),
    (("phi3", "phi-3", "phi-4"), "Phi3ForCausalLM", pad_is_unk),
    (("gemma",), "GemmaForCausalLM", pad_is_unk),
    (("stablelm",), "StableLmForCausalLM", keep_tokens),
):
    register_llm(*_names)(_entry(_model_class, _post_load))


def has_tokenizer(folder: Path) -> bool:
    """Whether a folder holds the files of a tokenizer."""
    return any((folder / name).is_file() for name in TOKENIZER_FILES)


def load_tokenizer(
    name_or_path: str,
    text_config: PretrainedConfig | None = None,
    *,
    llm: str | None = None,
    model_max_length: int | None = None,
    padding_side: str = "right",
    cache_dir: str | None = None,
) -> PreTrainedTokenizerBase:
    """The (always fast) tokenizer at `name_or_path` after the language model's `post_load`.

    Args:
        name_or_path: a folder or hub repository with tokenizer files.
        text_config: configuration of its language model; read from `llm` if None.
        llm: name or path by which the language model is looked up; `name_or_path` if None.
        model_max_length: maximum positions of a sequence; the tokenizer's own if None.
        padding_side: ``right`` for training.
        cache_dir: the hub's cache.

    Raises:
        FileNotFoundError: there is no tokenizer.
        ValueError: it cannot be read, or has neither a padding token nor an end token.
    """
    llm = llm or name_or_path
    if text_config is None:
        text_config = read_base_config(llm, cache_dir)
    tokenizer_class, post_load = resolve_llm(llm, text_config)[1]
    kwargs: dict[str, object] = {} if model_max_length is None else {"model_max_length": model_max_length}
    kwargs |= {"padding_side": padding_side, "cache_dir": cache_dir}
    tokenizer = post_load(open_tokenizer(name_or_path, tokenizer_class, **kwargs))
    if tokenizer.pad_token is None:
        raise ValueError(
            f"The tokenizer in {name_or_path!r} has neither a padding token nor an end token (eos_token); add one to "
            f"its tokenizer_config.json."
        )
    return tokenizer


def open_tokenizer(
    name_or_path: str, tokenizer_class: type[AutoTokenizer] = AutoTokenizer, **kwargs: object
) -> PreTrainedTokenizerBase:
    """Load a tokenizer without running code from its folder; `kwargs` are those of `from_pretrained`.

    Raises:
        FileNotFoundError: there is no tokenizer.
        ValueError: its files are damaged, or ask for code.
    """
    try:
        if Path(name_or_path).is_dir():
            refuse_code(Path(name_or_path))
            if not has_tokenizer(Path(name_or_path)):
                raise FileNotFoundError(name_or_path)
        tokenizer = tokenizer_class.from_pretrained(name_or_path, trust_remote_code=False, **kwargs)
        if not tokenizer("a cat").input_ids:
            raise ValueError("it returns no tokens for 'a cat'")
    except CodeRefused:
        raise
    except OSError as error:
        raise FileNotFoundError(
            f"There is no tokenizer in {name_or_path!r}: put its files (tokenizer.json, tokenizer_config.json) there, "
            f"or name another."
        ) from error
    except Exception as error:  # the tokenizers library raises plain Exceptions
        raise ValueError(
            f"The tokenizer in {name_or_path!r} cannot be read ({one_sentence(error)}); put the base model's files "
            f"(tokenizer.json, tokenizer_config.json) there."
        ) from error
    return tokenizer
