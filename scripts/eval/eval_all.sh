#!/usr/bin/env bash
# All benchmarks that have data, one after another, then the report: bash scripts/eval/eval_all.sh MODEL_PATH [MODEL_NAME]
# The environment decides about the rest, see common.sh. A benchmark that fails does not stop the others.
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"
read_arguments "$@"
[ -z "${SPLIT:-}" ] || die "SPLIT is of one benchmark; run its own script with it."

# script:name:folder; the largest last
BENCHMARKS=(
    pope:pope:pope mme:mme:MME mmbench:mmbench:mmbench mmbench_cn:mmbench_cn:mmbench_cn gqa:gqa:gqa
    sqa:scienceqa:scienceqa textvqa:textvqa:textvqa mmmu:mmmu:MMMU vizwiz:vizwiz:vizwiz vqav2:vqav2:vqav2
)
absent=() failed=() done=()
trap 'echo "${0##*/}: interrupted. Run the script again to go on." >&2; exit 130' INT TERM
for entry in "${BENCHMARKS[@]}"; do
    IFS=: read -r script name folder <<<"$entry"
    status=0
    has_data "$name" "$folder" || status=$?
    if [ "$status" -eq "$NO_DATA" ]; then
        absent+=("$name")
    elif [ "$status" -eq 0 ] && bash "$EVAL_SCRIPTS/$script.sh" "$MODEL_PATH" "$MODEL_NAME"; then
        done+=("$name")
    else
        failed+=("$name")
    fi
done
if [ ${#absent[@]} -gt 0 ]; then
    echo "No data in $EVAL_DIR: ${absent[*]}. Get them: python -m tinyllava_switchkd.eval.prepare ${absent[*]}" >&2
fi
if [ ${#done[@]} -gt 0 ]; then
    "$PYTHON" -m tinyllava_switchkd.eval.report "$RESULTS_DIR/$MODEL_NAME" --output-dir "$RESULTS_DIR/$MODEL_NAME" ||
        failed+=("the report")
fi
[ ${#failed[@]} -eq 0 ] || die "not finished: ${failed[*]}. Run the script again to go on."
[ ${#done[@]} -gt 0 ] || die "there was nothing to evaluate."
