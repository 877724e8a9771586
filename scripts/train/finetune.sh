#!/bin/bash
# Supervised fine-tuning (SFT) of a model from pretrain.sh: the language model and the connector learn to answer.
# Settings are environment variables, and flags after the arguments: docs/train.md.
#   DATA_PATH IMAGE_PATH LLM_VERSION VT_VERSION VT_VERSION2 CN_VERSION CONV_VERSION VERSION TRAIN_RECIPE MODEL_MAX_LENGTH
# shellcheck source=../launch.sh
. "$(dirname "${BASH_SOURCE[0]}")/../launch.sh"
launch train finetune "$@"
