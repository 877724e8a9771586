#!/usr/bin/env bash
# Evaluation data in LLaVA's layout: bash scripts/data/prepare_eval.sh [BENCH ...|all] [options of ...eval.prepare]
#
#   EVAL_DIR    the output folder (playground/data/eval)
#   PYTHON      the interpreter
#   HF_ENDPOINT a mirror of the Hugging Face hub
#
# BENCH: mme mmbench mmbench_cn vqav2 gqa scienceqa mmmu textvqa vizwiz pope; all of them by default.
# If it was interrupted, run it again. --check only lists what is there and what is missing.
set -euo pipefail
REPO="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
PYTHON="${PYTHON:-$(command -v python || command -v python3)}"
export PYTHONPATH="$REPO${PYTHONPATH:+:$PYTHONPATH}"
case "${1:-}" in
    "" | -*) set -- all "$@" ;;
esac
exec "$PYTHON" -m tinyllava_switchkd.eval.prepare "$@" --eval_dir "${EVAL_DIR:-$REPO/playground/data/eval}"
