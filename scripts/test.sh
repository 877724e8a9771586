#!/usr/bin/env bash
# Sets everything up in .venv and runs the tests: bash scripts/test.sh [pytest arguments]
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/setup_env.sh
setup_env dev

export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
# Tiny models run fastest on one thread each; two processes then use two cores.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"

ruff check .
ruff format --check .
mypy
exec python -m pytest -n "${PYTEST_WORKERS:-2}" --dist loadgroup "$@"
