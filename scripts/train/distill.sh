#!/bin/bash
# Distilled fine-tuning (DFT) of a model from pretrain.sh: the whole student, including its vision tower, learns from the
# data and the teacher, by Switch-KD or DISTILL_METHOD. The arguments are those of finetune.sh, then TEACHER_PATH.
# Settings are environment variables, and flags after the arguments: docs/train.md.
# shellcheck source=../launch.sh
. "$(dirname "${BASH_SOURCE[0]}")/../launch.sh"
launch train distill "$@"
