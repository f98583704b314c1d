"""Slurm: submit a job by sbatch, and look after it by scontrol, sacct and scancel. Called by `launch.main`.

`launch.sbatch_script` renders the script, which also decides after each exit code whether the job starts again.
"""

import contextlib
import glob
import os
import re
import sys
import time
from pathlib import Path
from typing import BinaryIO, NamedTuple

from launch import programs
from launch.job import JobSpec, check_name
from launch.record import Record, Submission
from launch.sbatch_script import check_options, log_directory, render_script
from t5like.errors import CheckpointError, ConfigError, one_line, printable, shorten, shown
from t5like.io.atomic import atomic_write

LONGEST_GRACE = 65535  # seconds; of sbatch's --signal
POLL_SECONDS = 2.0
ACTIVE = {
    "PENDING",
    "CONFIGURING",
    "RUNNING",
    "COMPLETING",
    "SUSPENDED",
    "REQUEUED",
    "RESIZING",
    "STOPPED",
    "STAGE_OUT",
}
NEEDED_FOR = "jobs of Slurm"


class Task(NamedTuple):
    """What Slurm reports about a job, or about one or more tasks of an array.

    Attributes:
        id: of the job, or ``ID_TASK``.
        state: in Slurm's words, such as RUNNING.
        reason: why it waits or has failed; may be empty.
        code: exit code; 128 + N after signal N.
        nodes: on which it runs or ran; may be empty.
        restarts: how often it started again; -1: unknown.
        log: path of its log; may be empty.
    """

    id: str
    state: str
    reason: str = ""
    code: int = 0
    nodes: str = ""
    restarts: int = -1
    log: str = ""


def check(job: JobSpec) -> None:
    """Refuse a job that Slurm can't run as it is described.

    Raises:
        ConfigError: naming the flag and a value that works.
    """
    if job.platform == "tpu" or job.slices > 1:
        raise ConfigError(f"--accelerator={job.accelerator} is no host of Slurm; use --accelerator=h100:8, or tpu_vm")
    if not 1 <= job.grace <= LONGEST_GRACE:
        raise ConfigError(f"--grace={job.grace} must be at least 1 and at most {LONGEST_GRACE} s; use --grace=120")
    if job.time_limit and job.grace >= job.time_limit:
        raise ConfigError(
            f"--grace={job.grace} s must be shorter than --time_limit={job.time_limit} s; "
            f"use --grace={max(job.time_limit // 2, 1)}"
        )
    for secret in job.secrets:
        if secret.reference:
            raise ConfigError(
                f"--secret={secret.name}={shown(secret.reference)}: Slurm takes it from the environment of sbatch; "
                f"use --secret={secret.name}"
            )
    _check_container(job)
    check_options(job)


def _check_container(job: JobSpec) -> None:
    if bool(job.image) != bool(job.container):
        have, need = ("image", "container=pyxis") if job.image else ("container", "image=registry.example/t5like:1.0")
        raise ConfigError(f"--{have}={getattr(job, have)} needs --{need}")
    if job.mounts and not job.container:
        raise ConfigError(f"--mount={job.mounts[0].source} needs a container; leave it out, or use --container=pyxis")
    if job.container == "pyxis" and "@" in job.image:
        raise ConfigError(
            f"--image={job.image}: Pyxis takes a tag, not a digest; use --image=registry.example/t5like:1.0"
        )
    for mount in job.mounts:
        if not mount.source.startswith("/"):
            raise ConfigError(
                f"--mount={shown(mount.source)} must be a directory of the hosts; use --mount=/data:/data"
            )
    if job.container:
        paths = [path for mount in job.mounts for path in (mount.source, mount.path)]
        for path in (*paths, job.workdir, job.compile_cache):
            if path.startswith("/") and re.search("[,:]", path):
                raise ConfigError(f"{shown(path)} has a comma or colon, which separate mounts; use another directory")


def render(job: JobSpec) -> str:
    """Return the batch script."""
    return render_script(job)


