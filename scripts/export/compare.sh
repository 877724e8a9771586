# shellcheck shell=bash
# Sourced by check_gguf.sh, check_openvino.sh and check_vllm.sh: asks a student and its export the same questions.
#
#   QUESTIONS          a question file in LLaVA's format, with IMAGE_FOLDER and MAX_QUESTIONS; default: four drawings
#   TINYLLAVA_PYTHON   an interpreter that has this package (.venv/bin/python)
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
python="${TINYLLAVA_PYTHON:-$root/.venv/bin/python}"
if [ $# -lt 1 ]; then
    echo "error: no student given; usage: bash $0 STUDENT" >&2
    exit 1
fi

compare() { # TARGET STUDENT ENVIRONMENT CHECK [options of the export]
    local questions=()
    work="$(mktemp -d)"
    trap 'rm -rf "$work"' EXIT
    export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
    "$python" -m tinyllava_switchkd.model.export --to "$1" "$2" "$work/export" "${@:5}"
    if [ -n "${QUESTIONS:-}" ]; then
        questions=(--questions "$QUESTIONS" --max_questions "${MAX_QUESTIONS:-50}")
        [ -z "${IMAGE_FOLDER:-}" ] || questions+=(--image_folder "$IMAGE_FOLDER")
    fi
    "$python" "$root/scripts/export/ask.py" "$2" "$work/asked" "${questions[@]}"
    env -u PYTHONPATH "$3/bin/python" "$root/scripts/export/$4" "$work/export" "$work/asked"
}
