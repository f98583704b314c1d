"""Jobs on this machine: all processes of a run, with CPU devices or this machine's GPUs, to debug a job of a cluster.

The launcher stays in the foreground: it prints the merged logs, starts the run again after exit codes 75 and 76, and
passes signals on. `status`, `logs` and `cancel` work from another terminal by the record in the run directory.
`render` is the same start as a shell script.
"""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from launch import local_processes, process_logs, record
from launch.job import JobSpec, SweepRun, run_directory, t5like_command
from launch.local_script import log_directory, script
from launch.record import Record
from t5like.checkpoint.step_directories import complete_steps
from t5like.errors import CheckpointError, ConfigError, printable
from t5like.io import streams


def check(job: JobSpec) -> None:
    """Refuse what one machine can't do.

    Raises:
        ConfigError: with the value that works.
    """
    if job.slices > 1 or (job.platform != "cpu" and job.nodes > 1):
        raise ConfigError(
            f"--accelerator={job.accelerator} has {job.slices * job.nodes} hosts, and launch local is one machine; "
            "use --accelerator=cpu --nodes=2 --fake_devices=4 to simulate hosts"
        )
    if job.fake_devices and job.platform != "cpu":
        raise ConfigError(f"--fake_devices={job.fake_devices} needs --accelerator=cpu; leave one of them out")
    if "://" in job.workdir and not job.log_directory:
        raise ConfigError(f"--workdir={job.workdir} can't hold the log files; use --log_directory=/tmp/logs")
    for secret in job.secrets:
        if secret.reference:
            raise ConfigError(
                f"--secret={secret.name}={secret.reference}: launch local takes the variable of this shell; "
                f"use --secret={secret.name}"
            )


def render(job: JobSpec) -> str:
    """Return a shell script that starts the job as `run` does."""
    return script(job)


def run(job: JobSpec) -> int:
    """Run a job, or all runs of its sweep one after another, to the end; returns the exit code.

    Raises:
        ConfigError: the interpreter, the working directory or a secret is missing.
        CheckpointError: the log files can't be written.
    """
    streams.ignore_lost_output()  # the results are files
    for secret in job.secrets:
        if secret.name not in os.environ:
            raise ConfigError(f"--secret={secret.name} is not set in this shell; use export {secret.name}=VALUE")
    with local_processes.record_signals() as signals:
        if not job.runs:
            return _run(job, None, signals)
        return _run_sweep(job, signals)


def _run_sweep(job: JobSpec, signals: local_processes.Signals) -> int:
    """Run all runs of a sweep, also after one has failed; returns the exit code of the first that failed."""
    codes, details = {}, {"runs": " ".join(each.name for each in job.runs)}
    _write_record(job, job.workdir, "", details)
    for number, each in enumerate(job.runs, 1):
        _say(f"run {number} of {len(job.runs)}: {each.name}")
        codes[each.name] = _run(job, each, signals)
        if signals.received:
            break
    failed = {name: code for name, code in codes.items() if code}
    code = next(iter(failed.values()), 0)
    if failed:
        names = ", ".join(f"{name} (exit code {code})" for name, code in failed.items())
        _say(f"{len(failed)} of {len(job.runs)} runs failed: {names}")
    _write_record(job, job.workdir, "", details | {"exit_code": str(code)})
    return code


def _run(job: JobSpec, sweep_run: SweepRun | None, signals: local_processes.Signals) -> int:
    """Run one run directory, with restarts; returns the exit code."""
    workdir, directory = run_directory(job, sweep_run), log_directory(job, sweep_run)
    command = shell_command(job, sweep_run)
    paths = [directory / f"process-{number}.log" for number in range(job.num_processes)]
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(
            f"{directory} can't be created: {error.strerror}; use --log_directory=/tmp/logs"
        ) from None
    logs = process_logs.MergedLogs(paths, sys.stdout, from_end=True)
    restarts = failures = 0
    step = newest_step(workdir)
    while True:
        processes = local_processes.start(job, command, paths)
        pids = " ".join(str(process.pid) for process in processes)
        details = {"processes": pids, "restarts": str(restarts)}
        _write_record(job, workdir, str(directory), details)
        try:
            ended = local_processes.wait(processes, signals, job.grace, logs.poll)
        finally:
            local_processes.end(processes)
        logs.poll(last=True)
        details |= {"exit_code": str(ended.code), "reason": ended.reason and _describe(job, ended)}
        details |= {"stopped": "true"} if signals.received else {}
        _write_record(job, workdir, str(directory), details)
        if ended.code not in (75, 76) or signals.received:
            if ended.code:
                _say(f"{_describe(job, ended)}; its log is {paths[ended.process]}")
            return ended.code
        # A preemption does not count, but one that comes before the next checkpoint would repeat for ever.
        before, step = step, newest_step(workdir)
        failures += ended.code == 76 or step == before
        if failures > job.retries:
            _say(f"{_describe(job, ended)}; no retry is left of --retries={job.retries}")
            return ended.code
        restarts += 1
        _say(f"{_describe(job, ended)}; starting again from step {step} ({failures} of {job.retries} retries used)")


