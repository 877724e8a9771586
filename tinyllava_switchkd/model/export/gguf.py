"""``--to gguf``: the two files for llama.cpp and software based on it (ollama, llama-cpp-python).

``model.gguf`` holds the language model with its tokenizer and chat template, ``mmproj.gguf`` the vision tower and the
connector. Key and tensor names are those of llama.cpp 0.5.0 (``tools/mtmd/clip.cpp``, ``src/llama-arch.cpp``). Its
graph for LLaVA (``tools/mtmd/models/llava.cpp``) determines which models can be exported:

- It appends a class token to the patches but skips the first token, so the tower must not have a class token.
- It uses every patch (729 of SigLIP), as the strategy ``cls_patch`` does. A student of ``patch`` was trained with 728.
- The connector must be ``mlp2x_gelu``, or ``ldpv2`` on a grid of 24 x 24, which is hard-coded in the graph.

The numbers differ slightly from torch's: the graph uses the tanh approximation of GELU, on a CPU in half precision.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from tinyllava_switchkd.constants import DEFAULT_IMAGE_TOKEN
from tinyllava_switchkd.data.image import ImagePreprocess
from tinyllava_switchkd.data.text import TextPreprocess
from tinyllava_switchkd.io import JsonObject, write_json
from tinyllava_switchkd.model.chat import conversation_template, stop_token_ids
from tinyllava_switchkd.model.checkpoint import load_pretrained_model
from tinyllava_switchkd.model.export.base import GGUF_DTYPES
from tinyllava_switchkd.model.export.chat_template import jinja_template
from tinyllava_switchkd.model.export.files import empty_folder, require, whole_folder
from tinyllava_switchkd.model.export.hf_llava import add_image_token, generation_config_of, record_of
from tinyllava_switchkd.model.export.questions import default_questions

if TYPE_CHECKING:
    from gguf import GGMLQuantizationType, GGUFWriter
    from transformers import BaseImageProcessor, PreTrainedTokenizerBase

    from tinyllava_switchkd.model.modeling import TinyLlavaForConditionalGeneration as TinyLlava

logger = logging.getLogger(__name__)

MODEL, MMPROJ, RECORD = "model.gguf", "mmproj.gguf", "tinyllava.json"
MARKER = "<__media__>"
"""llama.cpp's mark for an image in a prompt (``mtmd_default_marker``)."""
LDPV2_SIDE = 24
"""Height and width of the patch grid in the graph of ``ldpv2``."""
MAX_NEW_TOKENS = 32

ARCHITECTURES = {"qwen2": "QWEN2", "qwen3": "QWEN3", "llama": "LLAMA"}
"""Supported model types -> their names in gguf's `MODEL_ARCH`."""

_WORDS = r"|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_ENDINGS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
SPLITS = {
    f"{_ENDINGS}{_WORDS}\\p{{N}}{_REST}": "qwen2",
    f"{_ENDINGS}{_WORDS}\\p{{N}}{{1,3}}{_REST}": "llama-bpe",
    "ByteLevel": "gpt-2",
    "Digits ByteLevel": "smollm",
}
"""How a byte-level tokenizer splits a text before merging -> llama.cpp's name for it."""

TOWER_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.out_proj": "attn_out",
    "layer_norm1": "ln1",
    "layer_norm2": "ln2",
    "mlp.fc1": "ffn_up",
    "mlp.fc2": "ffn_down",
}
CONNECTOR_NAMES = {
    "mlp2x_gelu": {"0": "mm.0", "2": "mm.2"},
    "ldpv2": {"mlp.mlp.0": "mm.model.mlp.0", "mlp.mlp.2": "mm.model.mlp.2", "peg.peg.0": "mm.model.peg.0"},
}


