#!/usr/bin/env bash
# TextVQA (val): bash scripts/eval/textvqa.sh MODEL_PATH [MODEL_NAME]
# The environment decides about the rest, see common.sh.
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"
evaluate textvqa textvqa - "$@"
