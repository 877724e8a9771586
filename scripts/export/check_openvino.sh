#!/usr/bin/env bash
# Does a student give the same answers in OpenVINO as here? bash scripts/export/check_openvino.sh STUDENT
#
# Exports it, creates an environment with optimum-intel and OpenVINO from the package index (about 6 GB), and asks both
# the same questions.
#
#   OPENVINO_ENV       the environment ($TMPDIR/env-openvino, or /tmp/env-openvino)
#   QUESTIONS          a question file in LLaVA's format, with IMAGE_FOLDER and MAX_QUESTIONS; default: four drawings
#   TINYLLAVA_PYTHON   an interpreter that has this package (.venv/bin/python)
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
python="${TINYLLAVA_PYTHON:-$root/.venv/bin/python}"
environment="${OPENVINO_ENV:-${TMPDIR:-/tmp}/env-openvino}"
if [ $# -lt 1 ]; then
    echo "error: no student given; usage: bash scripts/export/check_openvino.sh STUDENT" >&2
    exit 1
fi
if ! "$environment/bin/python" -c "import optimum.intel, openvino" 2> /dev/null; then
    "$python" -m venv "$environment"
    "$environment/bin/pip" install "optimum-intel[openvino]>=2.2"
fi
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
"$python" -m tinyllava_switchkd.model.export --to hf-llava "$1" "$work/hf"
questions=()
if [ -n "${QUESTIONS:-}" ]; then
    questions=(--questions "$QUESTIONS" --max_questions "${MAX_QUESTIONS:-50}")
    [ -z "${IMAGE_FOLDER:-}" ] || questions+=(--image_folder "$IMAGE_FOLDER")
fi
"$python" "$root/scripts/export/ask.py" "$1" "$work/asked" "${questions[@]}"
env -u PYTHONPATH "$environment/bin/python" "$root/scripts/export/check_openvino.py" "$work/hf" "$work/asked"
