#!/bin/bash
# Switch-KD in the paper's setting, all four stages: the recipe switchkd_qwen2.5_1.5b_from_7b. Finished stages are not
# repeated, and an interrupted one resumes: run the same command again. Settings: docs/train.md, e.g.
#   GPUS=8 DATA_ROOT=/data bash scripts/train/train_switchkd_qwen2.5_1.5b_from_7b.sh
# shellcheck source=../launch.sh
. "$(dirname "${BASH_SOURCE[0]}")/../launch.sh"
launch train --recipe switchkd_qwen2.5_1.5b_from_7b "$@"
