#!/usr/bin/env bash
# VizWiz (val; SPLIT=test for the server's): bash scripts/eval/vizwiz.sh MODEL_PATH [MODEL_NAME]
# The environment decides about the rest, see common.sh.
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"
evaluate vizwiz vizwiz json "$@"
