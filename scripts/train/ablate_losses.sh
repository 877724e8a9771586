#!/bin/bash
# Switch-KD's Table 4: losses between the student's logits and the teacher's.
# SCALE=quickstart (this machine) or paper, SEEDS=5, DRY_RUN=1 for memory and hours, ABLATE_OUT: docs/results.md.
# shellcheck source=../launch.sh
. "$(dirname "${BASH_SOURCE[0]}")/../launch.sh"
ablate losses "$@"
