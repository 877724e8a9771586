#!/usr/bin/env bash
# GQA: bash scripts/eval/gqa.sh MODEL_PATH [MODEL_NAME]
# The environment decides about the rest, see common.sh.
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"
evaluate gqa gqa - "$@"
