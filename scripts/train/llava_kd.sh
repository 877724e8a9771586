#!/bin/bash
# LLaVA-KD, the teacher's two stages and the student's three (DPT, SFT, DFT): the recipe llava_kd.
# Run it again to resume. TEACHER_PATH names a trained teacher, if there is one. Settings: docs/train.md.
# shellcheck source=../launch.sh
. "$(dirname "${BASH_SOURCE[0]}")/../launch.sh"
launch train --recipe llava_kd "$@"