def to_gguf(
    source: str | os.PathLike,
    output_dir: str | os.PathLike,
    dtype: str = "f16",
    template: str | None = None,
    allow_approximate: bool = False,
    verify: bool = True,
) -> JsonObject:
    """Export a TinyLLaVA checkpoint to GGUF files.

    Args:
        source: a TinyLLaVA checkpoint of any layout, or its name on the hub.
        output_dir: an empty folder, or one that does not exist yet; written completely or not at all.
        dtype: type of the language model's matrices, one of `GGUF_DTYPES`. A matrix whose rows cannot be divided into
            quantisation blocks of 32 is f16. The other file is f32 if `dtype` is, otherwise f16. Vectors are always
            f32.
        template: conversation template; the checkpoint's own if None.
        allow_approximate: also export a model that llama.cpp computes differently, and measure how much if possible.
        verify: read the files back and compare every tensor with the checkpoint's.

    Returns:
        the content of `RECORD`: sizes, approximate parts, how to prepare images.

    Raises:
        ValueError: llama.cpp cannot run the model, or not exactly and `allow_approximate` is not set.
        ImportError: the package gguf is not installed.
    """
    require("gguf")
    if dtype not in GGUF_DTYPES:
        raise ValueError(f"--dtype must be one of {', '.join(GGUF_DTYPES)}, not {dtype!r}.")
    empty_folder(output_dir)
    model, tokenizer, image_processor, _ = load_pretrained_model(source, device="cpu", dtype=torch.float32)
    reason = why_not_gguf(model, tokenizer, image_processor)
    if reason is not None:
        raise ValueError(f"{source} cannot be exported: {reason}")
    template = template or conversation_template(model, tokenizer)
    approximate = approximate_parts(model, tokenizer)
    if approximate and not allow_approximate:
        raise ValueError(
            f"{source} cannot be exported exactly: {' '.join(approximate)} Pass --allow_approximate to export it "
            f"anyway."
        )
    record = record_of(model, tokenizer, template) | {"dtype": dtype, "images": image_note(model, image_processor)}
    if approximate:
        record["approximate"] = approximate
    if model.config.vision_feature_select_strategy == "patch":
        record["every_patch"] = _measure_every_patch(model, tokenizer, image_processor, template)
    vocabulary = _Vocabulary(model, tokenizer, template)

    language, vision = dict(language_tensors(model)), dict(vision_tensors(model))
    with whole_folder(source, output_dir) as folder:
        _write_language(model, vocabulary, language, folder / MODEL, dtype)
        _write_vision(model, image_processor, vision, folder / MMPROJ, "f32" if dtype == "f32" else "f16")
        if verify:
            verify_file(folder / MODEL, language)
            verify_file(folder / MMPROJ, vision)
        record["bytes"] = {name: (folder / name).stat().st_size for name in (MODEL, MMPROJ)}
        write_json(folder / RECORD, record)
    return record


