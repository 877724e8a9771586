#!/bin/bash
# Fine-tune a trained model, yours or one from the hub, on your own data: LoRA in the language model, and the full
# connector. The model's parts are read from its configuration. Settings are environment variables: docs/train.md.
#   DATA_PATH IMAGE_PATH MODEL_PATH CONV_VERSION OUTPUT_DIR
# shellcheck source=../launch.sh
. "$(dirname "${BASH_SOURCE[0]}")/../launch.sh"
launch train custom "$@"
