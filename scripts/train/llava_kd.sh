#!/bin/bash
# LLaVA-KD, the teacher's two stages and the student's three (DPT, SFT, DFT): the recipe llava_kd.
# Run it again to go on; TEACHER_PATH names a teacher that is trained already. Settings: docs/train.md.
# shellcheck source=../launch.sh
. "$(dirname "${BASH_SOURCE[0]}")/../launch.sh"
launch train --recipe llava_kd "$@"
