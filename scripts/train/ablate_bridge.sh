#!/bin/bash
# A student with a smaller, different tower: SFT, align only, and the switch through the bridge.
# SCALE=quickstart (this machine) or paper, SEEDS=5, DRY_RUN=1 for memory and hours, ABLATE_OUT: docs/results.md.
# shellcheck source=../launch.sh
. "$(dirname "${BASH_SOURCE[0]}")/../launch.sh"
ablate bridge "$@"
