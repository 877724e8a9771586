#!/usr/bin/env bash
# MMBench-CN: bash scripts/eval/mmbench_cn.sh MODEL_PATH [MODEL_NAME]
# Other settings are environment variables: docs/evaluation.md.
# shellcheck source=../launch.sh
. "$(dirname "${BASH_SOURCE[0]}")/../launch.sh"
launch eval mmbench_cn "$@"
