#!/usr/bin/env bash
# MMBench (English): bash scripts/eval/mmbench.sh MODEL_PATH [MODEL_NAME]
# The environment decides about the rest, see common.sh.
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"
evaluate mmbench mmbench xlsx "$@"
