"""The bash scripts of a job on TPU VMs, as text: one that runs on each worker, and one that supervises them.

`supervisor_script` and `worker_script` are assignments made from a `JobSpec` (every value quoted by `shlex.quote`),
followed by tpu_vm_supervisor.sh or tpu_vm_worker.sh. The supervising script contains the worker's; it needs gcloud and
bash 3.2 or later, and nothing of t5like. Flags and exit codes: ``gcloud compute tpus queued-resources create --help``,
``gcloud compute tpus tpu-vm ssh --help``; states: cloud.google.com/tpu/docs/queued-resources.
"""

import importlib.resources
import shlex
from collections.abc import Sequence

from launch.accelerators import ACCELERATORS, accelerator_type
from launch.job import JobSpec, SweepRun, run_directory, t5like_command

END_OF_WORKER = "END_OF_WORKER_SCRIPT"
RENAME_LIMIT = 1_000_000  # files of a directory that gcsfuse renames; it refuses to rename larger ones
SCOPE = "https://www.googleapis.com/auth/cloud-platform"  # without it, a service account can't read secrets or buckets


def supervisor_script(job: JobSpec) -> str:
    """Return the script that creates the TPU VMs, runs the job on them, and deletes them."""
    header = [
        "#!/usr/bin/env bash",
        f"# {title(job)}",
        *SUPERVISOR_HEADER,
        assignment("name", job.name),
        *array("place", [*location(job), "--quiet"]),
        *array("request", request(job)),
        *array("nodes", nodes(job)),
        *array("runs", [run_directory(job, run) for run in job.runs] or [job.workdir]),
        assignment("wheel", job.install if is_wheel(job.install) else ""),
        f"time_limit={job.time_limit}  # seconds of running; 0: none",
        f"wait_limit={job.wait_limit}  # seconds that a request waits for machines",
        f"grace={job.grace}  # seconds between SIGTERM and SIGKILL",
        f"retries={job.retries}  # after a lost process or machine; preemptions do not count",
        "",
        "# ---- What every worker runs " + "-" * 91,
        f"worker_script() {{\n    cat <<'{END_OF_WORKER}'",
    ]
    return "\n".join(header) + "\n" + worker_script(job) + f"{END_OF_WORKER}\n}}\n" + constant("supervisor")


def constant(name: str) -> str:
    """Return the constant end of a script, without the comment that says so."""
    text = (importlib.resources.files("launch") / f"tpu_vm_{name}.sh").read_text(encoding="utf-8")
    return text.partition("\n")[2]


def title(job: JobSpec) -> str:
    """Return what the job is, in one line."""
    slices = f"{job.slices} slices of " if job.slices > 1 else ""
    kind = ", spot" if job.spot else ", reserved" if job.reserved else ""
    return f"t5like job {job.name} on TPU VMs: {slices}{accelerator_type(job.topology)} in {job.zone}{kind}"


def location(job: JobSpec) -> list[str]:
    """Return the flags that say where TPU VMs are."""
    return [f"--zone={job.zone}", *([f"--project={job.project}"] if job.project else [])]


def request(job: JobSpec) -> list[str]:
    """Return the flags of ``gcloud compute tpus queued-resources create``."""
    flags = [
        f"--accelerator-type={accelerator_type(job.topology)}",
        f"--runtime-version={job.runtime_version or ACCELERATORS[job.topology.kind].runtime_version}",
        f"--node-count={job.slices}" if job.slices > 1 else f"--node-id={job.name}",
    ]
    flags += ["--spot"] if job.spot else []
    flags += ["--reserved"] if job.reserved else []
    flags += [f"--network={job.network}"] if job.network else []
    flags += [f"--service-account={job.service_account}"] if job.service_account else []
    return [*flags, f"--scopes={SCOPE}", f"--valid-until-duration={job.wait_limit}s"]


