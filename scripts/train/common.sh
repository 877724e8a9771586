# Sourced by the scripts of this folder: what they read from the environment, and how a training is launched.
#
#   GPUS                   how many GPUs (4) or which (0,1,2,3); all visible ones by default. On a CPU: how many processes.
#   DEVICE                 cuda or cpu; by default what the machine has
#   LAUNCHER               deepspeed (default), torchrun, or python (one process; the default on a CPU)
#   ZERO                   2 (default), 3, 2_offload, a DeepSpeed JSON of your own, or none
#   PRECISION              bf16 (default with CUDA), fp16, fp32 (default on a CPU)
#   GLOBAL_BATCH_SIZE      samples an optimiser step; kept for every number of GPUs (TinyLLaVA's 256 and 128)
#   PER_DEVICE_BATCH_SIZE  samples in memory on one device; by default as many of TinyLLaVA's as divide the global batch
#   GRAD_ACCUM             micro-batches a step; by default what the two above leave
#   LEARNING_RATE, CONNECTOR_LR, VISION_TOWER_LR, EPOCHS, MAX_STEPS, WARMUP, WEIGHT_DECAY, SEED
#   TUNE_LLM, TUNE_VISION_TOWER, TUNE_CONNECTOR   frozen, full, lora, ... (see docs/train.md)
#   OUTPUT_ROOT            where the runs' folders go (playground/checkpoints)
#   SAVE_STEPS             a checkpoint every so many steps, or every such share of the run (0.1); SAVE_TOTAL_LIMIT keeps 1
#   LOGGING_STEPS, REPORT_TO, NUM_WORKERS, ATTN_IMPLEMENTATION, GRADIENT_CHECKPOINTING, IMAGE_ASPECT_RATIO, SELECT_LAYER
#   PRETRAIN_X, FINETUNE_X, DISTILL_X    the same for one stage alone, e.g. DISTILL_LEARNING_RATE=1e-5
#   MASTER_PORT            29501
#   HOSTFILE               several nodes with deepspeed
#   NNODES, NODE_RANK, MASTER_ADDR    several nodes with torchrun
#   EXTRA_ARGS             anything else for the entry point, appended last
#   PYTHON                 the interpreter
#   DRY_RUN=1              print the command instead of running it

set -euo pipefail

TRAIN_SCRIPTS="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
REPO="$(cd "$TRAIN_SCRIPTS/../.." && pwd)"
PYTHON="${PYTHON:-$(command -v python || command -v python3)}"
OUTPUT_ROOT="${OUTPUT_ROOT:-$REPO/playground/checkpoints}"
MASTER_PORT="${MASTER_PORT:-29501}"
export PYTHONPATH="$REPO${PYTHONPATH:+:$PYTHONPATH}"

die() {
    echo "${0##*/}: $*" >&2
    exit 1
}

# need_arguments HOW_MANY "NAMES" "$@": the positional arguments must be that many
need_arguments() {
    local wanted="$1" names="$2"
    shift 2
    if [ $# -ne "$wanted" ]; then
        echo "Usage: bash $0 $names" >&2
        echo "It takes $wanted arguments, not $#." >&2
        exit 1
    fi
}

# variant NAME: the part of a name that goes into the output folder's ("Qwen/Qwen2.5-0.5B" -> "Qwen2.5-0.5B")
variant() {
    local name="${1%/}"
    name="${name##*/}"
    echo "${name//:/-}"
}

# run_name LLM VISION_TOWER VERSION STAGE: TinyLLaVA's name of an output folder
run_name() {
    echo "$OUTPUT_ROOT/tiny-llava-$(variant "$1")-$(variant "$2")-$3-$4"
}

# stage NAME: what is set for this stage alone (NAME_LEARNING_RATE, ...) takes the place of what is set for all
stage() {
    local name own
    for name in LEARNING_RATE CONNECTOR_LR VISION_TOWER_LR EPOCHS MAX_STEPS WARMUP WEIGHT_DECAY GLOBAL_BATCH_SIZE \
        PER_DEVICE_BATCH_SIZE GRAD_ACCUM TUNE_LLM TUNE_VISION_TOWER TUNE_CONNECTOR ZERO SAVE_STEPS SEED NUM_WORKERS \
        GRADIENT_CHECKPOINTING EXTRA_ARGS; do
        own="$1_$name"
        if [ -n "${!own+set}" ]; then printf -v "$name" '%s' "${!own}"; fi
    done
}

is_lora() {
    case "$1" in lora | qlora*) return 0 ;; *) return 1 ;; esac
}

