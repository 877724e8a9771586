#!/bin/bash
# Switch-KD's Table 5: distillation in pre-training, in fine-tuning, in both or in neither.
# SCALE=quickstart (this machine) or paper, SEEDS=5, DRY_RUN=1 for memory and hours, ABLATE_OUT: docs/results.md.
# shellcheck source=../launch.sh
. "$(dirname "${BASH_SOURCE[0]}")/../launch.sh"
ablate schemes "$@"
