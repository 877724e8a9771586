#!/usr/bin/env bash
# ScienceQA-IMG: bash scripts/eval/sqa.sh MODEL_PATH [MODEL_NAME]
# Other settings are environment variables: docs/evaluation.md.
# shellcheck source=../launch.sh
. "$(dirname "${BASH_SOURCE[0]}")/../launch.sh"
launch eval scienceqa "$@"
