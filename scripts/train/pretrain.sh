#!/bin/bash
# Pre-training (PT): the connector learns on captions; the language model and the vision tower stay frozen.
# TinyLLaVA's arguments; everything else comes from the environment (see common.sh).
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"
need_arguments 9 "DATA_PATH IMAGE_PATH LLM_VERSION VT_VERSION VT_VERSION2 CN_VERSION VERSION TRAIN_RECIPE MODEL_MAX_LENGTH" "$@"
stage PRETRAIN

DATA_PATH="$1"        # captions: a JSON file in LLaVA's format
IMAGE_PATH="$2"       # folder that its image paths start from
LLM_VERSION="$3"      # language model: hub id or folder
VT_VERSION="$4"       # vision tower: hub id or folder
VT_VERSION2="$5"      # second vision tower of a mixture, otherwise ""
CN_VERSION="$6"       # connector, e.g. mlp2x_gelu
VERSION="$7"          # your name for the run, e.g. base
TRAIN_RECIPE="$8"     # common, lora or qlora
MODEL_MAX_LENGTH="$9" # tokens, those of the image counted

if is_lora "$TRAIN_RECIPE"; then TUNE_LLM="${TUNE_LLM:-${TRAIN_RECIPE%%_*}}"; fi

train 256 32 1e-3 \
    --data_path "$DATA_PATH" \
    --image_folder "$IMAGE_PATH" \
    --model_name_or_path "$LLM_VERSION" \
    --vision_tower "$VT_VERSION" \
    ${VT_VERSION2:+--vision_tower2 "$VT_VERSION2"} \
    --connector_type "$CN_VERSION" \
    --conv_version pretrain \
    --model_max_length "$MODEL_MAX_LENGTH" \
    --training_recipe "$TRAIN_RECIPE" \
    --tune_type_llm "${TUNE_LLM:-frozen}" \
    --tune_type_vision_tower "${TUNE_VISION_TOWER:-frozen}" \
    --tune_type_connector "${TUNE_CONNECTOR:-full}" \
    --output_dir "$(run_name "$LLM_VERSION" "$VT_VERSION" "$VERSION" pretrain)"
