#!/usr/bin/env bash
# VizWiz (val; SPLIT=test for the server's): bash scripts/eval/vizwiz.sh MODEL_PATH [MODEL_NAME]
# Other settings are environment variables: docs/evaluation.md.
# shellcheck source=../launch.sh
. "$(dirname "${BASH_SOURCE[0]}")/../launch.sh"
launch eval vizwiz "$@"
