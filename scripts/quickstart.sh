#!/usr/bin/env bash
# Switch-KD from nothing to a table, on a laptop's CPU: bash scripts/quickstart.sh [--seeds N]
#
# Sets up .venv, then trains a teacher and a student on scenes of real handwriting through scripts/train/*.sh and
# compares SFT, SFT at equal time, and Switch-KD. Everything goes to playground/quickstart, or where QUICKSTART_OUT says;
# what is there already is used again. TINYLLAVA_PYTHON, if set, is an interpreter that has everything: no .venv then.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
out="${QUICKSTART_OUT:-$root/playground/quickstart}"

if [ -n "${TINYLLAVA_PYTHON:-}" ]; then
    python="$TINYLLAVA_PYTHON"
else
    # shellcheck source=scripts/setup_env.sh
    source "$root/scripts/setup_env.sh"
    setup_env train,eval
    python="$root/.venv/bin/python"
fi

# Tiny models run fastest on one thread each; two scripts then use two cores.
export OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
QUICKSTART_OUT="$out" exec "$python" -m tinyllava_switchkd.quickstart.run "$@"
