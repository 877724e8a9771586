#!/bin/bash
# Switch-KD's Table 3: SFT, and distillation with and without the visual switch.
# SCALE=quickstart (this machine) or paper, SEEDS=5, DRY_RUN=1 for memory and hours, ABLATE_OUT: docs/results.md.
# shellcheck source=../launch.sh
. "$(dirname "${BASH_SOURCE[0]}")/../launch.sh"
ablate switch "$@"