def submit(job: JobSpec, text: str) -> Submission:
    """Submit the batch script; it is kept beside the logs, as ``NAME.sh``.

    Raises:
        ConfigError: sbatch is missing or refuses the job; nothing is submitted.
        CheckpointError: a directory of the job can't be written.
    """
    programs.find("sbatch", needed_for=NEEDED_FOR)
    for secret in job.secrets:
        if not os.environ.get(secret.name):
            raise ConfigError(f"--secret={secret.name} is not set in this shell; export {secret.name} first")
    check_partition(job)
    logs = log_directory(job)
    missing = [path for path in (logs, job.workdir) if not os.path.exists(path)]
    try:
        os.makedirs(logs, exist_ok=True)  # otherwise the job fails, without a log
    except OSError as error:
        raise CheckpointError(f"{logs} can't be created: {error.strerror}; use another --log_directory") from None
    path = Path(logs) / f"{job.name}.sh"
    with atomic_write(path, CheckpointError, "use another --log_directory") as file:
        os.fchmod(file.fileno(), 0o600)
        file.write(text.encode())
    result = programs.run(["sbatch", "--parsable", str(path)], needed_for=NEEDED_FOR)
    number = result.output.strip().partition(";")[0]
    if result.code or not number.isdecimal():
        path.unlink(missing_ok=True)
        for directory in missing:
            with contextlib.suppress(OSError):  # another job writes there
                os.rmdir(directory)
        reason = printable(" ".join(result.errors.replace("sbatch: ", "").split()), longest=300)
        raise ConfigError(f"sbatch refused the job: {reason}; nothing was submitted")
    log = f"{logs}/{job.name}-{number}{'_*' if job.runs else ''}.log"
    lines = {
        "follow": f"tail -n +1 -F {log}",
        "status": f"scontrol show job {number}",
        "cancel": f"scancel {number}",
    }
    return Submission(number, lines, logs=log)


def check_partition(job: JobSpec) -> None:
    """Refuse a partition that does not exist or is too small; sbatch would put the job into the queue forever."""
    result = programs.run(["sinfo", "--all", "--noheader", "--format=%P|%F"], needed_for=NEEDED_FOR)
    if result.code:
        reason = printable(" ".join(result.errors.split()), longest=300)
        raise ConfigError(f"sinfo can't reach Slurm: {reason}; submit on a login node of the cluster")
    rows = [line.strip().rpartition("|") for line in result.output.splitlines()]
    sizes = {name.rstrip("*"): int(nodes.rpartition("/")[2]) for name, _, nodes in rows}
    default = [name.rstrip("*") for name, _, _ in rows if name.endswith("*")]
    names = job.partition.split(",") if job.partition else default
    if unknown := [name for name in names if name not in sizes]:
        raise ConfigError(f"--partition={unknown[0]} does not exist; use one of {shorten(sizes)}")
    if names and job.nodes > (largest := max(sizes[name] for name in names)):
        raise ConfigError(
            f"--nodes={job.nodes} must be at most {largest}, all of {job.partition or names[0]}; use --nodes={largest}"
        )


def status(record: Record) -> str:
    """Return the state of the job, one line per task of an array."""
    lines = []
    for task in _tasks(record):
        line = f"slurm:{task.id}  {task.state}"
        line += f" ({task.reason})" * bool(task.reason)
        line += f" on {task.nodes}" * bool(task.nodes)
        line += f", exit code {task.code}" * (task.state not in ACTIVE)
        line += f", restarts {task.restarts}" * (task.restarts >= 0)
        lines.append(printable(line))
    return "\n".join(lines)


