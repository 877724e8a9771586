#!/usr/bin/env bash
# MME: bash scripts/eval/mme.sh MODEL_PATH [MODEL_NAME]
# Other settings are environment variables: docs/evaluation.md.
# shellcheck source=../launch.sh
. "$(dirname "${BASH_SOURCE[0]}")/../launch.sh"
launch eval mme "$@"
