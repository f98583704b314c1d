"""Backend of TPU VMs: queued resources of Google Cloud, by the commands of `gcloud`.

`render` returns one bash script that does everything: it creates the TPU VMs, waits for them, starts the command on all
workers, prints the log of worker 0, creates them again after a preemption, and deletes them at the end. `submit` writes
that script beside its log into `state_directory()` and starts it there, as a process of this machine that supervises
the job. The run itself is a session of its own on the workers: it continues if the supervising process or its
connection is lost, and ``bash SCRIPT attach`` supervises it again.
"""

import json
import os
import re
import shlex
import signal
import socket
import sys
import time
from pathlib import Path
from typing import Any

from launch import programs
from launch.accelerators import accelerator_type
from launch.flag_values import REFERENCES
from launch.job import JobSpec, check_name, check_text, storage_that_fits
from launch.record import Record, Submission
from launch.tpu_vm_script import END_OF_WORKER, is_wheel, location, nodes, supervisor_script
from t5like.errors import ConfigError, printable, shown
from t5like.io.paths import expand
from t5like.io.strict_json import loads

NEEDED_FOR = "TPU VMs"
SAID = "t5like launch: "  # begins the lines of the supervising script
ACCEPTED = " was accepted"  # the line after which the supervising script needs no one
HEREDOC_ENDS = (END_OF_WORKER, "END_OF_UPLOAD")
IMAGE = r"[a-z0-9][A-Za-z0-9./_-]*(:[0-9]+/[A-Za-z0-9./_-]+)?(:[\w.-]+|@sha256:[0-9a-f]{64})"
NAME = r"[a-z]([a-z0-9-]*[a-z0-9])?"


def check(job: JobSpec) -> None:
    """Refuse what TPU VMs can't do.

    Raises:
        ConfigError: a field is missing or does not fit.
    """
    if job.platform != "tpu":
        raise ConfigError(f"--accelerator={job.accelerator} is no TPU; use --accelerator=v5e:4x4, or another backend")
    accelerator_type(job.topology)
    check_name("--name", job.name, pattern=NAME, example="--name=mine")
    check_name("--zone", job.zone, pattern=NAME, example="--zone=us-west4-a")
    for field, pattern, example in (
        ("project", r"[a-z][a-z0-9.:-]*", "--project=my-project"),
        ("runtime_version", r"[a-z][a-z0-9.-]*", "--runtime_version=v2-alpha-tpuv5-lite"),
        ("network", r"[a-z][a-zA-Z0-9./-]*", "--network=default"),
        ("service_account", r"[a-zA-Z0-9-]+@[a-z0-9.-]+", "--service_account=NAME@PROJECT.iam.gserviceaccount.com"),
        ("image", IMAGE, "--image=registry.example/PROJECT/REPOSITORY/t5like:1.0"),
    ):
        if value := getattr(job, field):
            check_name(f"--{field}", value, pattern=pattern, example=example)
    if job.spot and job.reserved:
        raise ConfigError("--spot and --reserved exclude each other; use one of them")
    if job.processes_per_node != 1:
        raise ConfigError(f"--processes_per_node={job.processes_per_node} must be 1 on TPUs; leave it out")
    if job.fake_devices:
        raise ConfigError("--fake_devices would leave the TPUs unused; leave it out")
    _check_software(job)
    _check_storage(job)


def _check_software(job: JobSpec) -> None:
    if not (job.image or job.install or job.setup):
        raise ConfigError(
            "TPU VMs start without t5like; use --image=IMAGE:TAG, --install=dist/t5like-0.1.0-py3-none-any.whl "
            "(`python -m pip wheel --no-deps --wheel-dir=dist .` makes it), or --setup"
        )
    if job.image and job.install:
        raise ConfigError("--install goes without --image, which has t5like; use one of them")
    check_text("--install", job.install)
    if job.install.startswith("-") or (is_wheel(job.install) and ":" in job.install):
        raise ConfigError(f"--install={shown(job.install)} must be a requirement or a wheel; use --install=t5like[tpu]")
    for line in job.setup:
        if check_text("--setup", line).strip() in HEREDOC_ENDS:
            raise ConfigError(f"--setup={line} is a line of the script itself; use another")
    for secret in job.secrets:
        check_name(
            f"--secret={secret.name}",
            secret.reference,
            pattern=r"[A-Za-z0-9_-]{1,255}",
            example=f"--secret={secret.name}{REFERENCES['tpu_vm']}",
        )
    for text in (*job.command, job.python, *(part for pair in job.env for part in pair)):
        check_text("a value of the job", text)


