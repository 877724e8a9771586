#!/bin/bash
# Pre-training (PT): the connector learns on captions; the language model and the vision tower stay frozen. With
# TEACHER_PATH set it is distilled (DPT). Settings come from the environment and from flags that follow: docs/train.md.
#   DATA_PATH IMAGE_PATH LLM_VERSION VT_VERSION VT_VERSION2 CN_VERSION VERSION TRAIN_RECIPE MODEL_MAX_LENGTH
# shellcheck source=../launch.sh
. "$(dirname "${BASH_SOURCE[0]}")/../launch.sh"
launch train pretrain "$@"
