#!/usr/bin/env bash
# Switch-KD from nothing to a table, on a laptop's CPU: bash scripts/quickstart.sh [--seeds N] [--from_scratch]
#
# Sets up .venv, then trains a teacher and a student on scenes of real handwriting and compares SFT, SFT of twice the
# steps, and Switch-KD. Everything goes to playground/quickstart, or where QUICKSTART_OUT says; what is there already is
# used again. TINYLLAVA_PYTHON, if set, is an interpreter that has everything: no .venv then.
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
