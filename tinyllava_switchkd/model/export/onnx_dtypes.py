"""Quantise the graphs of an ONNX export with onnxruntime's quantisers."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from tinyllava_switchkd.model.export.onnx_graphs import EMBED_TOKENS

if TYPE_CHECKING:
    from onnx import ModelProto

Q4_BLOCK = 32
"""Number of weights per scale in q4."""


def suffix(dtype: str) -> str:
    """The suffix of a graph's file in transformers.js: ``""`` for fp32, otherwise ``_DTYPE``."""
    return "" if dtype == "fp32" else f"_{dtype}"


def quantise(source: Path, file: Path, dtype: str, inline_bytes: int) -> bool:
    """Write a float32 graph with weights of 8 or 4 bits.

    int8: matrices and the embedding table in 8 bits with a scale per output; activations quantised dynamically.
    q4: matrices and the embedding table in 4 bits with a scale per block of 32 weights; activations not quantised.

    Args:
        source: the float32 graph.
        file: file to write.
        dtype: ``int8`` or ``q4``.
        inline_bytes: a graph with more bytes is saved with its weights in ``FILE_data``.

    Returns:
        whether the weights are in ``FILE_data``.
    """
    import onnx

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = _int8(source) if dtype == "int8" else _q4(source)
    # protobuf cannot compute the size of a model of 2 GiB or more.
    outside = sum(len(tensor.raw_data) for tensor in model.graph.initializer) >= 1 << 31
    outside = outside or model.ByteSize() > inline_bytes
    data = f"{file.name}_data"
    onnx.save(
        model,
        file,
        save_as_external_data=outside,
        **({"location": data, "all_tensors_to_one_file": True} if outside else {}),
    )
    return outside


def _int8(source: Path) -> ModelProto:
    import tempfile

    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder, "model.onnx")
        kinds = ["MatMul", "Gemm"] + (["Gather"] if source.stem == EMBED_TOKENS else [])
        root = logging.getLogger()
        level = root.level
        root.setLevel(logging.ERROR)  # it recommends a step that has no effect here, and lists every node
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
