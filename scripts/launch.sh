# shellcheck shell=bash
# Sourced by the scripts of train/ and eval/, which then run `python -m tinyllava_switchkd.launch`. It reads the arguments
# and the environment variables (docs/train.md, docs/evaluation.md), finds the devices, and starts the processes.
#   PYTHON       the interpreter
#   DRY_RUN=1    print the command instead of running it
set -euo pipefail

REPO="$(cd -P "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
export PYTHON="${PYTHON:-$(command -v python || command -v python3 || echo python3)}"
if ! command -v "$PYTHON" >/dev/null; then
    echo "${0##*/}: there is no interpreter $PYTHON; set PYTHON to an existing one." >&2
    exit 1
fi
export PYTHONPATH="$REPO${PYTHONPATH:+:$PYTHONPATH}"
export TINYLLAVA_SCRIPT="$0"

launch() {
    exec "$PYTHON" -m tinyllava_switchkd.launch "$@"
}

ablate() { # a table of docs/results.md
    exec "$PYTHON" -m tinyllava_switchkd.ablations "$@"
}
