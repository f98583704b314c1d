"""The shell script that starts a job on this machine as `launch.local` does: `t5like launch local --dry_run`."""

import shlex
from pathlib import Path

from launch.job import JobSpec, SweepRun, run_directory, t5like_command
from launch.local_processes import environment, rank_environment

PORT = 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'
SECRET = "od -An -N16 -tx1 /dev/urandom | tr -d ' \\n'"
# Restarts as in `local`: codes 75 and 76 and a killed process start the same command again; 75 with a new checkpoint
# does not count. If one process fails, the others end by themselves: each notices a lost process.
RUN = """\
stopped=0 pids=()
stop() {{ stopped=1; kill -TERM ${{pids[@]+"${{pids[@]}}"}} 2>/dev/null; }}
trap stop INT TERM HUP USR1

# run WORKDIR LOGS COMMAND...: all processes of one run, with restarts; returns its exit code
run() {{
  local workdir=$1 logs=$2 failures=0 step before process pid code result
  shift 2
  mkdir -p "$logs" || return 4
  echo "logs in $logs" >&2
  step=$(newest "$workdir")
  while :; do
{rendezvous}    pids=()
    for ((process = 0; process < {processes}; process++)); do
      {rank}"$@" >>"$logs/process-$process.log" 2>&1 </dev/null &
      pids+=($!)
    done
    code=0
    for pid in "${{pids[@]}}"; do
      wait "$pid"
      while kill -0 "$pid" 2>/dev/null; do wait "$pid"; done  # a signal interrupts wait
      wait "$pid"; result=$?  # bash keeps the exit code
      [ $result -le 128 ] || result=76
      case $code,$result in
        *,0 | 76,75) ;;
        0,* | 75,* | 76,*) code=$result ;;  # an error that would come again stays
      esac
    done
    case $code in 75 | 76) ;; *) return $code ;; esac
    [ $stopped = 0 ] || return $code
    before=$step step=$(newest "$workdir")
    [ $code = 75 ] && [ "$step" != "$before" ] || failures=$((failures + 1))
    [ $failures -le {retries} ] || return $code
    echo "exit code $code; starting again from step ${{step:-0}}" >&2
  done
}}

# prints the step of the newest complete checkpoint
newest() {{
  cd "$1/checkpoints" 2>/dev/null || return 0
  ls -d [0-9]*/commit_success.txt 2>/dev/null | sort -n | tail -n 1 | tr -dc 0-9
}}
"""


def script(job: JobSpec) -> str:
    """Return the script; every value in it is quoted, except the lines of `setup`."""
    lines = [
        "#!/usr/bin/env bash",
        f"# {job.name}: as t5like launch local starts it, {job.num_processes} processes of this machine.",
        "set -u",
        *(f"export {name}={shlex.quote(value)}" for name, value in environment(job).items()),
    ]
    for secret in job.secrets:
        lines.append(
            f'[ -n "${{{secret.name}+set}}" ] || {{ echo "{secret.name} is not set in this shell" >&2; exit 2; }}'
        )
        lines.append(f"export {secret.name}")
    if job.directory:
        lines.append(f"cd {shlex.quote(job.directory)} || exit 2")
    lines += [*job.setup, "", RUN.format(**_parts(job))]
    if not job.runs:
        return "\n".join([*lines, _call(job, None), ""])
    lines.append("first=0")
    for each in job.runs:
        lines.append(f"[ $stopped = 1 ] || {{ {_call(job, each)}; code=$?; [ $first != 0 ] || first=$code; }}")
    return "\n".join([*lines, "exit $first", ""])


def _parts(job: JobSpec) -> dict[str, str | int]:
    rendezvous = ""
    if job.num_processes > 1:
        port = f"{shlex.quote(job.python)} -c {shlex.quote(PORT)}"
        rendezvous = f"    T5LIKE_COORDINATOR=127.0.0.1:$({port})\n    T5LIKE_RENDEZVOUS_SECRET=$({SECRET})\n"
        rendezvous += "    export T5LIKE_COORDINATOR T5LIKE_RENDEZVOUS_SECRET\n"
    rank = "".join(f"{name}=$process " for name in rank_environment(job, 0))
    return {"rendezvous": rendezvous, "processes": job.num_processes, "rank": rank, "retries": job.retries}


def _call(job: JobSpec, sweep_run: SweepRun | None) -> str:
    logs = log_directory(job, sweep_run)
    arguments = [run_directory(job, sweep_run), str(logs), *t5like_command(job, sweep_run)]
    return " ".join(["run", *map(shlex.quote, arguments)])


def log_directory(job: JobSpec, sweep_run: SweepRun | None) -> Path:
    """Return the directory of a run's log files."""
    if not job.log_directory:
        return Path(run_directory(job, sweep_run)) / "logs"
    return Path(job.log_directory) / (sweep_run.name if sweep_run else "")
