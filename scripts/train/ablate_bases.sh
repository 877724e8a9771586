#!/bin/bash
# SFT, align only and Switch-KD, with new base models and a new teacher for each seed.
# SEEDS=5, DRY_RUN=1 for memory and hours, ABLATE_OUT: docs/results.md.
# shellcheck source=../launch.sh
. "$(dirname "${BASH_SOURCE[0]}")/../launch.sh"
ablate bases "$@"
