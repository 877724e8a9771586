#!/usr/bin/env bash
# MME: bash scripts/eval/mme.sh MODEL_PATH [MODEL_NAME]
# The environment decides about the rest, see common.sh.
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"
evaluate mme MME - "$@"
