#!/bin/bash
# Align-KD in MobileVLM V2's setting, on your data: the recipe align_kd.
# Run it again to resume. TEACHER_PATH names a trained teacher, if there is one. Settings: docs/train.md.
# shellcheck source=../launch.sh
. "$(dirname "${BASH_SOURCE[0]}")/../launch.sh"
launch train --recipe align_kd "$@"
