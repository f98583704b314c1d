#!/bin/bash
# A job of t5like for Slurm: `sbatch THIS_FILE` submits it. The directory of --output must exist.
#SBATCH --job-name=a
#SBATCH --account=lab
#SBATCH --partition=gpu
#SBATCH --nodes=8
#SBATCH --ntasks-per-node=8
#SBATCH --cpus-per-task=12
#SBATCH --mem=1000G
#SBATCH --gres=gpu:h100:8
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=/shared/runs/a/logs/a-%j.log
#SBATCH --export=WANDB_API_KEY

# The environment: the login shell's, the variables named by --export above, and these.
export PYTHONUNBUFFERED=1
export JAX_COMPILATION_CACHE_DIR=/shared/jax_cache
export LOG_LEVEL=info
: "${WANDB_API_KEY:?is not set in the shell that submitted the job}"
module load cuda/12

# What runs, and how often it starts again after a failure.
retries=10
logs=/shared/runs/a/logs
workdir=/shared/runs/a
command=(python3 -m t5like train --config=t5_xxl --workdir=/shared/runs/a)

# One task per process. Each sees all GPUs of its host, and t5like shares them. When one task has ended, the
# others have 60 s to end. --kill-on-bad-exit=1 would kill them while they save, and srun
# would return their signal instead of the exit code.
step=(
    srun --nodes=8 --ntasks=64 --ntasks-per-node=8 --cpus-per-task=12 --mpi=none --export=ALL --label --kill-on-bad-exit=0 --wait=60
)

# Exit codes of t5like: 0 done; 75 preempted and saved, 76 a process was lost: the same command continues the run;
# 2 config, 3 data, 4 storage, 5 diverged, 70 internal error: it would fail again. Above 128: ended by a signal.
export SLURM_EXIT_ERROR=213 # of srun, if Slurm could not start the tasks
job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
job=${job:-$SLURM_JOB_ID}
restarts=$logs/$SLURM_JOB_NAME-$job.restarts # contains how many restarts of the job count

newest_checkpoint() { # prints its step; -1: there is none; nothing: the run directory is not on this host
    local path newest=-1
    [[ $workdir == /* ]] || return 0
    for path in "$workdir"/checkpoints/*/commit_success.txt; do # of complete checkpoints
        path=${path%/*} path=${path##*/}
        if [[ $path =~ ^[0-9]+$ ]] && ((10#$path > newest)); then newest=$((10#$path)); fi
    done
    echo "$newest"
}

field() { # NAME: prints a field of the job
    scontrol --oneliner show job "$job" | grep --only-matching " $1=[^ ]*" | head -n 1 | cut -d = -f 2
}

start_again() { # CODE COUNTS REASON: puts the job into the queue again, or ends it with CODE
    local code=$1 counts=$2 reason=$3 now attempt=0
    now=$(newest_checkpoint)
    if [[ -n $now && $now == "$at_start" ]]; then counts=1 reason="$reason, without a new checkpoint"; fi
    if ((counts && failures >= retries)); then
        echo "launch: $reason; the job ends: $failures of $retries restarts are used" >&2
        exit "$code"
    fi
    if ((counts)); then echo $((failures += 1)) >"$restarts" || exit "$code"; fi
    echo "launch: $reason; the job starts again: $failures of $retries restarts are used" >&2
    until scontrol requeue "$job"; do
        if ((attempt += 1, attempt > 20)); then exit "$code"; fi
        sleep 15
    done
    wait "$task"
    exit "$code"
}

# Slurm ends the job: by scancel, its time limit, a preemption, or because a host is lost. After the last two it puts
# the job into the queue again, because of --requeue; after the time limit it does not.
terminated() {
    trap '' TERM
    if [[ $(field Reason) == TimeLimit ]]; then start_again 143 0 "the time limit is over"; fi
    wait "$task"
    exit 143
}

failures=0
if [[ -f $restarts ]]; then read -r failures <"$restarts"; fi
at_start=$(newest_checkpoint)
echo "launch: $(date '+%F %T') job $job on $SLURM_JOB_NODELIST, restart ${SLURM_RESTART_COUNT:-0}" >&2
"${step[@]}" "${command[@]}" </dev/null &
task=$!
trap terminated TERM
wait "$task"
code=$?
case $(field JobState) in CANCELLED | COMPLETING) exit "$code" ;; esac
case $code in
0) exec rm -f "$restarts" ;;
75) start_again "$code" 0 "preempted and saved" ;;
76) start_again "$code" 1 "a process is lost" ;;
213) start_again "$code" 1 "srun failed" ;;
esac
if ((code > 128 && code < 193)); then start_again "$code" 1 "a process was ended by signal $((code - 128))"; fi
echo "launch: exit code $code; the job ends and does not start again" >&2
exit "$code"
