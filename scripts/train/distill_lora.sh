#!/bin/bash
# distill.sh with adapters in the student's language model; vision tower and connector are fully trained.
# distill.sh's eleven arguments; TRAIN_RECIPE is lora, or qlora (which needs bitsandbytes and CUDA).
# shellcheck source=../launch.sh
. "$(dirname "${BASH_SOURCE[0]}")/../launch.sh"
launch train distill_lora "$@"
