#!/usr/bin/env bash
# LLaVA-Mix-665K for fine-tuning: bash scripts/data/prepare_finetune.sh [options of tinyllava_switchkd.data.download]
#
#   DATA_DIR    root of the data (playground/data): text_files/llava_v1_5_mix665k.json, coco/, gqa/, ocr_vqa/, textvqa/, vg/
#   PYTHON      the interpreter
#   HF_ENDPOINT a mirror of the Hugging Face hub
#
# It downloads about 75 GB, and deletes an archive when all its images are unpacked (unless --keep_archives is given).
# If it was interrupted, run it again. --only coco prepares one part, --check only verifies.
set -euo pipefail
REPO="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
PYTHON="${PYTHON:-$(command -v python || command -v python3)}"
export PYTHONPATH="$REPO${PYTHONPATH:+:$PYTHONPATH}"
exec "$PYTHON" -m tinyllava_switchkd.data.download finetune --data_dir "${DATA_DIR:-$REPO/playground/data}" "$@"
