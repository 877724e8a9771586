"""The Auto classes know TinyLLaVA after ``import tinyllava_switchkd``, in any order, without importing torch."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
CHECKPOINT = "tests/fixtures/upstream/ckpt_siglip_patch"


def run(code):
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
    return result.stdout


def test_importing_the_package_is_light():
    heavy = "('torch', 'transformers', 'numpy')"
    assert run(f"import sys, tinyllava_switchkd; print([m for m in {heavy} if m in sys.modules])") == "[]\n"


# Every import of torch and transformers costs seconds, so a process answers several questions.
QUESTIONS = f"""
import sys
config = AutoConfig.from_pretrained({str(ROOT / CHECKPOINT)!r})
model = AutoModelForCausalLM.from_pretrained({str(ROOT / CHECKPOINT)!r})
print(type(config).__name__, type(model).__name__, type(model.config).__name__)

from transformers.models.auto import configuration_auto
print(any("tinyllava" in type(finder).__module__ for finder in sys.meta_path))
print(type(configuration_auto.__spec__.loader).__name__)

from tinyllava_switchkd.model import load_pretrained_model
unwanted = ["gradio", "bitsandbytes", "timm", "open_clip", "matplotlib"]
if "Trainer" not in globals():  # transformers' own Trainer imports these
    unwanted += ["deepspeed", "peft", "pandas", "datasets"]
print([name for name in unwanted if name in sys.modules])
"""
"""Both classes load a checkpoint; the hook is gone; nothing that only training or serving needs was imported."""

ANSWERS = ["TinyLlavaConfig TinyLlavaForConditionalGeneration TinyLlavaConfig", "False", "SourceFileLoader", "[]"]


def test_auto_classes_after_the_package():
    """The other order, transformers first, is tested in the process of test_hub."""
    imports = "import tinyllava_switchkd\nfrom transformers import Trainer, AutoModelForCausalLM, AutoConfig"
    assert run(imports + QUESTIONS).splitlines() == ANSWERS
