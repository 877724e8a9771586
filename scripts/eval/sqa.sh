#!/usr/bin/env bash
# ScienceQA-IMG: bash scripts/eval/sqa.sh MODEL_PATH [MODEL_NAME]
# The environment decides about the rest, see common.sh.
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"
evaluate scienceqa scienceqa - "$@"
