# Sourced by the scripts of this folder: what they read from the environment, and how an evaluation is run.
#
#   EVAL_DIR       the benchmarks' data in LLaVA's layout (playground/data/eval); the answers go there, too:
#                  EVAL_DIR/<benchmark>/answers/<model>/
#   RESULTS_DIR    the scores: RESULTS_DIR/<model>/<benchmark>.json (playground/results)
#   GPUS           how many GPUs (4) or which (0,1,2,3); all visible ones by default. On a CPU: how many processes.
#   DEVICE         cuda or cpu; by default what the machine has
#   BATCH_SIZE     questions at once on one device (16)
#   LIMIT          only the first so many questions, to try things out
#   SPLIT          another split than the default: val, test-dev or test of vqav2, val or test of vizwiz, dev or test of
#                  mmbench. One without public ground truth gets an upload file: EVAL_DIR/<benchmark>/answers_upload/
#   CONV_MODE      conversation template, for checkpoints that do not name their own (phi, llama, gemma, qwen2_base, ...)
#   EXTRA_ARGS     anything else for tinyllava_switchkd.eval.run
#   PYTHON         the interpreter

set -euo pipefail

EVAL_SCRIPTS="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
REPO="$(cd "$EVAL_SCRIPTS/../.." && pwd)"
PYTHON="${PYTHON:-$(command -v python || command -v python3)}"
EVAL_DIR="${EVAL_DIR:-$REPO/playground/data/eval}"
RESULTS_DIR="${RESULTS_DIR:-$REPO/playground/results}"
export PYTHONPATH="$REPO${PYTHONPATH:+:$PYTHONPATH}"

die() {
    echo "${0##*/}: $*" >&2
    exit 1
}

# read_arguments "$@": sets MODEL_PATH and MODEL_NAME
read_arguments() {
    if [ $# -lt 1 ] || [ $# -gt 2 ] || [ -z "$1" ] || [ "${1#-}" != "$1" ]; then
        echo "Usage: bash $0 MODEL_PATH [MODEL_NAME]" >&2
        exit 1
    fi
    MODEL_PATH="$1"
    case "$MODEL_PATH" in # no name on the hub looks like these
        /* | ./* | ../*) [ -d "$MODEL_PATH" ] || die "there is no checkpoint folder $MODEL_PATH." ;;
    esac
    MODEL_NAME="${2:-}"
    if [ -z "$MODEL_NAME" ]; then
        local path="${MODEL_PATH%/}"
        MODEL_NAME="${path##*/}"
        case "$MODEL_NAME" in
            checkpoint-*) MODEL_NAME="$(basename "$(dirname "$path")")_$MODEL_NAME" ;; # one of a run's checkpoints
        esac
    fi
}

# Devices: sets GPU_IDS (empty on a CPU) and PROCESSES.
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
        case "$found" in *[!0-9,]*) found="" ;; esac
    fi
    if [ -z "$found" ]; then
        [ "${DEVICE:-cpu}" = cpu ] || die "DEVICE is $DEVICE, but this machine shows no GPU; set DEVICE=cpu."
        GPU_IDS=""
        PROCESSES="${GPUS:-1}"
    else
        case "${GPUS:-}" in
            "") GPU_IDS="$found" ;;
            *,*) GPU_IDS="${GPUS%,}" ;;
            *) GPU_IDS="$(echo "$found" | cut -d, -f"1-$GPUS")" ;;
        esac
        PROCESSES="$(echo "$GPU_IDS" | tr ',' '\n' | grep -c .)"
        case "${GPUS:-}" in
            "" | *,* | "$PROCESSES") ;;
            *) die "GPUS is $GPUS, but only $found are visible." ;;
        esac
    fi
    case "$PROCESSES" in *[!0-9]* | 0 | "") die "GPUS is '$GPUS'; on a CPU it is the number of processes." ;; esac
}

# has_data NAME FOLDER: are the benchmark's questions there? If not, the status is NO_DATA. Malformed questions are
# there: the benchmark itself will complain.
NO_DATA=3
has_data() {
    "$PYTHON" - "$1" "$EVAL_DIR/$2" "$NO_DATA" <<'PYTHON_CODE'
import sys

from tinyllava_switchkd.eval.benchmarks import BenchmarkFactory

try:
    next(iter(BenchmarkFactory(sys.argv[1]).questions(sys.argv[2])), None)
except FileNotFoundError:
    sys.exit(int(sys.argv[3]))
except ValueError:
    pass
PYTHON_CODE
}

# default_split NAME FOLDER: the split that is asked if SPLIT does not say; nothing if there are no data.
default_split() {
    "$PYTHON" - "$1" "$EVAL_DIR/$2" <<'PYTHON_CODE'
import contextlib
import sys

from tinyllava_switchkd.eval.benchmarks import BenchmarkFactory

with contextlib.suppress(FileNotFoundError, ValueError):
    print(BenchmarkFactory(sys.argv[1]).split_of(sys.argv[2]))
PYTHON_CODE
}

# evaluate NAME FOLDER UPLOAD MODEL_PATH [MODEL_NAME]: answers and score of one benchmark
#   NAME    of the benchmark (python -m tinyllava_switchkd.eval.run NAME)
#   FOLDER  its folder in EVAL_DIR
#   UPLOAD  suffix of its server's file, - if it has none
evaluate() {
    local name="$1" folder="$2" upload="$3"
    shift 3
    read_arguments "$@"
    find_devices

    local answers="$EVAL_DIR/$folder/answers/$MODEL_NAME" score="$RESULTS_DIR/$MODEL_NAME/$name"
    local arguments=(
        "$name"
        --model-path "$MODEL_PATH"
        --model-name "$MODEL_NAME"
        --data-dir "$EVAL_DIR/$folder"
        --batch-size "${BATCH_SIZE:-16}"
    )
    local split="${SPLIT:-}"
    if [ -n "$split" ]; then
        answers="$answers/$split"
        score="$score-$split"
        arguments+=(--split "$split")
    elif [ "$upload" != - ]; then
        split="$(default_split "$name" "$folder")" # LLaVA's own eval.zip has the server's split alone
    fi
    case "$upload:$split" in
        -:*) ;;
        *:test*) arguments+=(--submission "$EVAL_DIR/$folder/answers_upload/$split/$MODEL_NAME.$upload") ;;
    esac
    arguments+=(--output-dir "$answers" --score "$score.json")
    [ -z "${LIMIT:-}" ] || arguments+=(--limit "$LIMIT")
    [ -z "${CONV_MODE:-}" ] || arguments+=(--conv-mode "$CONV_MODE")
    local extra=()
    read -r -a extra <<<"${EXTRA_ARGS:-}"
    arguments+=(${extra[@]+"${extra[@]}"})

    if [ -n "$GPU_IDS" ]; then
        export CUDA_VISIBLE_DEVICES="$GPU_IDS"
    else
        arguments+=(--device cpu)
    fi
    local module=tinyllava_switchkd.eval.run
    if [ "$PROCESSES" -eq 1 ]; then
        "$PYTHON" -m "$module" "${arguments[@]}"
    else
        "$PYTHON" -m torch.distributed.run --standalone --nproc_per_node "$PROCESSES" -m "$module" "${arguments[@]}"
    fi
}
