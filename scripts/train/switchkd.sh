# Sourced by the train_switchkd_*.sh: the paper's recipe (Switch-KD, Section 4.1 and Table 5) for one pair of models.
#   teacher: PT, SFT        student: PT, then DFT (distilled fine-tuning) instead of SFT
# A script sets TEACHER_LLM and STUDENT_LLM; the rest has defaults and comes from the environment (see common.sh).
# Stages that are finished are not repeated, and an interrupted one resumes: run the same command again.
#
#   DATA_ROOT       TinyLLaVA's tree: text_files/*.json and the images' folders (playground/data)
#   PRETRAIN_DATA, PRETRAIN_IMAGES, FINETUNE_DATA, FINETUNE_IMAGES    its parts, if they lie elsewhere
#   TEACHER_PATH    a teacher that is trained already; its two stages are left out
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"
DATA_ROOT="${DATA_ROOT:-$REPO/playground/data}"
PRETRAIN_DATA="${PRETRAIN_DATA:-$DATA_ROOT/text_files/blip_laion_cc_sbu_558k.json}"
PRETRAIN_IMAGES="${PRETRAIN_IMAGES:-$DATA_ROOT/llava/llava_pretrain/images}"
FINETUNE_DATA="${FINETUNE_DATA:-$DATA_ROOT/text_files/llava_v1_5_mix665k.json}"
FINETUNE_IMAGES="${FINETUNE_IMAGES:-$DATA_ROOT}"
VISION_TOWER="${VISION_TOWER:-google/siglip-so400m-patch14-384}"
CONNECTOR="${CONNECTOR:-mlp2x_gelu}"
CONV_VERSION="${CONV_VERSION:-qwen2_base}"
VERSION="${VERSION:-switchkd}"
TRAIN_RECIPE="${TRAIN_RECIPE:-common}"
MODEL_MAX_LENGTH="${MODEL_MAX_LENGTH:-2048}"
export OUTPUT_ROOT

pretrain() { # LLM
    bash "$TRAIN_SCRIPTS/pretrain.sh" "$PRETRAIN_DATA" "$PRETRAIN_IMAGES" "$1" "$VISION_TOWER" "" "$CONNECTOR" "$VERSION" \
        common "$MODEL_MAX_LENGTH"
}

if [ -z "${TEACHER_PATH:-}" ]; then
    echo "== The teacher, $TEACHER_LLM: pre-training =="
    pretrain "$TEACHER_LLM"
    echo "== The teacher, $TEACHER_LLM: supervised fine-tuning =="
    bash "$TRAIN_SCRIPTS/finetune.sh" "$FINETUNE_DATA" "$FINETUNE_IMAGES" "$TEACHER_LLM" "$VISION_TOWER" "" "$CONNECTOR" \
        "$CONV_VERSION" "$VERSION" common "$MODEL_MAX_LENGTH"
    TEACHER_PATH="$(run_name "$TEACHER_LLM" "$VISION_TOWER" "$VERSION" finetune)"
fi
echo "== The student, $STUDENT_LLM: pre-training =="
pretrain "$STUDENT_LLM"
echo "== The student, $STUDENT_LLM: distilled fine-tuning from $TEACHER_PATH =="
bash "$TRAIN_SCRIPTS/distill.sh" "$FINETUNE_DATA" "$FINETUNE_IMAGES" "$STUDENT_LLM" "$VISION_TOWER" "" "$CONNECTOR" \
    "$CONV_VERSION" "$VERSION" "$TRAIN_RECIPE" "$MODEL_MAX_LENGTH" "$TEACHER_PATH"
