#!/bin/bash
# Distilled fine-tuning (DFT, Switch-KD) of what pretrain.sh made: the whole student, its vision tower too, learns from
# the data and from the teacher. finetune.sh's arguments and the teacher; the rest from the environment (see common.sh):
#   DISTILL_LOSS (dbild)  TEMPERATURE (3.0)  ALIGN_WEIGHT (1.0)  SWITCH_WEIGHT (1.0)
#   TEACHER_BITS (16; 8 or 4 hold the teacher's language model in so many bits, which needs bitsandbytes)
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"
need_arguments 11 "DATA_PATH IMAGE_PATH LLM_VERSION VT_VERSION VT_VERSION2 CN_VERSION CONV_VERSION VERSION TRAIN_RECIPE MODEL_MAX_LENGTH TEACHER_PATH" "$@"
stage DISTILL

DATA_PATH="$1"          # conversations: a JSON file in LLaVA's format
IMAGE_PATH="$2"         # folder that its image paths start from
LLM_VERSION="$3"        # the student's language model: hub id or folder
VT_VERSION="$4"         # the student's vision tower: hub id or folder
VT_VERSION2="$5"        # second vision tower of a mixture, otherwise ""
CN_VERSION="$6"         # connector, e.g. mlp2x_gelu
CONV_VERSION="$7"       # conversation template, the teacher's too, e.g. qwen2_base
VERSION="$8"            # the name of the run that pretrain.sh was given
TRAIN_RECIPE="$9"       # common or lora
MODEL_MAX_LENGTH="${10}" # tokens, those of the image counted
TEACHER_PATH="${11}"    # the teacher's checkpoint: finetune.sh's output, or one from the hub

LEARNING_RATE_HERE=2e-5
LORA=()
if is_lora "$TRAIN_RECIPE"; then
    TUNE_LLM="${TUNE_LLM:-${TRAIN_RECIPE%%_*}}"
    LEARNING_RATE_HERE=2e-4
    LORA=(--lora_r "${LORA_R:-128}" --lora_alpha "${LORA_ALPHA:-256}")
fi

train 128 8 "$LEARNING_RATE_HERE" \
    --data_path "$DATA_PATH" \
    --image_folder "$IMAGE_PATH" \
    --model_name_or_path "$LLM_VERSION" \
    --vision_tower "$VT_VERSION" \
    ${VT_VERSION2:+--vision_tower2 "$VT_VERSION2"} \
    --connector_type "$CN_VERSION" \
    --conv_version "$CONV_VERSION" \
    --model_max_length "$MODEL_MAX_LENGTH" \
    --training_recipe "$TRAIN_RECIPE" \
    --tune_type_llm "${TUNE_LLM:-full}" \
    --tune_type_vision_tower "${TUNE_VISION_TOWER:-full}" \
    --tune_type_connector "${TUNE_CONNECTOR:-full}" \
    --group_by_modality_length "${GROUP_BY_MODALITY:-True}" \
    --teacher_path "$TEACHER_PATH" \
    --distill_loss "${DISTILL_LOSS:-dbild}" \
    --temperature "${TEMPERATURE:-3.0}" \
    --align_weight "${ALIGN_WEIGHT:-1.0}" \
    --switch_weight "${SWITCH_WEIGHT:-1.0}" \
    --teacher_bits "${TEACHER_BITS:-16}" \
    --pretrained_model_path "${PRETRAINED_PATH:-$(run_name "$LLM_VERSION" "$VT_VERSION" "$VERSION" pretrain)}" \
    --output_dir "$(run_name "$LLM_VERSION" "$VT_VERSION" "$VERSION" distill)" \
    ${LORA[@]+"${LORA[@]}"}
