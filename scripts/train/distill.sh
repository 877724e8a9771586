#!/bin/bash
# Distilled fine-tuning (DFT) of what pretrain.sh made: the whole student, its vision tower too, learns from the data
# and from the teacher; by Switch-KD, or by DISTILL_METHOD. finetune.sh's arguments and, last, TEACHER_PATH.
# Settings come from the environment and from flags that follow: docs/train.md.
# shellcheck source=../launch.sh
. "$(dirname "${BASH_SOURCE[0]}")/../launch.sh"
launch train distill "$@"
