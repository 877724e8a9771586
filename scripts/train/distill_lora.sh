#!/bin/bash
# distill.sh with adapters in the student's language model; its vision tower and connector train whole.
# distill.sh's eleven arguments; TRAIN_RECIPE is lora, or qlora (which needs bitsandbytes and CUDA).
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"
need_arguments 11 "DATA_PATH IMAGE_PATH LLM_VERSION VT_VERSION VT_VERSION2 CN_VERSION CONV_VERSION VERSION TRAIN_RECIPE MODEL_MAX_LENGTH TEACHER_PATH" "$@"
is_lora "$9" || die "TRAIN_RECIPE is '$9'; here it must be lora or qlora."

exec bash "$TRAIN_SCRIPTS/distill.sh" "$@"