def why_not_gguf(
    model: TinyLlava, tokenizer: PreTrainedTokenizerBase, image_processor: BaseImageProcessor
) -> str | None:
    """Why llama.cpp cannot run a model at all, in one sentence; None if it can."""
    config, text, vision = model.config, model.config.text_config, model.config.vision_config
    connector = config.connector_type.lower()
    rope = getattr(text, "rope_parameters", None) or {}
    if vision.model_type == "clip_vision_model" or getattr(model.vision_tower, "class_tokens", 0):
        return (
            f"a {type(model.vision_tower).__name__} has a class token, which llama.cpp's graph adds at the end of the "
            f"patches but skips at their start; train with a SigLIP tower."
        )
    if vision.model_type != "siglip_vision_model" or not hasattr(model.vision_tower.vision_tower, "vision_model"):
        return f"llama.cpp's graph for LLaVA has SigLIP's layers, not those of {type(model.vision_tower).__name__}."
    if vision.hidden_act != "gelu_pytorch_tanh":
        return f"llama.cpp's GELU is gelu_pytorch_tanh, but the tower's activation is {vision.hidden_act!r}."
    if vision.intermediate_size == vision.hidden_size:
        return "llama.cpp swaps the MLP layers of a tower whose intermediate_size equals its hidden_size."
    if connector not in CONNECTOR_NAMES:
        return f"llama.cpp's graph has the connectors {' and '.join(CONNECTOR_NAMES)}, not {connector!r}."
    side = vision.image_size // vision.patch_size
    if connector == "ldpv2" and side != LDPV2_SIDE:
        return f"llama.cpp's 'ldpv2' needs a grid of {LDPV2_SIDE} x {LDPV2_SIDE} patches, not of {side} x {side}."
    if text.model_type not in ARCHITECTURES:
        return f"the language model must be one of {', '.join(ARCHITECTURES)}, not {text.model_type!r}."
    if text.hidden_act != "silu":
        return f"llama.cpp's {text.model_type} has the activation silu, but this model's is {text.hidden_act!r}."
    if rope.get("rope_type", "default") != "default" or rope.get("partial_rotary_factor", 1.0) != 1.0:
        return f"only plain rotary positions can be exported, not {rope.get('rope_type')!r}."
    if "sliding_attention" in (getattr(text, "layer_types", None) or ()):
        return f"llama.cpp's {text.model_type} has full attention in every layer, but this model has sliding windows."
    steps = image_processor.to_dict()
    if steps.get("do_center_crop") or not all(steps.get(f"do_{step}") for step in ("resize", "rescale", "normalize")):
        return "llama.cpp resizes, rescales and normalises images without cropping; this image processor does not."
    return _why_not_tokenizer(model, tokenizer)


def _why_not_tokenizer(model: TinyLlava, tokenizer: PreTrainedTokenizerBase) -> str | None:
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    if backend["model"]["type"] != "BPE" or backend["model"].get("byte_fallback"):
        return "only byte-level BPE tokenizers can be exported, and this one is of another kind."
    if _split(backend) not in SPLITS:
        return "llama.cpp does not know the way in which this tokenizer splits a text into words."
    if len(tokenizer) > model.config.vocab_size:
        return f"the tokenizer has {len(tokenizer)} tokens, but the embeddings only {model.config.vocab_size} rows."
    return None