def nodes(job: JobSpec) -> list[str]:
    """Return the name of each slice; gcloud numbers several."""
    return [f"{job.name}-{index}" for index in range(job.slices)] if job.slices > 1 else [job.name]


def worker_script(job: JobSpec) -> str:
    """Return the script of a worker, with one command per run."""
    runs = job.runs or (None,)
    commands = []
    for index, run in enumerate(runs):
        lines = [*array("command", command(job, run)), assignment("workdir", host_path(job, run)), ";;"]
        commands += [f"{index})", *indented(lines)]
    logs = job.log_directory and assignment("logs", job.log_directory)
    header = [
        assignment("name", job.name),
        f"grace={job.grace}",
        *["environment() {", *indented(environment(job)), "}"],
        *["prepare() {", *indented(preparation(job)), "}"],
        *["select_run() {", *indented(['case "$1" in', *commands, "esac", logs or LOGS]), "}"],
        *(DOCKER_SIGNALS if job.image else PROCESS_SIGNALS),
    ]
    return "\n".join(header) + "\n" + constant("worker")


def command(job: JobSpec, run: SweepRun | None) -> list[str]:
    """Return the command of a worker: t5like, or a container with it."""
    process = t5like_command(job, run)
    if not job.image:
        return process
    names = variables(job)
    volumes = [
        f"--volume={mount.path if mount.source.startswith('gs://') else mount.source}:{mount.path}"
        + ":ro" * mount.read_only
        for mount in job.mounts
    ]
    options = [f"--name={job.name}", "--privileged", "--network=host", *(f"--env={name}" for name in names), *volumes]
    options += [f"--workdir={job.directory}"] if job.directory else []
    return ["sudo", f"--preserve-env={','.join(names)}", "docker", "run", "--rm", *options, job.image, *process]


def variables(job: JobSpec) -> list[str]:
    """Return the names of all environment variables of the job."""
    names = [name for name, _ in job.env] + [secret.name for secret in job.secrets]
    return ["PYTHONUNBUFFERED", *(["JAX_COMPILATION_CACHE_DIR"] if job.compile_cache else []), *names]


def environment(job: JobSpec) -> list[str]:
    """Return the lines that set the environment of the job; secrets are read from Secret Manager there."""
    values = {"PYTHONUNBUFFERED": "1"}
    if job.compile_cache:
        values["JAX_COMPILATION_CACHE_DIR"] = job.compile_cache
    lines = [f"export {assignment(name, value)}" for name, value in (*values.items(), *job.env)]
    project = [f"--project={job.project}"] if job.project else []
    for secret in job.secrets:
        access = ["gcloud", "secrets", "versions", "access", "latest", f"--secret={secret.reference}", *project]
        failure = f"the secret {secret.reference} can't be read; the service account of the TPU VMs needs access to it"
        lines += [
            f"{secret.name}=$({shlex.join(access)}) || fail 2 {shlex.quote(failure)}",
            f"export {secret.name}",
        ]
    return lines


def preparation(job: JobSpec) -> list[str]:
    """Return the lines that run the user's setup, mount buckets, and install t5like or pull the image."""
    lines = list(job.setup)  # first: it may install what the others need
    for mount in job.mounts:
        if mount.source.startswith("gs://"):
            lines += bucket_lines(mount.source.removeprefix("gs://"), mount.path, read_only=mount.read_only)
    if job.image:
        host, image = job.image.partition("/")[0], shlex.quote(job.image)
        pull = f"sudo docker pull --quiet {image}"
        lines += [
            f"{pull} ||  # a private image of the cloud's own registry needs the login of the service account",
            f"    {{ sudo gcloud auth configure-docker {shlex.quote(host)} --quiet && {pull}; }} ||",
            "    fail 2 'the image can not be pulled'",
        ]
        lines.append('sudo docker rm --force "$name" >/dev/null 2>&1  # of a start that was killed')
    elif job.install:
        requirement = f"./{job.install.rsplit('/', 1)[-1]}[tpu]" if is_wheel(job.install) else job.install
        python = shlex.quote(job.python)
        lines += [
            "if [ ! -f installed ]; then",
            f"    {python} -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||",
            f"        fail 2 {shlex.quote(PYTHON_TOO_OLD)}",
            f"    {python} -m venv env && env/bin/python -m pip install --quiet {shlex.quote(requirement)} ||",
            "        fail 2 't5like could not be installed; see the lines above'",
            "    touch installed",
            "fi",
            "command[0]=$PWD/env/bin/python",
        ]
    lines += [f"cd {shlex.quote(job.directory)} || fail 2 'there is no such directory'"] if moves(job) else []
    return lines or [":"]


