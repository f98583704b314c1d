"""Render a job as a batch script of Slurm: a pure function of the `JobSpec`. Called by `launch.slurm`.

Options of sbatch are comments that begin with ``#SBATCH``. They know no safe quoting, so `check_options` accepts only
values of plain characters there. All other values are words of bash, quoted by `shlex.quote`.

Sources: the manual pages of sbatch, srun and scontrol (22.05), the README of Pyxis, the manual of `apptainer exec`, and
trials on a real Slurm (`tests/cluster`), which the comments of the script mention.
"""

import re
import shlex

from launch.job import JobSpec, Mount, SweepRun, check_name, run_directory, t5like_command
from t5like.errors import ConfigError, shown

NAMES = r"[A-Za-z0-9][A-Za-z0-9_.,:=@/&|!()\[\]*+-]*"  # of accounts, partitions, constraints, generic resources
PATHS = r"/[A-Za-z0-9_./@+=:,-]*"  # of log files; % would be a pattern of Slurm
SRUN_FAILED = 213  # srun's exit code for failures of Slurm; t5like and signals use others
SECONDS_TO_END = 60  # between the ends of the first and the last task; t5like ends all within seconds


def render_script(job: JobSpec) -> str:
    """Return the batch script of a job; `sbatch SCRIPT` submits it."""
    sections = (_options(job), _environment(job), _run(job), _step(job))
    return "\n".join(line for section in sections for line in ("", *section))[1:] + "\n" + RESTARTS


def log_directory(job: JobSpec) -> str:
    """Return the directory of the log files."""
    return (job.log_directory or f"{job.workdir}/logs").rstrip("/")


def check_options(job: JobSpec) -> None:
    """Refuse values that an option of sbatch can't carry.

    Raises:
        ConfigError: naming the flag and a value that works.
    """
    examples = {
        "account": "--account=research",
        "partition": "--partition=gpu",
        "qos": "--qos=normal",
        "reservation": "--reservation=maintenance",
        "constraint": "--constraint=a100",
        "gres": "--gres=gpu:a100:8",
    }
    for field, example in examples.items():
        if value := getattr(job, field):
            check_name(f"--{field}", value, pattern=NAMES, example=example)
    if "://" in log_directory(job):
        raise ConfigError(
            f"--workdir={shown(job.workdir)} is no directory of the hosts, where Slurm writes logs; "
            "add --log_directory=/shared/logs"
        )
    check_name("--log_directory", log_directory(job), pattern=PATHS, example="--log_directory=/shared/logs")


def _options(job: JobSpec) -> list[str]:
    gpus = f"--gres={job.gres}" if job.gres else f"--gpus-per-node={job.gpus_per_node}" * bool(job.gpus_per_node)
    identity = ("account", "partition", "qos", "reservation", "constraint")
    options = [
        f"--job-name={job.name}",
        *(f"--{field}={getattr(job, field)}" for field in identity if getattr(job, field)),
        f"--nodes={job.nodes}",
        f"--ntasks-per-node={job.processes_per_node}",
        f"--cpus-per-task={job.cpus_per_process}" * bool(job.cpus_per_process),
        f"--mem={job.memory_gib}G" * bool(job.memory_gib),
        gpus,
        f"--time={_duration(job.time_limit)}" * bool(job.time_limit),
        f"--signal=TERM@{job.grace}",
        "--requeue",
        "--open-mode=append",
        f"--array=0-{len(job.runs) - 1}" * bool(job.runs),
        f"--output={log_directory(job)}/{job.name}-{'%A_%a' if job.runs else '%j'}.log",
        f"--export={','.join(secret.name for secret in job.secrets) or 'NONE'}",
    ]
    head = [
        "#!/bin/bash",
        "# A job of t5like for Slurm: `sbatch THIS_FILE` submits it. The directory of --output must exist.",
    ]
    return [*head, *(f"#SBATCH {option}" for option in options if option)]


