#!/usr/bin/env bash
# POPE: bash scripts/eval/pope.sh MODEL_PATH [MODEL_NAME]
# The environment decides about the rest, see common.sh.
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"
evaluate pope pope - "$@"
