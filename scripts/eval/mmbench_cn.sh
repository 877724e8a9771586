#!/usr/bin/env bash
# MMBench-CN: bash scripts/eval/mmbench_cn.sh MODEL_PATH [MODEL_NAME]
# The environment decides about the rest, see common.sh.
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"
evaluate mmbench_cn mmbench_cn xlsx "$@"
