#!/bin/bash
# Fine-tuning of a finished model, yours or one from the hub, on your own data: LoRA in the language model, and the
# connector. The model says of what it is made; settings come from the environment: docs/train.md.
#   DATA_PATH IMAGE_PATH MODEL_PATH CONV_VERSION OUTPUT_DIR
# shellcheck source=../launch.sh
. "$(dirname "${BASH_SOURCE[0]}")/../launch.sh"
launch train custom "$@"
