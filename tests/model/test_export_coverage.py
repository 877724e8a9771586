"""Makes the table in docs/export.md of the parts that each target supports.

A cell says "yes (tested)" only if a test in this folder exports a student with that part and compares its answers;
"refused" is the target's own error. ``python -m tests.model.test_export_coverage`` writes the table. To add a target,
add a column: a function from (kind, name, arguments) to a cell.
"""

from pathlib import Path

import pytest

from tests.data import tokenizers
from tests.model import test_export
from tests.tiny import tiny_llava, tiny_tokenizer
from tinyllava_switchkd.model.export import why_not_llava

PAGE = Path(__file__).parents[2] / "docs" / "export.md"
BEGIN, END = "<!-- begin: coverage -->", "<!-- end: coverage -->"

DEFAULTS = {"tower": "siglip", "connector": "mlp2x_gelu", "llm": "qwen2"}
QFORMER = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
PARTS = {
    ("tower", "siglip"): ("SigLIP, SigLIP 2 (fixed size)", {}),
    ("tower", "siglip2"): ("SigLIP 2 (NaFlex)", {}),
    ("tower", "clip"): ("CLIP", {}),
    ("tower", "dinov2"): ("DINOv2", {}),
    ("tower", "timm"): ("timm", {}),
    ("tower", "open_clip"): ("open_clip", {}),
    ("tower", "mof"): ("mof (CLIP and DINOv2)", {}),
    ("connector", "mlp2x_gelu"): ("mlp2x_gelu", {}),
    ("connector", "linear"): ("linear, mlp1x_gelu", {}),
    ("connector", "mlp3x_gelu"): ("mlp3x_gelu", {}),
    ("connector", "ldpv2"): (
        "ldpv2",
        {"vision_feature_select_strategy": "cls_patch", "vision": {"image_size": 96, "patch_size": 4}},
    ),
    ("connector", "resampler"): ("resampler", {}),
    ("connector", "qformer"): ("qformer", {"qformer_config": QFORMER}),
    ("llm", "qwen2"): ("Qwen2, Qwen2.5", {}),
    ("llm", "qwen3"): ("Qwen3", {}),
    ("llm", "llama"): ("Llama, TinyLlama, SmolLM2", {}),
    ("llm", "phi"): ("Phi", {}),
    ("llm", "phi3"): ("Phi-3, Phi-4", {"text": {"pad_token_id": 0, "tie_word_embeddings": False}}),
    ("llm", "gemma"): ("Gemma", {}),
    ("llm", "stablelm"): ("StableLM", {}),
}


def is_exported_by(cases, kind, name):
    """Whether one of the cases (arguments of a tiny student) has the part."""
    return any(arguments.get(kind, DEFAULTS[kind]) == name for arguments in cases)


def hf_llava(kind, name, arguments):
    reason = why_not_llava(tiny_llava(**{kind: name}, **arguments))
    if reason is not None:
        return f"refused: {reason.rstrip('.')}"
    assert is_exported_by((arguments for arguments, _ in test_export.CASES.values()), kind, name), name
    return "yes (tested)"


def onnx(kind, name, arguments):
    from tests.model import test_export_onnx

    assert is_exported_by(test_export_onnx.CASES.values(), kind, name), name
    return "yes (tested)"


def gguf(kind, name, arguments):
    from tests.model import test_export_gguf
    from tinyllava_switchkd.model.export.gguf import approximate_parts, why_not_gguf

    model = tiny_llava(**{kind: name}, **{**test_export_gguf.EVERY_PATCH, **arguments})
    tokenizer, processor = tiny_tokenizer(), model.vision_tower.image_processor
    reason = why_not_gguf(model, tokenizer, processor)
    if reason is not None:
        return f"refused: {reason.rstrip('.')}"
    assert is_exported_by(test_export_gguf.CASES.values(), kind, name), name
    assert not approximate_parts(model, tokenizer)
    cell = "yes (tested)"
    if kind == "tower":
        model.config.vision_feature_select_strategy = "patch"
        assert approximate_parts(model, tokenizer)
        cell += ", trained with `cls_patch`"
    if name == "llama":
        assert "byte-level" in why_not_gguf(model, tokenizers.llama(legacy=True), processor)
        cell += "; refused with a SentencePiece tokenizer (Llama 2, TinyLlama)"
    return cell


TARGETS = {"hf-llava": hf_llava, "onnx": onnx, "gguf": gguf}


def table():
    """The page's table, in Markdown."""
    lines = [("part", *TARGETS), ("---",) * (1 + len(TARGETS))]
    for (kind, name), (words, arguments) in PARTS.items():
        lines.append((words, *(cell(kind, name, arguments) for cell in TARGETS.values())))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def test_the_page_says_what_is_tested():
    pytest.importorskip("gguf")
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    text = PAGE.read_text(encoding="utf-8")
    assert text.split(BEGIN)[1].split(END)[0].strip() == table()


if __name__ == "__main__":
    page = PAGE.read_text(encoding="utf-8")
    head, rest = page.split(BEGIN)
    PAGE.write_text(f"{head}{BEGIN}\n{table()}\n{END}{rest.split(END)[1]}", encoding="utf-8")
