#!/usr/bin/env bash
# The web demo: bash scripts/demo.sh [options of tinyllava_switchkd.serve.app, such as --port 8000]
#
# Sets up .venv and shows the quickstart's models side by side: the Switch-KD student, the SFT student and the teacher.
# Environment variables select other checkpoints (folders or hub names):
#
#   STUDENT            the model to show
#   COMPARE            models to compare with, separated by spaces; none by default if STUDENT is set
#   QUICKSTART_OUT     the quickstart's folder (playground/quickstart)
#   TINYLLAVA_PYTHON   an interpreter with all dependencies; then no .venv is made
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
out="${QUICKSTART_OUT:-$root/playground/quickstart}"

# The quickstart's first checkpoint whose name ends with $1, or nothing.
checkpoint() {
    local folder
    for folder in "$out"/checkpoints/*"$1"; do
        if [ -f "$folder/config.json" ]; then
            echo "$folder"
            return
        fi
    done
}

paths=()
names=()
add() { # NAME PATH
    if [ -n "$2" ]; then
        names+=("$1")
        paths+=("$2")
    fi
}

if [ -n "${STUDENT:-}" ]; then
    paths=("$STUDENT")
    for model in ${COMPARE:-}; do
        paths+=("$model")
    done
else
    student="$(checkpoint -distill)"
    if [ -z "$student" ]; then
        echo "error: there is no Switch-KD student in $out/checkpoints." >&2
        echo "Run 'bash scripts/quickstart.sh' first (a laptop's CPU is enough), or set STUDENT: STUDENT=FOLDER bash scripts/demo.sh" >&2
        exit 1
    fi
    add "Switch-KD student" "$student"
    if [ -n "${COMPARE:-}" ]; then
        for model in $COMPARE; do
            add "$(basename "$model")" "$model"
        done
    else
        add "SFT student" "$(checkpoint "$(basename "$student" | sed -E 's/.*(-seed[0-9]+)-distill$/\1/')-finetune")"
        add "Teacher" "$(checkpoint -handwriting-finetune)"
    fi
fi

if [ -n "${TINYLLAVA_PYTHON:-}" ]; then
    python="$TINYLLAVA_PYTHON"
else
    # shellcheck source=scripts/setup_env.sh
    source "$root/scripts/setup_env.sh"
    setup_env serve
    python="$root/.venv/bin/python"
fi

export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" TOKENIZERS_PARALLELISM=false
arguments=(--model_path "${paths[0]}")
if [ "${#paths[@]}" -gt 1 ]; then
    arguments+=(--compare "${paths[@]:1}")
fi
if [ "${#names[@]}" -gt 0 ]; then
    arguments+=(--names "${names[@]}")
fi
exec "$python" -m tinyllava_switchkd.serve.app "${arguments[@]}" "$@"