def _describe(job: JobSpec, ended: local_processes.Ending) -> str:
    return f"process {ended.process} of {job.num_processes} {ended.reason}"


def _say(text: str) -> None:
    print(f"t5like: {printable(text)}", file=sys.stderr, flush=True)


def _write_record(job: JobSpec, workdir: str, logs: str, details: dict[str, str]) -> None:
    started = {"started": start_time(os.getpid())}
    record.write(Record("local", str(os.getpid()), job.name, workdir, logs, started | details))


def shell_command(job: JobSpec, sweep_run: SweepRun | None) -> list[str]:
    """Return the arguments of a process, with the lines of `setup` before it in a shell."""
    command = t5like_command(job, sweep_run)
    return ["bash", "-ec", "\n".join([*job.setup, 'exec "$@"']), "bash", *command] if job.setup else command


def newest_step(workdir: str) -> int:
    """Return the step of the newest complete checkpoint; 0 if there is none, or the run directory is not a path."""
    with contextlib.suppress(OSError):
        return max(complete_steps(Path(workdir) / "checkpoints"), default=0)
    return 0


# --- a job that runs, from another terminal ---------------------------------------------------------------------------


def status(found: Record) -> str:
    """Return a line for each process, or for each run of a sweep."""
    found = _complete(found)
    details = found.details
    if "runs" in details:
        return "\n".join(f"{name}  {_run_status(Path(found.workdir) / name)}" for name in details["runs"].split())
    restarts = f", {details.get('restarts', '0')} restarts"
    if code := details.get("exit_code"):
        waiting = code in ("75", "76") and "stopped" not in details and is_running(found)
        state = "restarts" if waiting else {"0": "done", "75": "preempted, saved"}.get(code, "failed")
        reason = f": {details['reason']}" if details.get("reason") else ""
        return printable(f"{found.full_id}  {state}, exit code {code}{restarts}{reason}")
    if not is_running(found):
        return printable(
            f"{found.full_id}  ended: the launcher was killed{restarts}; the same command continues the run"
        )
    pids = details.get("processes", "").split()
    return "\n".join(f"process {number}  running, pid {pid}{restarts}" for number, pid in enumerate(pids))


def _run_status(workdir: Path) -> str:
    """Return the state of a run of a sweep on one line."""
    if not (workdir / record.FILE).exists():
        return "not started"
    return status(record.find(str(workdir))).replace("\n", "; ")


def logs(found: Record, *, follow: bool) -> int:
    """Print the log files; with `follow`, until the run ends; returns its exit code, or 0 if it is not known."""
    found = _complete(found)
    paths = sorted(Path(found.logs).glob("process-*.log"), key=lambda path: (len(path.name), path.name))
    if "runs" in found.details:
        raise ConfigError(f"{found.workdir} is a sweep; use a run directory: {found.workdir}/NAME")
    if not paths:
        raise ConfigError(f"{found.logs} has no log files; use the run directory of a job that was started")
    merged = process_logs.MergedLogs(paths, sys.stdout)
    while follow and is_running(found):
        merged.poll()
        time.sleep(local_processes.POLL_SECONDS)
    merged.poll(last=True)
    return int(record.find(found.workdir).details.get("exit_code", "0")) if follow else 0


def cancel(found: Record) -> None:
    """Send SIGTERM to the launcher: the processes save and end.

    Raises:
        ConfigError: the job does not run.
    """
    found = _complete(found)
    if not is_running(found):
        raise ConfigError(f"{found.full_id} does not run any more; there is nothing to cancel")
    os.kill(int(found.id), signal.SIGTERM)


def _complete(found: Record) -> Record:
    """Return the record of a job that was named by the launcher's process number: that of its run directory.

    Raises:
        ConfigError: no launcher with that number runs.
    """
    if found.workdir:
        return found
    with contextlib.suppress(OSError, ConfigError):  # Linux only
        process = Path("/proc") / found.id
        for word in (process / "cmdline").read_text("utf-8", "replace").split("\0"):
            if word.startswith("--workdir="):
                other = record.find(str(process.joinpath("cwd").readlink() / word.removeprefix("--workdir=")))
                if other.id == found.id:
                    return other
    raise ConfigError(f"{found.full_id} is not a running job of launch local; use its run directory")


def is_running(found: Record) -> bool:
    """Whether the launcher of a record still runs; another process that got its number does not count."""
    return bool(started := found.details.get("started")) and start_time(int(found.id)) == started


def start_time(pid: int) -> str:
    """Return when a process started, as text; empty if it does not run."""
    if Path("/proc/self/stat").exists():
        try:
            fields = Path(f"/proc/{pid}/stat").read_text("utf-8", "replace").rpartition(")")[2].split()
        except OSError:
            return ""
        return "" if fields[0] == "Z" else fields[19]  # proc(5): state, starttime
    done = subprocess.run(["ps", "-o", "lstart=", "-p", str(pid)], capture_output=True, text=True, check=False)
    return done.stdout.strip()