def _tasks(record: Record) -> list[Task]:
    """Return what Slurm reports: the controller forgets a job minutes after its end, then accounting is asked.

    Raises:
        ConfigError: Slurm does not know the job.
    """
    check_name("slurm", record.id, pattern="[0-9]+(_[0-9]+)?", example="slurm:1234")
    command = ["scontrol", "--oneliner", "show", "job", record.id]
    result = programs.run(command, needed_for=NEEDED_FOR)
    if result.code == 0:
        return [_parse(line) for line in result.output.splitlines() if line.startswith("JobId=")]
    fields = "--format=JobID,State,ExitCode,NodeList"
    account = programs.run(["sacct", "-X", "-n", "-P", "-j", record.id, fields], needed_for=NEEDED_FOR)
    rows = [line.split("|") for line in account.output.splitlines() if line.count("|") == 3]
    if account.code or not rows:
        reason = printable(" ".join(result.errors.split()), longest=300) or "scontrol printed no reason"
        raise ConfigError(f"slurm:{record.id} is not known to Slurm: {reason}; if it has ended, see its log")
    return [Task(name, state.split(" ")[0], "", _code(code), nodes) for name, state, code, nodes in rows]


def _parse(line: str) -> Task:
    """Return what one line of ``scontrol --oneliner show job`` contains."""
    fields: dict[str, str] = {}
    for name, value in re.findall(r"(?:^| )([A-Za-z]+)=(\S*)", line):
        fields.setdefault(name, "" if value in ("(null)", "None") else value)
    number = fields["JobId"]
    if "ArrayTaskId" in fields:
        number = f"{fields['ArrayJobId']}_{fields['ArrayTaskId']}"
    state, reason = fields["JobState"], fields.get("Reason", "")
    restarts, log = int(fields.get("Restarts") or -1), fields.get("StdOut", "")
    return Task(number, state, reason, _code(fields.get("ExitCode", "0:0")), fields.get("NodeList", ""), restarts, log)


def _code(text: str) -> int:
    """Return the exit code of Slurm's ``CODE:SIGNAL``."""
    code, _, number = text.partition(":")
    return 128 + int(number) if number not in ("", "0") else int(code)


def logs(record: Record, *, follow: bool) -> int:
    """Print the log, with `follow` until the job ends; returns the exit code of the job, or 0.

    Raises:
        ConfigError: there is no log yet.
    """
    if not follow:
        paths = _log_files(record, [])
        if not any(os.path.exists(path) for path in paths):
            raise ConfigError(f"slurm:{record.id} has no log yet; see launch status slurm:{record.id}")
    files: dict[str, BinaryIO] = {}
    last, before = "", None
    while True:
        tasks = _tasks(record) if follow else []
        now = {task.id: task.state for task in tasks}
        if now != before and follow:
            print(printable(", ".join(f"slurm:{name} is {state}" for name, state in now.items())), file=sys.stderr)
        before = now
        for path in _log_files(record, tasks):
            if path not in files and os.path.exists(path):
                files[path] = open(path, "rb")  # noqa: SIM115 - read on until the job ends
        for path, file in files.items():
            last = _print_new(path, file, last, several=len(files) > 1)
        if not any(task.state in ACTIVE for task in tasks):
            return max((task.code for task in tasks), default=0)
        time.sleep(POLL_SECONDS)


def _log_files(record: Record, tasks: list[Task]) -> list[str]:
    if record.logs:
        return sorted(glob.glob(record.logs)) or [record.logs]
    return [task.log for task in tasks or _tasks(record) if task.log]


def _print_new(path: str, file: BinaryIO, last: str, *, several: bool) -> str:
    """Print what was added to a log, below its name if another one was printed before; returns the last one's name."""
    if not (added := file.read()):
        return last
    if several and path != last:
        print(f"==> {path} <==")
    sys.stdout.write(added.decode(errors="replace"))
    sys.stdout.flush()
    return path


def cancel(record: Record) -> None:
    """End the job; it gets SIGTERM, and saves if the cluster's KillWait is long enough.

    Raises:
        ConfigError: Slurm refuses.
    """
    check_name("slurm", record.id, pattern="[0-9]+(_[0-9]+)?", example="slurm:1234")
    result = programs.run(["scancel", record.id], needed_for=NEEDED_FOR)
    if result.code or result.errors.strip():
        raise ConfigError(f"slurm:{record.id} can't be cancelled: {one_line(RuntimeError(result.errors))}")
