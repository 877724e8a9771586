#!/bin/bash
# Pre-training (PT): the connector learns from captions; language model and vision tower stay frozen. With TEACHER_PATH
# it is distilled (DPT). Settings are environment variables, and flags after the arguments: docs/train.md.
#   DATA_PATH IMAGE_PATH LLM_VERSION VT_VERSION VT_VERSION2 CN_VERSION VERSION TRAIN_RECIPE MODEL_MAX_LENGTH
# shellcheck source=../launch.sh
. "$(dirname "${BASH_SOURCE[0]}")/../launch.sh"
launch train pretrain "$@"