def _check_storage(job: JobSpec) -> None:
    for mount in job.mounts:
        what = f"--mount={mount.source}:{mount.path}"
        if mount.source.startswith("gs://"):
            use = storage_that_fits(mount.source, pattern := r"gs://[a-z0-9][a-z0-9._-]*", "gs://my-bucket")
            check_name(what, mount.source, pattern=pattern, example=f"--mount={use}:{mount.path}")
        elif not mount.source.startswith("/"):
            raise ConfigError(f"{what} must be gs://BUCKET or a path of the TPU VMs; use --mount=gs://BUCKET:/mnt/runs")
        elif not job.image and mount.source != mount.path:
            raise ConfigError(f"{what} needs a container; use --mount={mount.source}:{mount.source}")
        for path in (mount.source, mount.path):
            check_text(what, path)
            if ":" in path.removeprefix("gs://"):
                raise ConfigError(f"{what} must be paths without colons; use --mount=gs://BUCKET:/mnt/runs")
        if not mount.path.startswith("/"):
            raise ConfigError(f"{what} must end in an absolute path; use --mount=gs://BUCKET:/mnt/runs")
    check_text("--workdir", job.workdir)
    for field, path in (("directory", job.directory), ("compile_cache", job.compile_cache)):
        check_text(f"--{field}", path)
        if path and not path.startswith("/"):
            raise ConfigError(f"--{field}={shown(path)} must be an absolute path of the TPU VMs; use --{field}=/mnt/x")
    shared = [mount.path.rstrip("/") for mount in job.mounts if not mount.read_only]
    if not any(os.path.normpath(job.workdir).startswith(f"{path}/") for path in shared):
        raise ConfigError(
            f"--workdir={shown(job.workdir)} is not on storage that the TPU VMs share and that outlives them; use "
            "--mount=gs://BUCKET:/mnt/runs and --workdir=/mnt/runs/NAME, or --mount=/mnt/nfs:/mnt/nfs for a file "
            "system that --setup mounts"
        )


def render(job: JobSpec) -> str:
    """Return the script that runs the whole job; it needs bash and gcloud only."""
    return supervisor_script(job)


def state_directory() -> Path:
    """Return the directory of scripts and logs of the jobs that this machine supervises."""
    return expand(os.environ.get("XDG_STATE_HOME") or "~/.local/state") / "t5like" / "launch"


def submit(job: JobSpec, text: str) -> Submission:
    """Start the script as a process that outlives this one, and return when Google Cloud has accepted the request.

    Raises:
        ConfigError: gcloud is missing, or the request was refused; nothing is left then.
    """
    programs.find("gcloud", needed_for=NEEDED_FOR)
    if is_wheel(job.install) and not Path(job.install).is_file():
        raise ConfigError(
            f"--install={shown(job.install)} is no file; use python -m pip wheel --no-deps --wheel-dir=dist ."
        )
    directory = state_directory()
    directory.mkdir(parents=True, exist_ok=True, mode=0o700)
    script, log = directory / f"{job.name}.sh", directory / f"{job.name}.log"
    if (pid := supervisor(job.name)) is not None:
        raise ConfigError(f"--name={job.name} is a job that process {pid} supervises; use another --name, or cancel it")
    script.write_text(text, encoding="utf-8")
    script.chmod(0o700)
    process = programs.start(["bash", str(script)], log=log, needed_for=NEEDED_FOR)
    details = {"project": job.project, "node": nodes(job)[0]}
    supervised = {"pid": process.pid, "host": socket.gethostname(), "zone": job.zone, "details": details}
    (directory / f"{job.name}.json").write_text(json.dumps(supervised), encoding="utf-8")
    try:
        while process.poll() is None and ACCEPTED not in _lines(log):
            time.sleep(0.05)
    except BaseException:
        process.terminate()
        process.wait()
        raise
    if process.poll() not in (None, 0):
        raise ConfigError(_refusal(_lines(log)))
    lines = {
        "follow": f"tail -F {shlex.quote(str(log))}",
        "status": f"gcloud compute tpus queued-resources describe {job.name} {' '.join(location(job))}",
        "cancel": f"kill {process.pid}",
        "attach": f"bash {shlex.quote(str(script))} attach",
    }
    return Submission(f"{job.zone}/{job.name}", lines, str(log), details)


def _lines(log: Path) -> str:
    return log.read_text(encoding="utf-8", errors="replace")


