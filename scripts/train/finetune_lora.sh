#!/bin/bash
# finetune.sh with adapters in the language model: rank 128, alpha 256, learning rate 2e-4, as in TinyLLaVA.
# finetune.sh's ten arguments; TRAIN_RECIPE is lora, or qlora (which needs bitsandbytes and CUDA).
# shellcheck source=../launch.sh
. "$(dirname "${BASH_SOURCE[0]}")/../launch.sh"
launch train finetune_lora "$@"
