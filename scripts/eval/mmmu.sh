#!/usr/bin/env bash
# MMMU (val): bash scripts/eval/mmmu.sh MODEL_PATH [MODEL_NAME]
# The environment decides about the rest, see common.sh.
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"
evaluate mmmu MMMU - "$@"
