#!/bin/bash
# Fine-tuning of a finished model, yours or one from the hub, on your own data: LoRA in the language model, and the
# connector. The model says of what it is made; the rest comes from the environment (see common.sh).
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"
need_arguments 5 "DATA_PATH IMAGE_PATH MODEL_PATH CONV_VERSION OUTPUT_DIR" "$@"
stage FINETUNE

DATA_PATH="$1"    # conversations: a JSON file in LLaVA's format
IMAGE_PATH="$2"   # folder that its image paths start from
MODEL_PATH="$3"   # the model: a folder, or e.g. Zhang199/TinyLLaVA-Qwen2.5-3B-SigLIP
CONV_VERSION="$4" # its conversation template, e.g. qwen2_base
OUTPUT_DIR="$5"   # where the tuned model goes

RECIPE="${TRAIN_RECIPE:-lora}"
ARGUMENTS=()
if is_lora "$RECIPE"; then
    TUNE_LLM="${TUNE_LLM:-${RECIPE%%_*}}"
    ARGUMENTS=(--lora_r "${LORA_R:-128}" --lora_alpha "${LORA_ALPHA:-256}")
fi
[ -z "${MODEL_MAX_LENGTH:-}" ] || ARGUMENTS+=(--model_max_length "$MODEL_MAX_LENGTH")

train 128 4 1e-4 \
    --data_path "$DATA_PATH" \
    --image_folder "$IMAGE_PATH" \
    --conv_version "$CONV_VERSION" \
    --training_recipe "$RECIPE" \
    --tune_type_llm "${TUNE_LLM:-full}" \
    --tune_type_vision_tower "${TUNE_VISION_TOWER:-frozen}" \
    --tune_type_connector "${TUNE_CONNECTOR:-full}" \
    --pretrained_model_path "$MODEL_PATH" \
    --output_dir "$OUTPUT_DIR" \
    ${ARGUMENTS[@]+"${ARGUMENTS[@]}"}
