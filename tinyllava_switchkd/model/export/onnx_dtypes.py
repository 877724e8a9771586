"""Smaller weights for the graphs of an ONNX export, by onnxruntime's own quantisers."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from .onnx_graphs import EMBED_TOKENS

if TYPE_CHECKING:
    from onnx import ModelProto

    from tinyllava_switchkd.model.modeling import TinyLlavaForConditionalGeneration as TinyLlava

Q4_BLOCK = 32
"""Weights that share a scale in q4."""


def suffix(dtype: str) -> str:
    """``""`` for fp32, else ``_DTYPE``: transformers.js's rule."""
    return "" if dtype == "fp32" else f"_{dtype}"


def quantise(source: Path, file: Path, dtype: str, inline_bytes: int) -> bool:
    """Write a float32 graph with weights of 8 or 4 bits.

    int8: matrices and the embedding table in 8 bits with a scale for each output, activations in 8 bits as they come.
    q4: matrices and the embedding table in blocks of 32 weights of 4 bits with a scale each, activations untouched.

    Args:
        source: the float32 graph.
        file: where to.
        dtype: ``int8`` or ``q4``.
        inline_bytes: more than that goes into ``FILE_data``.

    Returns:
        whether it did.
    """
    import onnx

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = _int8(source) if dtype == "int8" else _q4(source)
    outside = model.ByteSize() > inline_bytes if _fits_in_memory(model) else True
    data = f"{file.name}_data"
    onnx.save(
        model,
        file,
        save_as_external_data=outside,
        **({"location": data, "all_tensors_to_one_file": True} if outside else {}),
    )
    return outside


def _fits_in_memory(model: TinyLlava) -> bool:
    """Whether protobuf can count the model's bytes: not beyond 2 GiB."""
    return sum(len(tensor.raw_data) for tensor in model.graph.initializer) < 1 << 31


def _int8(source: Path) -> ModelProto:
    import tempfile

    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder, "model.onnx")
        kinds = ["MatMul", "Gemm"] + (["Gather"] if source.stem == EMBED_TOKENS else [])
        root = logging.getLogger()
        level = root.level
        root.setLevel(logging.ERROR)  # it advises a step of its own that has no effect here, and names every node
        try:
            quantize_dynamic(
                source,
                target,
                op_types_to_quantize=kinds,
                per_channel=True,
                weight_type=QuantType.QInt8,
                use_external_data_format=source.with_name(f"{source.name}_data").exists(),
            )
        finally:
            root.setLevel(level)
        return onnx.load(target)


def _q4(source: Path) -> ModelProto:
    import onnx
    from onnxruntime.quantization.matmul_nbits_quantizer import DefaultWeightOnlyQuantConfig, MatMulNBitsQuantizer

    settings = DefaultWeightOnlyQuantConfig(
        block_size=Q4_BLOCK,
        is_symmetric=True,
        accuracy_level=0,
        op_types_to_quantize=("Gather",) if source.stem == EMBED_TOKENS else ("MatMul",),
        quant_axes=(("MatMul", 0), ("Gather", 1)),
    )
    quantiser = MatMulNBitsQuantizer(onnx.load(source), algo_config=settings)
    logging.getLogger("onnxruntime.quantization.matmul_nbits_quantizer").setLevel(logging.ERROR)
    quantiser.process()
    return quantiser.model.model