def approximate_parts(model: TinyLlava, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The parts of a model that llama.cpp computes differently, one sentence each."""
    parts = []
    if model.config.vision_feature_select_strategy == "patch":
        count = model.vision_tower.total_tokens
        parts.append(
            f"llama.cpp's graph uses all {count} patches, but this model was trained without the first "
            f"({count - 1}); train with --mm_vision_select_feature cls_patch."
        )
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    strips = [
        token["content"]
        for token in backend["added_tokens"]
        if token["lstrip"] or token["rstrip"] or token["single_word"]
    ]
    if strips:
        parts.append(
            f"The tokenizer has added tokens that absorb spaces or match only whole words ({len(strips)}, such as "
            f"{strips[-1]!r}), which llama.cpp does not support, so it tokenises text differently. "
            f"Give it token ids, as scripts/export/check_gguf.py does."
        )
    return parts


def image_note(model: TinyLlava, image_processor: BaseImageProcessor) -> str:
    """How to prepare images so that llama.cpp sees the same pixels as in training."""
    size = model.image_size
    resample = int(image_processor.to_dict().get("resample", 3))
    exact = "square ones are" if resample == 3 else f"those of {size} x {size} are"
    if model.config.image_aspect_ratio == "pad":
        return (
            f"{exact} read as in training; llama.cpp resizes others before padding them, with another grey; pad them "
            f"to a square beforehand."
        )
    return (
        f"{exact} read as in training; llama.cpp pads others to a square, which training squeezed; resize them to "
        f"{size} x {size} beforehand."
    )


def language_tensors(model: TinyLlava) -> Iterator[tuple[str, np.ndarray]]:
    """(name, values) of the language model, in float32."""
    import gguf

    text = model.config.text_config
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[ARCHITECTURES[text.model_type]], text.num_hidden_layers)
    for name, tensor in model.language_model.state_dict().items():
        if name == "lm_head.weight" and text.tie_word_embeddings:
            continue
        target = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if target is None:
            raise ValueError(f"llama.cpp's {text.model_type} does not have the weight {name}.")
        if text.model_type == "llama" and ".q_proj." in name:
            tensor = _interleaved(tensor, text.num_attention_heads)
        elif text.model_type == "llama" and ".k_proj." in name:
            tensor = _interleaved(tensor, text.num_key_value_heads)
        yield target, tensor.float().numpy()


def _interleaved(tensor: Tensor, heads: int) -> Tensor:
    """Reorder rows of queries or keys [heads * d, ...] from rotated halves to the original Llama's rotated pairs."""
    return tensor.unflatten(0, (heads, 2, -1)).transpose(1, 2).reshape(tensor.shape)


def vision_tensors(model: TinyLlava) -> Iterator[tuple[str, np.ndarray]]:
    """(name, values) of the tower's used layers and of the connector, in float32."""
    tower = model.vision_tower.vision_tower.vision_model.state_dict()
    yield "v.patch_embd.weight", tower["embeddings.patch_embedding.weight"].float().numpy()
    yield "v.patch_embd.bias", tower["embeddings.patch_embedding.bias"].float().numpy()
    yield "v.position_embd.weight", tower["embeddings.position_embedding.weight"].float().numpy()
    for layer in range(_layers(model)):
        for name, target in TOWER_NAMES.items():
            for kind in ("weight", "bias"):
                values = tower[f"encoder.layers.{layer}.{name}.{kind}"]
                yield f"v.blk.{layer}.{target}.{kind}", values.float().numpy()
    connector = model.connector._connector.state_dict()
    for name, target in CONNECTOR_NAMES[model.config.connector_type.lower()].items():
        for kind in ("weight", "bias"):
            yield f"{target}.{kind}", connector[f"{name}.{kind}"].float().numpy()


def _layers(model: TinyLlava) -> int:
    return model.vision_tower.layer_count(model.config.vision_feature_layer)


class _Vocabulary:
    """Tokens with their kinds and merges, and the chat template, as stored in GGUF."""

    def __init__(self, model: TinyLlava, tokenizer: PreTrainedTokenizerBase, template: str) -> None:
        import gguf

        backend = json.loads(tokenizer.backend_tokenizer.to_str())
        self.split = SPLITS[_split(backend)]
        names = {index: token for token, index in backend["model"]["vocab"].items()}
        kinds = dict.fromkeys(names, gguf.TokenType.NORMAL)
        for token in backend["added_tokens"]:
            if token["id"] in names and len(token["content"]) == 1 and token["content"].isascii():
                continue
            names[token["id"]] = token["content"]
            kinds[token["id"]] = gguf.TokenType.CONTROL if token["special"] else gguf.TokenType.USER_DEFINED
        count = model.config.vocab_size
        self.tokens = [names.get(index, f"[PAD{index}]") for index in range(count)]
        self.kinds = [kinds.get(index, gguf.TokenType.UNUSED) for index in range(count)]
        merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in backend["model"]["merges"]]
        # llama.cpp refuses a vocabulary without merges; a merge that makes no token has no effect.
        self.merges = merges or ["! !"]
        self.bos, self.pad = tokenizer.bos_token_id, tokenizer.pad_token_id
        add_image_token(tokenizer)
        self.chat_template = jinja_template(template, tokenizer).replace(DEFAULT_IMAGE_TOKEN, MARKER)
        stops = generation_config_of(model, tokenizer, template, 0, 0).eos_token_id
        self.stops = [stops] if isinstance(stops, int) else list(stops or [])
        if tokenizer.eos_token_id in self.stops:  # GGUF's eos token comes first
            self.stops.sort(key=lambda index: index != tokenizer.eos_token_id)