def _refusal(printed: str) -> str:
    """The lines of a script that ended early, without those about the clean-up, as one message."""
    lines = [line.removeprefix(SAID) for line in printed.splitlines()]
    lines = [line for line in lines if line and not re.match(r"requesting |deleting |ended with ", line)]
    return printable("; ".join(lines) or "the script ended without a message", longest=1000)


def supervisor(name: str) -> int | None:
    """Return the process of this machine that supervises a job; None if there is none."""
    submitted = submission(name)
    if submitted.get("host") != socket.gethostname():
        return None
    pid = submitted["pid"]
    try:
        os.kill(pid, 0)
        command = Path(f"/proc/{pid}/cmdline")  # another process may have the number now
        return None if command.exists() and f"/{name}.sh".encode() not in command.read_bytes() else pid
    except OSError:
        return None


def submission(name: str) -> dict[str, Any]:
    """Return what `submit` wrote about a job that this machine submitted last under this name; empty without one."""
    try:
        return loads((state_directory() / f"{name}.json").read_bytes())
    except (OSError, ValueError):
        return {}


def found(record: Record) -> tuple[str, list[str], str]:
    """Return the name of a record's job, the flags that say where its TPU VMs are, and the name of its first slice.

    Raises:
        ConfigError: its id is not ``ZONE/NAME``.
    """
    check_name("tpu_vm:ID", record.id, pattern=f"{NAME}/{NAME}", example="tpu_vm:us-west4-a/mine")
    zone, _, name = record.id.partition("/")
    submitted = submission(name)
    details = record.details or (submitted["details"] if submitted.get("zone") == zone else {})
    project = details.get("project")
    place = [f"--zone={zone}", *([f"--project={project}"] if project else []), "--quiet"]
    return name, place, details.get("node", name)


def status(record: Record) -> str:
    """Return the state of the request, and the last line of the supervising process."""
    name, place, _ = found(record)
    describe = ["gcloud", "compute", "tpus", "queued-resources", "describe", name, *place]
    reply = programs.run([*describe, "--format=value(state.state)"], needed_for=NEEDED_FOR)
    if reply.code == 0:
        state = reply.output.strip()
    elif re.search("not.found", reply.errors, re.IGNORECASE):
        state = "no TPU VMs: done, cancelled or never created"
    else:
        state = f"gcloud failed: {_last(reply.errors)}"
    pid, log = supervisor(name), state_directory() / f"{name}.log"
    printed = [line for line in _lines(log).splitlines() if line.startswith(SAID)] if log.exists() else []
    supervised = f"supervised by process {pid}" if pid else "no supervising process on this machine"
    last = f"; last: {printed[-1].removeprefix(SAID)}" if printed else ""
    return printable(f"{record.full_id}  {state}; {supervised}{last}")


def logs(record: Record, *, follow: bool) -> int:
    """Print the log of the supervising process, which contains that of worker 0; without it, ask worker 0.

    Returns:
        With `follow`, the exit code of the job if it is supervised here.
    """
    name, place, node = found(record)
    log = state_directory() / f"{name}.log"
    if not log.exists():
        command = f"tail -n +1 {'-F ' if follow else ''}t5like/{name}/log"
        ssh = ["gcloud", "compute", "tpus", "tpu-vm", "ssh", node, *place, "--worker=0", f"--command={command}"]
        return programs.follow(ssh, needed_for=NEEDED_FOR)
    with log.open(encoding="utf-8", errors="replace") as file:
        last = ""
        while True:
            supervised = supervisor(name) is not None
            for line in file:
                sys.stdout.write(line)
                last = line if line.startswith(SAID) else last
            sys.stdout.flush()
            if not (follow and supervised):
                break
            time.sleep(0.5)
    code = re.fullmatch(rf"{SAID}ended with exit code (\d+)\n", last)
    return int(code[1]) if code and follow else 0


def cancel(record: Record) -> None:
    """Stop the run, which saves a checkpoint, and delete its TPU VMs.

    Raises:
        ConfigError: they could not be deleted.
    """
    name, place, _ = found(record)
    if (pid := supervisor(name)) is not None:
        os.kill(pid, signal.SIGTERM)
        while supervisor(name) is not None:
            time.sleep(0.1)
    delete = ["gcloud", "compute", "tpus", "queued-resources", "delete", name, *place, "--force"]
    reply = programs.run(delete, needed_for=NEEDED_FOR)
    if reply.code and not re.search("not.found", reply.errors, re.IGNORECASE):
        raise ConfigError(f"{record.full_id} could not be deleted: {_last(reply.errors)}; use `{' '.join(delete)}`")


def _last(errors: str) -> str:
    return printable((errors.strip().splitlines() or ["no message"])[-1], longest=300)
