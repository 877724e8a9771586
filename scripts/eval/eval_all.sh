#!/usr/bin/env bash
# All benchmarks that have data, then the report: bash scripts/eval/eval_all.sh MODEL_PATH [MODEL_NAME]
# Other settings are environment variables: docs/evaluation.md. A failing benchmark does not stop the others.
# shellcheck source=../launch.sh
. "$(dirname "${BASH_SOURCE[0]}")/../launch.sh"
launch eval all "$@"
