#!/usr/bin/env bash
# Does a student give the same answers in llama.cpp as here? bash scripts/export/check_gguf.sh STUDENT [DTYPE]
#
# Exports it, creates an environment with llama-cpp-python from the package index (a compiler and CMake build llama.cpp,
# which takes minutes), and asks both the same questions.
#
#   LLAMA_ENV          the environment ($TMPDIR/env-llama, or /tmp/env-llama)
#   QUESTIONS          a question file in LLaVA's format, with IMAGE_FOLDER and MAX_QUESTIONS; default: four drawings
#   TINYLLAVA_PYTHON   an interpreter that has this package and gguf (.venv/bin/python)
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
python="${TINYLLAVA_PYTHON:-$root/.venv/bin/python}"
environment="${LLAMA_ENV:-${TMPDIR:-/tmp}/env-llama}"
if [ $# -lt 1 ]; then
    echo "error: no student given; usage: bash scripts/export/check_gguf.sh STUDENT [DTYPE]" >&2
    exit 1
fi
if ! "$environment/bin/python" -c "import llama_cpp, jinja2" 2> /dev/null; then
    "$python" -m venv "$environment"
    "$environment/bin/pip" install "llama-cpp-python>=0.3.36"
fi
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
"$python" -m tinyllava_switchkd.model.export --to gguf "$1" "$work/gguf" --dtype "${2:-f32}" --allow_approximate
questions=()
if [ -n "${QUESTIONS:-}" ]; then
    questions=(--questions "$QUESTIONS" --max_questions "${MAX_QUESTIONS:-50}")
    [ -z "${IMAGE_FOLDER:-}" ] || questions+=(--image_folder "$IMAGE_FOLDER")
fi
"$python" "$root/scripts/export/ask.py" "$1" "$work/asked" "${questions[@]}"
env -u PYTHONPATH "$environment/bin/python" "$root/scripts/export/check_gguf.py" "$work/gguf" "$work/asked"
