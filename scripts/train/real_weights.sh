#!/bin/bash
# Switch-KD and SFT on real pretrained weights: in some minutes on a CPU, or five seeds to convergence on a GPU.
# --minutes N, --seeds N, --output DIR, --ways WAY ..., --models packages|hub, --packages DIR: docs/results.md.
# shellcheck source=../launch.sh
. "$(dirname "${BASH_SOURCE[0]}")/../launch.sh"
ablate real "$@"
