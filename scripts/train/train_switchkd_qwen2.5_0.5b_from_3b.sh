#!/bin/bash
# Switch-KD, the paper's setting: Qwen2.5-0.5B learns from Qwen2.5-3B, both with SigLIP-so400m/14 at 384 pixels and a
# two-layer MLP; PT on LLaVA-558K, SFT and DFT on LLaVA-Mix-665K, temperature 3, both weights 1.
# What can be set, see switchkd.sh; e.g.: GPUS=8 DATA_ROOT=/data bash scripts/train/train_switchkd_qwen2.5_0.5b_from_3b.sh
TEACHER_LLM="${TEACHER_LLM:-Qwen/Qwen2.5-3B}"
STUDENT_LLM="${STUDENT_LLM:-Qwen/Qwen2.5-0.5B}"
. "$(dirname "${BASH_SOURCE[0]}")/switchkd.sh"
