#!/usr/bin/env bash
# GQA: bash scripts/eval/gqa.sh MODEL_PATH [MODEL_NAME]
# Other settings are environment variables: docs/evaluation.md.
# shellcheck source=../launch.sh
. "$(dirname "${BASH_SOURCE[0]}")/../launch.sh"
launch eval gqa "$@"