def _split(backend: JsonObject) -> str:
    """How a tokenizer splits a text: its regular expression, or the names of its pre-tokenizers."""
    steps = backend["pre_tokenizer"] or {}
    steps = steps.get("pretokenizers", [steps])
    if any(step.get("add_prefix_space") for step in steps):
        return "prefix space"
    names = " ".join(str(step.get("type")) for step in steps)
    if names == "Split ByteLevel" and steps[0]["behavior"] == "Isolated" and not steps[0]["invert"]:
        return steps[0]["pattern"].get("Regex", "")
    if names == "Digits ByteLevel" and not steps[0].get("individual_digits"):
        return ""
    return names if steps[-1].get("use_regex") else ""


def _write_language(
    model: TinyLlava, vocabulary: _Vocabulary, tensors: dict[str, np.ndarray], file: Path, dtype: str
) -> None:
    import gguf

    text = model.config.text_config
    writer = gguf.GGUFWriter(file, gguf.MODEL_ARCH_NAMES[gguf.MODEL_ARCH[ARCHITECTURES[text.model_type]]])
    writer.add_name("TinyLLaVA")
    writer.add_file_type(_file_type(dtype))
    writer.add_context_length(text.max_position_embeddings)
    writer.add_embedding_length(text.hidden_size)
    writer.add_block_count(text.num_hidden_layers)
    writer.add_feed_forward_length(text.intermediate_size)
    writer.add_head_count(text.num_attention_heads)
    writer.add_head_count_kv(text.num_key_value_heads)
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    writer.add_key_length(width)
    writer.add_value_length(width)
    writer.add_rope_dimension_count(width)
    writer.add_rope_freq_base(text.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(text.rms_norm_eps)
    writer.add_vocab_size(text.vocab_size)

    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(vocabulary.split)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.kinds)
    writer.add_token_merges(vocabulary.merges)
    if vocabulary.bos is not None:
        writer.add_bos_token_id(vocabulary.bos)
    writer.add_add_bos_token(False)  # the chat template writes it
    if vocabulary.stops:
        writer.add_eos_token_id(vocabulary.stops[0])
    if len(vocabulary.stops) > 1:
        writer.add_eot_token_id(vocabulary.stops[1])
    if vocabulary.pad is not None:
        writer.add_pad_token_id(vocabulary.pad)
    writer.add_chat_template(vocabulary.chat_template)
    _add_tensors(writer, tensors, dtype)


def _write_vision(
    model: TinyLlava, image_processor: BaseImageProcessor, tensors: dict[str, np.ndarray], file: Path, dtype: str
) -> None:
    import gguf

    config, vision, settings = model.config, model.config.vision_config, image_processor.to_dict()
    writer = gguf.GGUFWriter(file, "clip")
    writer.add_name("TinyLLaVA")
    writer.add_file_type(_file_type(dtype))
    writer.add_bool("clip.has_vision_encoder", True)
    writer.add_string("clip.projector_type", "ldpv2" if config.connector_type.lower() == "ldpv2" else "mlp")
    writer.add_bool("clip.use_gelu", True)
    writer.add_uint32("clip.vision.image_size", vision.image_size)
    writer.add_uint32("clip.vision.patch_size", vision.patch_size)
    writer.add_uint32("clip.vision.embedding_length", vision.hidden_size)
    writer.add_uint32("clip.vision.feed_forward_length", vision.intermediate_size)
    writer.add_uint32("clip.vision.projection_dim", config.hidden_size)
    writer.add_uint32("clip.vision.attention.head_count", vision.num_attention_heads)
    writer.add_float32("clip.vision.attention.layer_norm_epsilon", vision.layer_norm_eps)
    writer.add_uint32("clip.vision.block_count", _layers(model))
    # Without this, llama.cpp would skip the last layer.
    writer.add_array("clip.vision.feature_layer", [_layers(model)])
    writer.add_array("clip.vision.image_mean", [float(value) for value in settings["image_mean"]])
    writer.add_array("clip.vision.image_std", [float(value) for value in settings["image_std"]])
    _add_tensors(writer, tensors, dtype)