# Devices: sets DEVICE, GPU_IDS (empty on a CPU) and NPROC, the processes on this node.
find_devices() {
    local found=""
    if [ "${DEVICE:-}" != cpu ]; then
        if [ -n "${CUDA_VISIBLE_DEVICES+set}" ]; then
            found="$CUDA_VISIBLE_DEVICES"
        elif command -v nvidia-smi >/dev/null 2>&1; then
            found="$(nvidia-smi --query-gpu=index --format=csv,noheader 2>/dev/null | paste -sd, - || true)"
        elif [ -e /dev/kfd ]; then # an AMD GPU: torch knows how many
            found="$("$PYTHON" -c 'import torch; print(",".join(map(str, range(torch.cuda.device_count()))))')"
        fi
        case "$found" in *[!0-9,]* | "") found="" ;; esac
        if [ -n "$found" ]; then DEVICE=cuda; fi
    fi
    if [ "${DEVICE:-cpu}" = cuda ]; then
        [ -n "$found" ] || die "DEVICE is cuda, but this machine shows no GPU; set DEVICE=cpu."
        case "${GPUS:-}" in
            "") GPU_IDS="$found" ;;
            *,*) GPU_IDS="${GPUS%,}" ;;
            *) GPU_IDS="$(echo "$found" | cut -d, -f"1-$GPUS")" ;;
        esac
        NPROC="$(echo "$GPU_IDS" | tr ',' '\n' | grep -c .)"
        case "${GPUS:-}" in
            "" | *,*) ;;
            *) [ "$NPROC" -eq "$GPUS" ] || die "GPUS is $GPUS, but only $found are visible." ;;
        esac
    else
        DEVICE=cpu
        export DS_ACCELERATOR=cpu
        GPU_IDS=""
        NPROC="${GPUS:-1}"
        case "$NPROC" in *[!0-9]* | 0) die "GPUS is '$NPROC'; on a CPU it is the number of processes." ;; esac
    fi
}

# Launcher and sharding: sets LAUNCHER, DS_CONFIG and WORLD (processes on all nodes).
find_launcher() {
    if [ -z "${LAUNCHER:-}" ]; then
        if [ "$DEVICE" = cpu ] && [ "$NPROC" -eq 1 ]; then LAUNCHER=python; else LAUNCHER=deepspeed; fi
    fi
    case "$LAUNCHER" in
        deepspeed | torchrun) ;;
        python) [ "$NPROC" -eq 1 ] || die "LAUNCHER=python runs one process, but GPUS asks for $NPROC." ;;
        *) die "LAUNCHER is '$LAUNCHER'; it must be deepspeed, torchrun or python." ;;
    esac
    if [ -z "${ZERO:-}" ]; then
        if [ "$LAUNCHER" = python ]; then ZERO=none; else ZERO=2; fi
    fi
    case "$ZERO" in
        none) DS_CONFIG="" ;;
        2 | 3 | 2_offload) DS_CONFIG="$TRAIN_SCRIPTS/zero$ZERO.json" ;;
        *.json) DS_CONFIG="$ZERO" ;;
        *) die "ZERO is '$ZERO'; it must be 2, 3, 2_offload, none or a DeepSpeed JSON file." ;;
    esac
    [ -z "$DS_CONFIG" ] || [ -f "$DS_CONFIG" ] || die "The DeepSpeed configuration $DS_CONFIG does not exist."
    [ -z "$DS_CONFIG" ] || [ "$LAUNCHER" != python ] || die "ZERO=$ZERO needs LAUNCHER=deepspeed or torchrun."
    WORLD=$((NPROC * ${NNODES:-1}))
    if [ -n "${HOSTFILE:-}" ]; then
        [ "$LAUNCHER" = deepspeed ] || die "HOSTFILE is read by LAUNCHER=deepspeed; torchrun has NNODES and MASTER_ADDR."
        [ -f "$HOSTFILE" ] || die "The HOSTFILE $HOSTFILE does not exist."
        WORLD=$(($(grep -v '^ *#' "$HOSTFILE" | sed -n 's/.*slots=\([0-9]*\).*/\1/p' | paste -sd+ -)))
    elif [ "${NNODES:-1}" -gt 1 ]; then
        [ "$LAUNCHER" = torchrun ] || die "NNODES=$NNODES needs LAUNCHER=torchrun; deepspeed takes a HOSTFILE."
        [ -n "${MASTER_ADDR:-}" ] && [ -n "${NODE_RANK:-}" ] || die "NNODES=$NNODES needs MASTER_ADDR and NODE_RANK."
    fi
}

# batch_arithmetic GLOBAL PER_DEVICE (TinyLLaVA's): sets PER_DEVICE_BATCH_SIZE and GRAD_ACCUM
batch_arithmetic() {
    local global="${GLOBAL_BATCH_SIZE:-$1}" per="${PER_DEVICE_BATCH_SIZE:-}" real
    if [ -z "$per" ]; then
        per="$2"
        if [ -z "${GRAD_ACCUM:-}" ]; then
            while [ "$per" -gt 1 ] && [ $((global % (per * WORLD))) -ne 0 ]; do per=$((per - 1)); done
            if [ $((global % (per * WORLD))) -ne 0 ]; then
                per="$2"
                while [ "$per" -gt 1 ] && [ $((per * WORLD)) -gt "$global" ]; do per=$((per - 1)); done
            fi
        elif [ -n "${GLOBAL_BATCH_SIZE:-}" ]; then
            per=$((global / (GRAD_ACCUM * WORLD)))
        fi
    fi
    PER_DEVICE_BATCH_SIZE=$((per > 0 ? per : 1))
    if [ -z "${GRAD_ACCUM:-}" ]; then
        GRAD_ACCUM=$(((global + PER_DEVICE_BATCH_SIZE * WORLD / 2) / (PER_DEVICE_BATCH_SIZE * WORLD)))
        if [ "$GRAD_ACCUM" -lt 1 ]; then GRAD_ACCUM=1; fi
    fi
    real=$((PER_DEVICE_BATCH_SIZE * GRAD_ACCUM * WORLD))
    echo "Batch: $PER_DEVICE_BATCH_SIZE a device x $GRAD_ACCUM accumulated x $WORLD processes = $real a step"
    [ "$real" -eq "$global" ] || echo "Note: that is not the usual $global a step." >&2
}