def _duration(seconds: int) -> str:
    """Return a time limit as HOURS:MINUTES:00; Slurm counts minutes."""
    minutes = -(-seconds // 60)
    return f"{minutes // 60}:{minutes % 60:02}:00"


def _environment(job: JobSpec) -> list[str]:
    """Return the lines that set the environment of the tasks; values of secrets come from the submitting shell."""
    variables = {"PYTHONUNBUFFERED": "1"}
    if job.compile_cache:
        variables["JAX_COMPILATION_CACHE_DIR"] = job.compile_cache
    variables |= dict(job.env)
    lines = ["# The environment: the login shell's, the variables named by --export above, and these."]
    lines += [f"export {name}={shlex.quote(value)}" for name, value in variables.items()]
    lines += [f': "${{{secret.name}:?is not set in the shell that submitted the job}}"' for secret in job.secrets]
    if job.directory and not job.container:
        lines.append(f"cd -- {shlex.quote(job.directory)} || exit 2")
    return [*lines, *job.setup]


def _run(job: JobSpec) -> list[str]:
    """Return the lines that set the command and its run directory; one pair for each run of a sweep."""
    lines = [
        "# What runs, and how often it starts again after a failure.",
        f"retries={job.retries}",
        f"logs={shlex.quote(log_directory(job))}",
    ]
    if not job.runs:
        return [*lines, *_command(job, None)]
    lines.append('case "$SLURM_ARRAY_TASK_ID" in')
    for index, run in enumerate(job.runs):
        lines += [f"{index})", *(f"    {line}" for line in _command(job, run)), "    ;;"]
    return [*lines, "esac"]


def _command(job: JobSpec, run: SweepRun | None) -> list[str]:
    return [f"workdir={shlex.quote(run_directory(job, run))}", f"command=({shlex.join(t5like_command(job, run))})"]


def _step(job: JobSpec) -> list[str]:
    """Return the lines that set `step`: srun, its options and the start of the container."""
    options = [
        f"--nodes={job.nodes}",
        f"--ntasks={job.nodes * job.processes_per_node}",
        f"--ntasks-per-node={job.processes_per_node}",
        f"--cpus-per-task={job.cpus_per_process}" * bool(job.cpus_per_process),
        "--mpi=none",
        "--export=ALL",
        "--label" * (job.num_processes > 1),
        "--kill-on-bad-exit=0",
        f"--wait={SECONDS_TO_END}",
    ]
    lines = [
        "# One task per process. Each sees all GPUs of its host, and t5like shares them. When one task has ended, the",
        f"# others have {SECONDS_TO_END} s to end. --kill-on-bad-exit=1 would kill them while they save, and srun",
        "# would return their signal instead of the exit code.",
        "step=(",
        "    srun " + " ".join(option for option in options if option),
    ]
    lines += [*(f"    {shlex.join(words)}" for words in _container(job)), ")"]
    if job.container and (mounts := _own_mounts(job)):  # what is mounted must exist
        lines.append(shlex.join(["mkdir", "-p", "--", *(mount.source for mount in mounts)]))
    return lines


def _container(job: JobSpec) -> list[list[str]]:
    """Return the words between the options of srun and the command, which start it in the image."""
    mounts = [*job.mounts, *_own_mounts(job)]
    if job.container == "pyxis":
        volumes = ",".join(f"{mount.source}:{mount.path}" + ":ro" * mount.read_only for mount in mounts)
        words = [[f"--container-image={pyxis_image(job.image)}"], [f"--container-mounts={volumes}"]]
        return [*words, [f"--container-workdir={job.directory}"]] if job.directory else words
    if job.container == "apptainer":
        image = job.image if job.image.startswith("/") else f"docker://{job.image}"
        words = [["apptainer", "exec", *["--nv"] * (job.platform == "gpu")]]
        words += [["--bind", f"{mount.source}:{mount.path}" + ":ro" * mount.read_only] for mount in mounts]
        return [*words, *([["--pwd", job.directory]] if job.directory else []), [image]]
    return []


def _own_mounts(job: JobSpec) -> list[Mount]:
    """Return mounts of the directories that t5like writes, unless they lie below a mount of the job."""
    mounted = [mount.path.rstrip("/") for mount in job.mounts]
    inside = lambda path: any(path == mount or path.startswith(f"{mount}/") for mount in mounted)
    own = [path for path in (job.workdir, job.compile_cache) if path.startswith("/") and not inside(path)]
    return [Mount(path, path) for path in own]


def pyxis_image(image: str) -> str:
    """Return an image in enroot's notation, which separates the registry by ``#``: ``registry.example#t5like:1.0``."""
    registry, slash, rest = image.partition("/")
    if registry and slash and re.search(r"[.:]|^localhost$", registry):
        return f"{registry}#{rest}"
    return image


RESTARTS = rf"""
# Exit codes of t5like: 0 done; 75 preempted and saved, 76 a process was lost: the same command continues the run;
# 2 config, 3 data, 4 storage, 5 diverged, 70 internal error: it would fail again. Above 128: ended by a signal.
export SLURM_EXIT_ERROR={SRUN_FAILED} # of srun, if Slurm could not start the tasks
job=${{SLURM_ARRAY_JOB_ID:+${{SLURM_ARRAY_JOB_ID}}_$SLURM_ARRAY_TASK_ID}}
job=${{job:-$SLURM_JOB_ID}}
restarts=$logs/$SLURM_JOB_NAME-$job.restarts # contains how many restarts of the job count

newest_checkpoint() {{ # prints its step; -1: there is none; nothing: the run directory is not on this host
    local path newest=-1
    [[ $workdir == /* ]] || return 0
    for path in "$workdir"/checkpoints/*/commit_success.txt; do # of complete checkpoints
        path=${{path%/*}} path=${{path##*/}}
        if [[ $path =~ ^[0-9]+$ ]] && ((10#$path > newest)); then newest=$((10#$path)); fi
    done
    echo "$newest"
}}

field() {{ # NAME: prints a field of the job
    scontrol --oneliner show job "$job" | grep --only-matching " $1=[^ ]*" | head -n 1 | cut -d = -f 2
}}

start_again() {{ # CODE COUNTS REASON: puts the job into the queue again, or ends it with CODE
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
}}

# Slurm ends the job: by scancel, its time limit, a preemption, or because a host is lost. After the last two it puts
# the job into the queue again, because of --requeue; after the time limit it does not.
terminated() {{
    trap '' TERM
    if [[ $(field Reason) == TimeLimit ]]; then start_again 143 0 "the time limit is over"; fi
    wait "$task"
    exit 143
}}

failures=0
if [[ -f $restarts ]]; then read -r failures <"$restarts"; fi
at_start=$(newest_checkpoint)
echo "launch: $(date '+%F %T') job $job on $SLURM_JOB_NODELIST, restart ${{SLURM_RESTART_COUNT:-0}}" >&2
"${{step[@]}}" "${{command[@]}}" </dev/null &
task=$!
trap terminated TERM
wait "$task"
code=$?
case $(field JobState) in CANCELLED | COMPLETING) exit "$code" ;; esac
case $code in
0) exec rm -f "$restarts" ;;
75) start_again "$code" 0 "preempted and saved" ;;
76) start_again "$code" 1 "a process is lost" ;;
{SRUN_FAILED}) start_again "$code" 1 "srun failed" ;;
esac
if ((code > 128 && code < 193)); then start_again "$code" 1 "a process was ended by signal $((code - 128))"; fi
echo "launch: exit code $code; the job ends and does not start again" >&2
exit "$code"
"""
