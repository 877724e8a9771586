"""``--to onnx``: three graphs and their files in transformers.js's layout, for onnxruntime and browsers.

The graphs are ``onnx/vision_encoder`` (pixels -> visual tokens, connector included), ``onnx/embed_tokens`` and
``onnx/decoder_model_merged`` (with a key-value cache), each with the suffix of its precision. All registered towers,
connectors and language models can be exported, because the graphs are traced.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from tinyllava_switchkd.constants import IMAGE_TOKEN_INDEX
from tinyllava_switchkd.data.text import TextPreprocess
from tinyllava_switchkd.io import JsonObject, read_json, write_json
from tinyllava_switchkd.model.chat import conversation_template, stop_token_ids
from tinyllava_switchkd.model.checkpoint import load_pretrained_model
from tinyllava_switchkd.model.export.base import ONNX_DTYPES
from tinyllava_switchkd.model.export.chat_template import jinja_template
from tinyllava_switchkd.model.export.files import empty_folder, require, tokenizer_settings, whole_folder
from tinyllava_switchkd.model.export.hf_llava import RECORD, add_image_token, generation_config_of, record_of
from tinyllava_switchkd.model.export.onnx_dtypes import quantise, suffix
from tinyllava_switchkd.model.export.onnx_graphs import (
    DECODER,
    EMBED_TOKENS,
    GRAPHS,
    VISION_ENCODER,
    cache_shape,
    freeze_positions,
    to_half,
    trace_decoder,
    trace_embed_tokens,
    trace_vision_encoder,
    write_graph,
)
from tinyllava_switchkd.model.export.onnx_student import OnnxStudent
from tinyllava_switchkd.model.export.questions import Question, default_questions
from tinyllava_switchkd.model.saving import save_image_processor

if TYPE_CHECKING:
    from transformers import BaseImageProcessor, PreTrainedTokenizerBase

    from tinyllava_switchkd.model.modeling import TinyLlavaForConditionalGeneration as TinyLlava

logger = logging.getLogger(__name__)


INLINE_BYTES = 1_800_000_000
"""Larger weights go into a separate file, because a protobuf file holds at most 2 GiB."""
MEASURED = "measured.json"
"""File of an export with the results of the comparison with its checkpoint."""
TOLERANCE = 1e-4
"""Allowed difference between logits in float32 if they are at most 10; scaled with the largest logit beyond that."""
MAX_NEW_TOKENS = 32


def to_onnx(
    source: str | os.PathLike,
    output_dir: str | os.PathLike,
    dtypes: Sequence[str] = ("fp32",),
    template: str | None = None,
    allow_approximate: bool = False,
    verify: bool = True,
    questions: Sequence[Question] | None = None,
    inline_bytes: int = INLINE_BYTES,
) -> JsonObject:
    """Export a TinyLLaVA checkpoint to ONNX graphs.

    Args:
        source: a TinyLLaVA checkpoint of any layout, or its name on the hub.
        output_dir: an empty folder, or one that does not exist yet; written completely or not at all.
        dtypes: of `ONNX_DTYPES`.
        template: conversation template; the checkpoint's own if None.
        allow_approximate: also export a model that a graph cannot represent exactly.
        verify: compare the graphs with the checkpoint.
        questions: questions for the comparison; `default_questions` if None.
        inline_bytes: see `INLINE_BYTES`.

    Returns:
        dtype -> results of the comparison; empty without `verify`.

    Raises:
        ValueError: a graph cannot represent the model, or the graphs compute something else.
        ImportError: the packages of the extra ``export`` are not installed.
    """
    require("onnx", "onnxscript", "onnxruntime")
    unknown = [dtype for dtype in dtypes if dtype not in ONNX_DTYPES]
    if unknown or not dtypes:
        raise ValueError(f"--dtype is one or more of {', '.join(ONNX_DTYPES)}, not {', '.join(unknown) or 'none'}.")
    empty_folder(output_dir)
    model, tokenizer, image_processor, _ = load_pretrained_model(source, device="cpu", dtype=torch.float32)
    template = template or conversation_template(model, tokenizer)
    approximate = approximate_parts(model)
    if approximate and not allow_approximate:
        raise ValueError(
            f"{source} cannot be exported exactly: {' '.join(approximate)} Pass --allow_approximate to export it "
            f"anyway and see how much the results differ."
        )
    for part in approximate:
        logger.warning("Approximate: %s", part)
    record = (
        record_of(model, tokenizer, template)
        | {"dtypes": list(dtypes)}
        | ({"approximate": approximate} if approximate else {})
    )
    expected = _Original(model, tokenizer, image_processor, template, questions) if verify else None
    image_token = add_image_token(tokenizer)
    tokenizer.chat_template = jinja_template(template, tokenizer)

    if approximate:
        _make_static(model)
    freeze_positions(model)
    with whole_folder(source, output_dir) as folder:
        outside = _write_graphs(model, folder / "onnx", dtypes, inline_bytes)
        config = _config(model, image_token, dtypes, outside) | {RECORD: record}
        write_json(folder / "config.json", config, sort_keys=True)
        rows = model.config.vocab_size  # the graphs' logits have no column for the image token
        generation_config_of(model, tokenizer, template, image_token, rows).save_pretrained(folder)
        _write_tokenizer(tokenizer, folder)
        save_image_processor(image_processor, folder)
        file = folder / "preprocessor_config.json"  # where transformers.js's AutoProcessor looks up the processor
        write_json(file, read_json(file) | {"processor_class": "LlavaProcessor"}, sort_keys=True)
        write_json(folder / "processor_config.json", _processor_config(model), sort_keys=True)
        measured = {}
        if expected is not None:
            for dtype in dtypes:
                measured[dtype] = expected.compare(OnnxStudent(folder, dtype), dtype, exact=not approximate)
                measured[dtype]["bytes"] = size_of(folder, dtype)
            write_json(folder / MEASURED, measured)
    return measured


def sentence(found: JsonObject) -> str:
    """The results of `to_onnx` for one precision, in words."""
    return (
        f"{found['bytes'] / 1e6:.1f} MB, {found['equal']} of {found['questions']} answers equal, "
        f"logits within {found['logits']:.2g}"
    )


def approximate_parts(model: TinyLlava) -> list[str]:
    """The parts of a model that a graph cannot compute exactly, one sentence each."""
    rope = getattr(model.config.text_config, "rope_parameters", None) or {}
    kinds = {rope.get("rope_type", "default")} | {
        value.get("rope_type", "default") for value in rope.values() if isinstance(value, dict)
    }
    return [
        f"The language model's position angles ({kind!r}) depend on the sequence length, but a graph has fixed ones."
        for kind in sorted(kinds)
        if kind == "longrope" or "dynamic" in kind
    ]


def _make_static(model: TinyLlava) -> None:
    """Fix the position angles, in place, at those of short sequences."""
    for module in model.language_model.modules():
        kinds = getattr(module, "rope_type", None)
        if kinds is None:
            continue
        module.rope_type = "default" if isinstance(kinds, str) else dict.fromkeys(kinds, "default")
        for name, angles in dict(module.named_buffers(recurse=False)).items():
            if name.endswith("original_inv_freq"):  # the current ones are those of the last sequence
                setattr(module, name.replace("original_", ""), angles.clone())


def size_of(folder: Path, dtype: str) -> int:
    """Bytes of the three graphs of one precision, weights included."""
    return sum(
        file.stat().st_size for name in GRAPHS for file in (folder / "onnx").glob(f"{name}{suffix(dtype)}.onnx*")
    )


def _write_graphs(model: TinyLlava, folder: Path, dtypes: Sequence[str], inline_bytes: int) -> dict[str, int]:
    """Write every graph in every precision.

    Returns:
        ``{file: 1}`` for each graph with its weights in a separate file.
    """
    folder.mkdir()
    traces = {VISION_ENCODER: trace_vision_encoder, EMBED_TOKENS: trace_embed_tokens, DECODER: trace_decoder}
    outside = {}
    if set(dtypes) - {"fp16"}:
        for name, trace in traces.items():
            source = folder / f"{name}.onnx"
            outside[source.name] = write_graph(trace(model), source, inline_bytes)
            for dtype in set(dtypes) - {"fp32", "fp16"}:
                file = folder / f"{name}{suffix(dtype)}.onnx"
                outside[file.name] = quantise(source, file, dtype, inline_bytes)
            if "fp32" not in dtypes:  # it was only needed to quantise
                source.unlink()
                (folder / f"{source.name}_data").unlink(missing_ok=True)
    if "fp16" in dtypes:
        to_half(model)
        for name, trace in traces.items():
            file = folder / f"{name}{suffix('fp16')}.onnx"
            outside[file.name] = write_graph(trace(model), file, inline_bytes)
    return {name: 1 for name, is_outside in sorted(outside.items()) if is_outside and (folder / name).exists()}


def _config(model: TinyLlava, image_token: int, dtypes: Sequence[str], outside: dict[str, int]) -> JsonObject:
    """``config.json``, as a LLaVA's for transformers.js, which runs any graphs."""
    config = model.config
    text, vision = config.text_config.to_dict(), config.vision_config.to_dict()
    for part in (text, vision):
        for name in ("model_name_or_path", "model_name_or_path2", "_name_or_path"):
            part.pop(name, None)
    text["num_key_value_heads"], text["head_dim"] = cache_shape(config.text_config)
    settings: JsonObject = {"dtype": dtypes[0]}
    if outside:
        settings["use_external_data_format"] = outside
    return {
        "architectures": ["LlavaForConditionalGeneration"],
        "model_type": "llava",
        "image_token_index": image_token,
        "image_seq_length": model.num_image_tokens,
        "text_config": text,
        "vision_config": vision,
        "transformers.js_config": settings,
    }


