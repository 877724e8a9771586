#!/bin/bash
# distill.sh with adapters in the student's language model; its vision tower and connector train whole.
# distill.sh's eleven arguments; TRAIN_RECIPE is lora, or qlora (which needs bitsandbytes and CUDA).
# shellcheck source=../launch.sh
. "$(dirname "${BASH_SOURCE[0]}")/../launch.sh"
launch train distill_lora "$@"