def moves(job: JobSpec) -> bool:
    """Return whether the command starts in a directory of the worker."""
    return bool(job.directory) and not job.image


def bucket_lines(bucket: str, path: str, *, read_only: bool) -> list[str]:
    """Return the lines that mount a bucket with gcsfuse; every user may write there, also that of a container."""
    place = shlex.quote(path)
    options = f"--implicit-dirs --rename-dir-limit={RENAME_LIMIT} --file-mode=666 --dir-mode=777 -o allow_other"
    options += " -o ro" * read_only
    mount = f"sudo gcsfuse {options} {shlex.quote(bucket)} {place}"
    return [
        f"mountpoint -q {place} || {{ sudo mkdir -p {place} && {mount}; }} ||",
        f"    fail 4 {shlex.quote(f'gs://{bucket} could not be mounted with gcsfuse')}",
    ]


def host_path(job: JobSpec, run: SweepRun | None) -> str:
    """Return the run directory as a worker sees it outside of the container."""
    path = run_directory(job, run)
    for mount in job.mounts if job.image else ():
        if not mount.source.startswith("gs://") and (path + "/").startswith(mount.path.rstrip("/") + "/"):
            return mount.source + path[len(mount.path.rstrip("/")) :]
    return path


def is_wheel(install: str) -> bool:
    """Return whether `install` names a file of this machine."""
    return install.endswith(".whl")


def assignment(name: str, value: str) -> str:
    """Return ``name=value``, quoted."""
    return f"{name}={shlex.quote(value)}"


def array(name: str, values: Sequence[str]) -> list[str]:
    """Return the lines of a bash array, quoted, one value a line."""
    return [f"{name}=(", *indented([shlex.quote(value) for value in values]), ")"]


def indented(lines: Sequence[str]) -> list[str]:
    """Return lines of a function's body."""
    return [f"    {line}" for line in lines]


LOGS = 'logs="$workdir/logs"'
PYTHON_TOO_OLD = (
    "t5like needs Python 3.11 and the runtime version has an older one; use --image, or "
    "--python=python3.11 --setup='sudo apt-get install -y python3.11-venv'"
)
PROCESS_SIGNALS = (
    'terminate() { kill -TERM "$(cat child)"; }',
    'kill_all() { pkill -KILL -s "$(cat pid)"; }',
)
DOCKER_SIGNALS = (
    'terminate() { sudo docker stop --time="$grace" "$name" >/dev/null; }',
    'kill_all() { sudo docker rm --force "$name" >/dev/null 2>&1; pkill -KILL -s "$(cat pid)"; }',
)
SUPERVISOR_HEADER = (
    "#",
    "#   bash FILE           create the TPU VMs, wait for them, run, create them again after a preemption, delete them",
    "#   bash FILE attach    supervise the job again, if this script ended without deleting the TPU VMs",
    "#   bash FILE delete    delete the TPU VMs",
    "#",
    "# Ctrl-C, SIGTERM and SIGHUP stop the run, which saves a checkpoint, and delete the TPU VMs; a second one deletes",
    "# them at once. Exit codes: 0 done; 75 the time limit is over and the run has saved; 76 the restarts are used up;",
    "# 2, 3, 4, 5, 70 the run failed and would fail again.",
    "set -u",
    "",
)