def _file_type(dtype: str) -> int:
    import gguf

    names = {"f32": "ALL_F32", "f16": "MOSTLY_F16", "q8_0": "MOSTLY_Q8_0", "q4_0": "MOSTLY_Q4_0"}
    return gguf.LlamaFileType[names[dtype]]


def _stored_as(name: str, shape: tuple[int, ...], dtype: str) -> GGMLQuantizationType:
    """The type that a tensor is stored in."""
    import gguf

    if name.startswith("mm.model.peg") and len(shape) == 4:
        return gguf.GGMLQuantizationType.F16  # all that llama.cpp's depth-wise convolution supports
    if len(shape) == 1 or name == "v.position_embd.weight":
        return gguf.GGMLQuantizationType.F32
    if dtype.startswith("q") and shape[-1] % 32:
        return gguf.GGMLQuantizationType.F16
    return gguf.GGMLQuantizationType[dtype.upper()]


def _add_tensors(writer: GGUFWriter, tensors: dict[str, np.ndarray], dtype: str) -> None:
    """Add all tensors and write the file."""
    import gguf

    for name, values in tensors.items():
        kind = _stored_as(name, values.shape, dtype)
        writer.add_tensor(name, gguf.quantize(np.ascontiguousarray(values), kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def verify_file(file: Path, tensors: dict[str, np.ndarray]) -> None:
    """Read a file back and compare it with the weights.

    Raises:
        ValueError: a weight is missing, or differs by more than its type's rounding.
    """
    import gguf

    found = {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}
    if found.keys() != tensors.keys():
        raise ValueError(f"{file} has missing or extra weights {sorted(found.keys() ^ tensors.keys())}; do not use it.")
    steps = {"F32": 0.0, "F16": 2.0**-11, "Q8_0": 1 / 127, "Q4_0": 1 / 8}
    for name, values in tensors.items():
        stored = gguf.dequantize(found[name].data, found[name].tensor_type).reshape(values.shape)
        allowed = steps[found[name].tensor_type.name] * float(np.abs(values).max()) + 1e-7
        if not np.abs(stored - values).max() <= allowed:
            raise ValueError(f"The weight {name} of {file} is not the checkpoint's; do not use it.")


@torch.no_grad()
def _measure_every_patch(
    model: TinyLlava, tokenizer: PreTrainedTokenizerBase, image_processor: BaseImageProcessor, template: str
) -> JsonObject:
    """Measure in torch, on `default_questions`, what using the patch that training dropped changes."""
    text, preprocess = TextPreprocess(tokenizer, template), ImagePreprocess(image_processor, model.config)
    questions, equal, difference = default_questions(), 0, 0.0
    for question in questions:
        prompt = text.prompt_ids(question.text)[None]  # [1, T]
        pixels = preprocess(question.open())[None]  # [1, 3, H, W]
        logits, answers = [], []
        for strategy in ("patch", "cls_patch"):
            model.config.vision_feature_select_strategy = strategy
            logits.append(model(prompt, images=pixels).logits[0, -1])  # [V]
            mask = torch.ones_like(prompt)
            answer = model.generate(
                prompt,
                images=pixels,
                attention_mask=mask,
                max_new_tokens=MAX_NEW_TOKENS,
                do_sample=False,
                eos_token_id=stop_token_ids(model, tokenizer, template) or None,
            )
            answers.append(answer[0].tolist())
        model.config.vision_feature_select_strategy = "patch"
        equal += answers[0] == answers[1]
        difference = max(difference, float((logits[0] - logits[1]).abs().max()))
    return {"questions": len(questions), "equal": equal, "logits": difference}
