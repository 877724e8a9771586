#!/usr/bin/env bash
# LLaVA-558K for pre-training: bash scripts/data/prepare_pretrain.sh [options of tinyllava_switchkd.data.download]
#
#   DATA_DIR    root of the data (playground/data): text_files/blip_laion_cc_sbu_558k.json, llava/llava_pretrain/images
#   PYTHON      the interpreter
#   HF_ENDPOINT a mirror of the Hugging Face hub
#
# It downloads about 27 GB. If it was interrupted, run it again. --check only verifies.
set -euo pipefail
REPO="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
PYTHON="${PYTHON:-$(command -v python || command -v python3)}"
export PYTHONPATH="$REPO${PYTHONPATH:+:$PYTHONPATH}"
exec "$PYTHON" -m tinyllava_switchkd.data.download pretrain --data_dir "${DATA_DIR:-$REPO/playground/data}" "$@"
