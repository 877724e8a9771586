"""The three graphs of an ONNX export, traced with torch's exporter: vision encoder, token embeddings, decoder.

Names, inputs and outputs are those of transformers.js and optimum, so that both can run the files unchanged.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PretrainedConfig
from transformers.cache_utils import DynamicLayer

from tinyllava_switchkd.cli import first_line
from tinyllava_switchkd.model.caches import cache_of, with_cache
from tinyllava_switchkd.model.vision_tower.transformers_towers import Siglip2VisionTower, dinov2_positions

if TYPE_CHECKING:
    from torch.onnx import ONNXProgram

    from tinyllava_switchkd.model.modeling import TinyLlavaForConditionalGeneration as TinyLlava

VISION_ENCODER, EMBED_TOKENS, DECODER = "vision_encoder", "embed_tokens", "decoder_model_merged"
GRAPHS = (VISION_ENCODER, EMBED_TOKENS, DECODER)
OPSET = 20
"""Version of the operators; onnxruntime and onnxruntime-web have both supported it for years."""
BATCH, LENGTH, PAST, TOTAL = "batch_size", "sequence_length", "past_sequence_length", "total_sequence_length"
"""Names of the dynamic axes. transformers.js uses them to create the empty cache: ``batch_size`` is the batch's size,
and unknown names are 0."""


class VisionEncoder(nn.Module):
    """Pixels [I, 3, H, W] -> visual tokens [I, K, D] for the decoder, in float32."""

    def __init__(self, model: TinyLlava) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values: Tensor) -> Tensor:
        features = self.model.encode_images(pixel_values)  # [I, K, D]
        scale = getattr(self.model.get_input_embeddings(), "embed_scale", None)
        if scale is not None:  # Gemma's, which `splice` also applies to visual tokens
            features = features * torch.as_tensor(scale, dtype=features.dtype)
        return features.float()


class EmbedTokens(nn.Module):
    """Token ids [B, L] -> embeddings [B, L, D], in float32.

    The image token's id may be beyond the table; any embedding will do, because visual tokens replace it.
    """

    def __init__(self, embeddings: nn.Embedding) -> None:
        super().__init__()
        self.embeddings = embeddings

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.embeddings(input_ids.clamp(max=len(self.embeddings.weight) - 1)).float()


class Decoder(nn.Module):
    """Embeddings and the past cache -> logits and the extended cache."""

    def __init__(self, language_model: nn.Module) -> None:
        super().__init__()
        self.language_model = language_model

    def forward(
        self,
        inputs_embeds: Tensor,
        attention_mask: Tensor,
        position_ids: Tensor,
        num_logits_to_keep: Tensor,
        *past: Tensor,
    ) -> tuple[Tensor, ...]:
        """Process L tokens after P cached ones.

        Args:
            inputs_embeds: [B, L, D].
            attention_mask: [B, P + L], 1 at tokens.
            position_ids: [B, L].
            num_logits_to_keep: scalar; number of last positions whose logits are returned, 0 for all.
            past: keys and values of each layer in turn, [B, H, P, d] each.

        Returns:
            logits [B, kept, V] in float32, then keys and values [B, H, P + L, d].
        """
        dtype = past[0].dtype
        cache = DynamicCache()
        for keys, values in zip(past[::2], past[1::2], strict=True):
            layer = DynamicLayer()
            layer.keys, layer.values, layer.is_initialized = keys, values, True
            layer.dtype, layer.device = keys.dtype, keys.device
            cache.layers.append(layer)
        length = inputs_embeds.shape[1]
        kept = torch.where(num_logits_to_keep == 0, torch.full_like(num_logits_to_keep, length), num_logits_to_keep)
        count = kept.item()
        torch._check(count >= 0)
        outputs = self.language_model(
            inputs_embeds=inputs_embeds.to(dtype),
            attention_mask=attention_masks(self.language_model.config, attention_mask, past[0].shape[2], length, dtype),
            position_ids=position_ids,
            **with_cache(cache),
            use_cache=True,
            logits_to_keep=torch.arange(count) + (length - count),
        )
        grown = cache_of(outputs)
        assert grown is not None  # because of use_cache
        present = [tensor for layer in grown.layers for tensor in (layer.keys, layer.values)]
        return (outputs.logits.float(), *present)


def attention_masks(
    config: PretrainedConfig, attention_mask: Tensor, past: int, length: int, dtype: torch.dtype
) -> Tensor | dict[str, Tensor]:
    """Masks that are added to the attention scores, [B, 1, L, P + L]; by kind of layer if layers differ.

    transformers' own masks depend on the values in the batch and are omitted where possible, which a graph cannot do.
    """
    query = torch.arange(length)[:, None] + past  # [L, 1]
    key = torch.arange(past + length)[None]  # [1, P + L]
    tokens = attention_mask.bool()[:, None, None]  # [B, 1, 1, P + L]

    def additive(allowed: Tensor) -> Tensor:
        return torch.where(allowed & tokens, 0.0, torch.finfo(dtype).min).to(dtype)

    causal = key <= query  # [L, P + L]
    window = getattr(config, "sliding_window", None)
    if not window:
        return additive(causal)
    near = causal & (key > query - window)
    kinds = getattr(config, "layer_types", None)
    if not kinds:
        return additive(near)
    masks = {"full_attention": additive(causal), "sliding_attention": additive(near)}
    return {kind: masks[kind] for kind in masks if kind in kinds}


def cache_shape(config: PretrainedConfig) -> tuple[int, int]:
    """(heads, head width) of a language model's keys and values."""
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    return heads, getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def cache_names(config: PretrainedConfig, prefix: str) -> list[str]:
    """``past_key_values.0.key``, ``past_key_values.0.value``, ``past_key_values.1.key`` ..."""
    return [f"{prefix}.{layer}.{part}" for layer in range(config.num_hidden_layers) for part in ("key", "value")]