def _processor_config(model: TinyLlava) -> JsonObject:
    """``processor_config.json``. LLaVA's processors count patches; the rest of our tokens are "additional" ones."""
    patch = getattr(model.config.vision_config, "patch_size", None) or model.image_size
    return {
        "processor_class": "LlavaProcessor",
        "image_token": "<image>",
        "patch_size": patch,
        "num_additional_image_tokens": model.num_image_tokens - (model.image_size // patch) ** 2,
        "vision_feature_select_strategy": "full",
    }


def _write_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write the tokenizer, and its chat template also to the file that all versions of transformers.js read."""
    tokenizer.save_pretrained(folder)
    fields = tokenizer_settings(folder) | {"chat_template": tokenizer.chat_template}
    fields.pop("processor_class", None)
    write_json(folder / "tokenizer_config.json", fields, sort_keys=True)


class _Original:
    """The checkpoint's answers, computed before its weights are changed for the graphs."""

    def __init__(
        self,
        model: TinyLlava,
        tokenizer: PreTrainedTokenizerBase,
        image_processor: BaseImageProcessor,
        template: str,
        questions: Sequence[Question] | None,
    ) -> None:
        from tinyllava_switchkd.data.image import ImagePreprocess

        self.questions = list(questions or default_questions())
        preprocess = ImagePreprocess(image_processor, model.config)
        text = TextPreprocess(tokenizer, template)
        self.prompts, self.pixels, self.answers = [], [], []
        self.stops = set(stop_token_ids(model, tokenizer, template))
        with torch.no_grad():
            for index, question in enumerate(self.questions):
                prompt = text.prompt_ids(question.text)[None]  # [1, T]
                pixels = preprocess(question.open())[None]  # [1, 3, H, W]
                if index == 0:
                    self.logits = model(prompt, images=pixels).logits[0].numpy()  # [L, V]
                answer = model.generate(
                    prompt,
                    images=pixels,
                    attention_mask=torch.ones_like(prompt),
                    max_new_tokens=MAX_NEW_TOKENS,
                    do_sample=False,
                    eos_token_id=sorted(self.stops) or None,
                )[0].tolist()
                self.prompts.append(prompt[0].tolist())
                self.pixels.append(pixels.numpy())
                self.answers.append(answer)

    def compare(self, student: OnnxStudent, dtype: str, exact: bool) -> JsonObject:
        """Compare the answers of an export.

        Raises:
            ValueError: its tokens or pixels differ, its logits are not finite, or it should be exact and is not.
        """
        token, count = student.config["image_token_index"], student.config["image_seq_length"]
        equal = 0
        difference = 0.0
        for index, (question, prompt, pixels, answer) in enumerate(
            zip(self.questions, self.prompts, self.pixels, self.answers, strict=True)
        ):
            ids = student.prompt_ids(question.text)
            ours = [i for piece in prompt for i in ([token] * count if piece == IMAGE_TOKEN_INDEX else [piece])]
            if ids != ours:
                raise ValueError(f"The export tokenises the prompt {question.text!r} differently.")
            if not np.array_equal(student.pixels([question.open()]), pixels):
                raise ValueError(f"The export makes other pixels of the image of {question.text!r}.")
            if index == 0:
                logits = student.logits([ids], pixels)[0]
                if not np.isfinite(logits).all():
                    raise ValueError(
                        f"The model computes numbers that {dtype} cannot represent: its logits are NaN or infinite; "
                        f"leave {dtype} out of --dtype."
                    )
                difference = float(np.abs(logits - self.logits).max())
            found = student.generate([ids], pixels, MAX_NEW_TOKENS)[0]
            equal += found == [i for i in answer if i not in self.stops | student.stops]
        allowed = TOLERANCE * max(1.0, float(np.abs(self.logits).max()) / 10)
        if dtype == "fp32" and exact and (not difference <= allowed or equal < len(self.questions)):
            raise ValueError(
                f"The graphs compute something else: logits differ by {difference:.2g}, "
                f"{len(self.questions) - equal} of {len(self.questions)} answers differ."
            )
        return {"questions": len(self.questions), "equal": equal, "logits": difference}
