#!/usr/bin/env bash
# Switch-KD on a laptop's CPU, from the setup to a table: bash scripts/quickstart.sh [--seeds N] [--from_scratch]
#
# Sets up .venv, trains a teacher and students on scenes of real handwriting, and compares SFT, SFT with twice the steps,
# and Switch-KD. The output folder is $QUICKSTART_OUT, or playground/quickstart; finished parts in it are reused.
# TINYLLAVA_PYTHON names an interpreter with all dependencies; then no .venv is made.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"

if [ -n "${TINYLLAVA_PYTHON:-}" ]; then
    python="$TINYLLAVA_PYTHON"
else
    # shellcheck source=scripts/setup_env.sh
    source "$root/scripts/setup_env.sh"
    setup_env train,eval
    python="$root/.venv/bin/python"
fi

export HF_HUB_OFFLINE=1 OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" # models this small run fastest on one thread
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" QUICKSTART_OUT="${QUICKSTART_OUT:-$root/playground/quickstart}"
exec "$python" -m tinyllava_switchkd.quickstart.run "$@"
