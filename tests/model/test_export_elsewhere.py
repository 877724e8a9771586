"""A student in llama.cpp, vLLM and OpenVINO: the scripts of scripts/export that make an environment each and ask it.

Each test runs where its variable names an environment (which the script makes if it is not there):
``VLLM_ENV=/tmp/env-vllm python -m pytest tests/model/test_export_elsewhere.py``.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.model.test_export import write

SCRIPTS = Path(__file__).parents[2] / "scripts" / "export"
LLAVA = {
    "SigLIP without its first patch": {},
    "CLIP, Llama, pad": {"llm": "llama", "tower": "clip", "template": "llama", "image_aspect_ratio": "pad"},
}
CASES = [("vllm", "VLLM_ENV", case) for case in LLAVA.values()] + [
    *(("openvino", "OPENVINO_ENV", case) for case in LLAVA.values()),
    ("gguf", "LLAMA_ENV", {"vision_feature_select_strategy": "cls_patch"}),
]


@pytest.mark.slow
@pytest.mark.parametrize(("target", "variable", "arguments"), CASES)
def test_the_same_answers(target, variable, arguments, tmp_path):
    if not os.environ.get(variable):
        pytest.skip(f"needs {variable}")
    write(tmp_path / "student", text={"hidden": 128}, **arguments)  # heads of 32, which vLLM has on CPUs
    command = ["bash", str(SCRIPTS / f"check_{target}.sh"), str(tmp_path / "student")]
    result = subprocess.run(
        command, env=os.environ | {"TINYLLAVA_PYTHON": sys.executable}, capture_output=True, text=True
    )
    assert result.returncode == 0, (result.stdout[-2000:], result.stderr[-3000:])
