#!/usr/bin/env bash
# TextVQA (val) without OCR tokens: bash scripts/eval/textvqa_noocr.sh MODEL_PATH [MODEL_NAME]
# Other settings are environment variables: docs/evaluation.md.
. "$(dirname "${BASH_SOURCE[0]}")/../launch.sh"
launch eval textvqa_noocr "$@"
