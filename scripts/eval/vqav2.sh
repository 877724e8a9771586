#!/usr/bin/env bash
# VQAv2 (val; SPLIT=test-dev for the server's): bash scripts/eval/vqav2.sh MODEL_PATH [MODEL_NAME]
# Other settings are environment variables: docs/evaluation.md.
# shellcheck source=../launch.sh
. "$(dirname "${BASH_SOURCE[0]}")/../launch.sh"
launch eval vqav2 "$@"
