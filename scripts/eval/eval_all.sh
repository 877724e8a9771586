#!/usr/bin/env bash
# All benchmarks that have data, one after another, then the report: bash scripts/eval/eval_all.sh MODEL_PATH [MODEL_NAME]
# The environment decides about the rest: docs/evaluation.md. A benchmark that fails does not stop the others.
# shellcheck source=../launch.sh
. "$(dirname "${BASH_SOURCE[0]}")/../launch.sh"
launch eval all "$@"
