#!/bin/bash
# Runs a training under Slurm and resumes it until it is done. Submit it with the script and its arguments:
#   sbatch scripts/train/slurm.sh scripts/train/distill.sh ARGUMENTS
#   sbatch --nodes=2 scripts/train/slurm.sh scripts/train/distill.sh ARGUMENTS
# Five minutes before the time limit, or before it is preempted, the run writes a checkpoint and ends with exit code 75.
# The job is then requeued, and the same command resumes from the checkpoint. Any other nonzero exit code ends the job:
# a run that has become NaN or has no space for a checkpoint is not repeated.
#SBATCH --job-name=tinyllava
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log

set -uo pipefail
if [ $# -eq 0 ]; then
    echo "Usage: sbatch $0 SCRIPT ARGUMENTS" >&2
    exit 1
fi

# Set before anything starts: without a trap, a signal would end this script, and the run would write no checkpoint.
trap '[ -z "${!:-}" ] || kill -USR1 "$!" 2>/dev/null' USR1 TERM

if [ "${SLURM_JOB_NUM_NODES:-1}" -gt 1 ]; then
    export LAUNCHER=torchrun NNODES="$SLURM_JOB_NUM_NODES"
    MASTER_ADDR="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)"
    export MASTER_ADDR
    # every node runs the script once, with its own rank
    # shellcheck disable=SC2016 # the bash of each node expands it
    srun --kill-on-bad-exit=0 bash -c 'NODE_RANK="$SLURM_NODEID" exec bash "$@"' bash "$@" &
else
    bash "$@" &
fi
run=$!

while kill -0 "$run" 2>/dev/null; do # a signal interrupts the wait, not the run
    wait "$run"
done
wait "$run"
code=$?
if [ "$code" -eq 75 ]; then
    echo "Job ${SLURM_JOB_ID:-?} is requeued."
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