# train GLOBAL PER_DEVICE LEARNING_RATE ARGUMENTS...: launch the entry point with the stage's arguments
train() {
    local global="$1" per_device="$2" learning_rate="$3"
    shift 3
    find_devices
    find_launcher
    batch_arithmetic "$global" "$per_device"

    local arguments=(
        "$@"
        --per_device_train_batch_size "$PER_DEVICE_BATCH_SIZE"
        --gradient_accumulation_steps "$GRAD_ACCUM"
        --learning_rate "${LEARNING_RATE:-$learning_rate}"
        --num_train_epochs "${EPOCHS:-1}"
        --weight_decay "${WEIGHT_DECAY:-0.}"
        --warmup_steps "${WARMUP:-0.03}" # below 1: a share of all steps
        --lr_scheduler_type cosine
        --seed "${SEED:-42}"
        --logging_steps "${LOGGING_STEPS:-1}"
        --save_strategy steps
        --save_steps "${SAVE_STEPS:-0.1}" # below 1: a share of all steps
        --save_total_limit "${SAVE_TOTAL_LIMIT:-1}"
        --report_to "${REPORT_TO:-tensorboard}"
        --mm_vision_select_layer "${SELECT_LAYER:--2}"
        --image_aspect_ratio "${IMAGE_ASPECT_RATIO:-square}"
    )
    [ -z "${ATTN_IMPLEMENTATION:-}" ] || arguments+=(--attn_implementation "$ATTN_IMPLEMENTATION")
    [ -z "${MAX_STEPS:-}" ] || arguments+=(--max_steps "$MAX_STEPS")
    [ -z "${CONNECTOR_LR:-}" ] || arguments+=(--mm_projector_lr "$CONNECTOR_LR")
    [ -z "${VISION_TOWER_LR:-}" ] || arguments+=(--vision_tower_lr "$VISION_TOWER_LR")
    [ -z "$DS_CONFIG" ] || arguments+=(--deepspeed "$DS_CONFIG")
    case "${PRECISION:-$([ "$DEVICE" = cuda ] && echo bf16 || echo fp32)}" in
        bf16) arguments+=(--bf16 True) ;;
        fp16) arguments+=(--fp16 True) ;;
        fp32) ;;
        *) die "PRECISION is '$PRECISION'; it must be bf16, fp16 or fp32." ;;
    esac
    if [ "$DEVICE" = cpu ]; then
        arguments+=(--use_cpu True --dataloader_num_workers "${NUM_WORKERS:-0}"
            --gradient_checkpointing "${GRADIENT_CHECKPOINTING:-False}")
    else
        arguments+=(--dataloader_num_workers "${NUM_WORKERS:-8}"
            --gradient_checkpointing "${GRADIENT_CHECKPOINTING:-True}")
    fi
    local extra=()
    read -r -a extra <<<"${EXTRA_ARGS:-}"
    arguments+=("${extra[@]}")

    local module=tinyllava_switchkd.train.train launch
    case "$LAUNCHER" in
        python) launch=("$PYTHON" -m "$module") ;;
        torchrun)
            launch=("$PYTHON" -m torch.distributed.run --nproc_per_node "$NPROC" --nnodes "${NNODES:-1}"
                --node_rank "${NODE_RANK:-0}" --master_addr "${MASTER_ADDR:-127.0.0.1}" --master_port "$MASTER_PORT"
                -m "$module")
            ;;
        deepspeed)
            launch=("$PYTHON" -m deepspeed.launcher.runner --master_port "$MASTER_PORT")
            if [ -n "${HOSTFILE:-}" ]; then
                launch+=(--hostfile "$HOSTFILE")
            elif [ -n "$GPU_IDS" ]; then
                launch+=(--include "localhost:$GPU_IDS")
            else
                launch+=(--num_gpus "$NPROC")
            fi
            launch+=(--module "$module")
            ;;
    esac
    # deepspeed sets the visible devices itself
    if [ -n "$GPU_IDS" ] && [ "$LAUNCHER" != deepspeed ]; then export CUDA_VISIBLE_DEVICES="$GPU_IDS"; fi
    if [ -n "${DRY_RUN:-}" ]; then
        printf '%q ' "${launch[@]}" "${arguments[@]}"
        echo
    else
        "${launch[@]}" "${arguments[@]}"
    fi
}
