#!/usr/bin/env bash
# VQAv2 (val; SPLIT=test-dev for the server's): bash scripts/eval/vqav2.sh MODEL_PATH [MODEL_NAME]
# The environment decides about the rest, see common.sh.
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"
evaluate vqav2 vqav2 json "$@"