def to_half(model: nn.Module) -> None:
    """Cast a model's weights to float16, in place; buffers that are computed at load stay float32, as in transformers.

    The angles of rotary positions are such buffers; in 16 bits they would be wrong by whole turns.
    """
    computed = [
        (module, name, module._buffers[name])
        for module in model.modules()
        for name in module._non_persistent_buffers_set
        if module._buffers.get(name) is not None
    ]
    model.half()
    for module, name, buffer in computed:
        module._buffers[name] = buffer


def freeze_positions(model: TinyLlava) -> None:
    """Replace a tower's position embeddings by those for its image size, in place.

    DINOv2 and NaFlex SigLIP 2 interpolate them for every image, the latter in a Python loop. The images of an export
    all have the same size.
    """
    tower = model.vision_tower
    encoder = tower.vision_tower
    size = tower.image_size
    with torch.no_grad():
        if isinstance(tower, Siglip2VisionTower) and tower.is_naflex:
            embeddings = encoder.vision_model.embeddings
            side = size // tower.config.patch_size
            table = embeddings.position_embedding.weight.reshape(
                embeddings.position_embedding_size, embeddings.position_embedding_size, -1
            )
            positions = embeddings.resize_positional_embeddings(table, torch.tensor([[side, side]]), side * side)

            def embed(pixels: Tensor) -> Tensor:
                return embeddings.patch_embedding(tower.patches(pixels)) + positions.to(pixels.dtype)

            vars(tower)["embed"] = embed  # replaces the method
        for module in encoder.modules():
            if hasattr(module, "interpolate_pos_encoding") and isinstance(
                getattr(module, "position_embeddings", None), nn.Parameter
            ):
                side = size // module.patch_size
                positions = dinov2_positions(module.position_embeddings, side, side)
                module.position_embeddings = nn.Parameter(positions, requires_grad=False)


def trace_vision_encoder(model: TinyLlava) -> ONNXProgram:
    """The graph ``vision_encoder``: ``pixel_values`` -> ``image_features``."""
    pixels = torch.zeros(2, 3, model.image_size, model.image_size)
    return trace(VisionEncoder(model), (pixels,), ["pixel_values"], ["image_features"], ({0: BATCH},))


def trace_embed_tokens(model: TinyLlava) -> ONNXProgram:
    """The graph ``embed_tokens``: ``input_ids`` -> ``inputs_embeds``."""
    module = EmbedTokens(model.get_input_embeddings())
    ids = torch.zeros(2, 3, dtype=torch.long)
    return trace(module, (ids,), ["input_ids"], ["inputs_embeds"], ({0: BATCH, 1: LENGTH},))


def trace_decoder(model: TinyLlava) -> ONNXProgram:
    """The graph ``decoder_model_merged``; its cache has the weights' dtype, everything else is float32."""
    language_model = model.language_model
    config = language_model.config
    heads, width = cache_shape(config)
    batch, length, past = 2, 3, 5
    names = cache_names(config, "past_key_values")
    inputs = (
        torch.zeros(batch, length, config.hidden_size),
        torch.ones(batch, past + length, dtype=torch.long),
        torch.arange(past, past + length)[None].repeat(batch, 1),
        torch.tensor(1),
        *(torch.zeros(batch, heads, past, width, dtype=language_model.dtype) for _ in names),
    )
    axes: Sequence[object] = (
        {0: BATCH, 1: LENGTH},
        {0: BATCH, 1: TOTAL},
        {0: BATCH, 1: LENGTH},
        {},
        tuple({0: BATCH, 2: PAST} for _ in names),
    )
    return trace(
        Decoder(language_model),
        inputs,
        ["inputs_embeds", "attention_mask", "position_ids", "num_logits_to_keep", *names],
        ["logits", *cache_names(config, "present")],
        axes,
    )


def trace(
    module: nn.Module,
    inputs: tuple[Tensor, ...],
    input_names: Sequence[str],
    output_names: Sequence[str],
    axes: Sequence[object],
) -> ONNXProgram:
    """A module as an `onnx_ir.Model`, which shares the module's weights until it is written.

    Raises:
        ValueError: torch's exporter cannot trace the module.
    """
    with torch.no_grad(), _quiet():
        try:
            program = torch.onnx.export(
                module.eval(),
                inputs,
                dynamo=True,
                input_names=list(input_names),
                output_names=list(output_names),
                dynamic_shapes=axes,
                opset_version=OPSET,
                verbose=False,
            )
        except torch.onnx.errors.OnnxExporterError as error:
            reason = first_line(error.__cause__ or error)
            raise ValueError(f"torch's ONNX exporter cannot trace the {type(module).__name__}: {reason}") from error
    return program.model


def write_graph(graph: ONNXProgram, file: Path, inline_bytes: int) -> bool:
    """Write a graph; if its weights have more than `inline_bytes`, they go into ``FILE_data`` beside it.

    Returns:
        whether the weights are in ``FILE_data``.
    """
    import onnx_ir

    for node in graph.graph.all_nodes():  # drop the source locations, which can outweigh a small graph
        node.metadata_props.clear()
        for value in node.outputs:
            value.metadata_props.clear()
    for holder in (graph, graph.graph, *graph.graph.initializers.values()):
        holder.metadata_props.clear()
    total = sum(math.prod(value.shape) * value.dtype.itemsize for value in graph.graph.initializers.values())
    outside = total > inline_bytes
    onnx_ir.save(graph, file, external_data=f"{file.name}_data" if outside else None)
    return outside


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence the exporter's progress reports and its warnings about names of axes."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir", "torch.export")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
