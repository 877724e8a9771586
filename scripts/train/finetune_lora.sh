#!/bin/bash
# finetune.sh with adapters in the language model: rank 128, alpha 256, learning rate 2e-4, as TinyLLaVA's.
# finetune.sh's ten arguments; TRAIN_RECIPE is lora, or qlora (which needs bitsandbytes and CUDA).
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"
need_arguments 10 "DATA_PATH IMAGE_PATH LLM_VERSION VT_VERSION VT_VERSION2 CN_VERSION CONV_VERSION VERSION TRAIN_RECIPE MODEL_MAX_LENGTH" "$@"
is_lora "$9" || die "TRAIN_RECIPE is '$9'; here it must be lora or qlora."

exec bash "$TRAIN_SCRIPTS/finetune.sh" "$@"
