#!/bin/bash
# SFT, logit distillation, LLaVA-KD, Align-KD and Switch-KD, each tuned by the same search on validation data.
# SCALE=quickstart (this machine) or paper, SEEDS=5, DRY_RUN=1 for memory and hours, ABLATE_OUT: docs/results.md.
# shellcheck source=../launch.sh
. "$(dirname "${BASH_SOURCE[0]}")/../launch.sh"
ablate methods "$@"
