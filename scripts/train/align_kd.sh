#!/bin/bash
# Align-KD in MobileVLM V2's setting, on data that you name: the recipe align_kd.
# Run it again to go on; TEACHER_PATH names a teacher that is trained already. Settings: docs/train.md.
# shellcheck source=../launch.sh
. "$(dirname "${BASH_SOURCE[0]}")/../launch.sh"
launch train --recipe align_kd "$@"
