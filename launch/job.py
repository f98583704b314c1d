"""The description of a job that every backend renders: a frozen `JobSpec` of checked values, and what all share.

A `JobSpec` is plain data. `options` makes it from the command line and the site's `launch.toml`; `slurm`, `kubernetes`,
`tpu_vm` and `local` turn it into text. Values are checked here once, so that no renderer meets a line end or a control
character; how a value is quoted is the renderer's part (`shlex.quote` for shells, a YAML dumper for manifests).
"""

import dataclasses
import re
import unicodedata
from typing import Literal

from t5like.errors import ConfigError, shown
from t5like.plan.topology import CHIPS, GPUS, Topology, parse

COORDINATOR_PORT = 8476  # of process 0, where the launcher has to name one
LONGEST_NAME = 40  # characters: Kubernetes adds to it the names of jobs and pods, which must stay below 63
LONGEST_VALUE = 4096  # characters of a flag's value: Linux limits one argument to 128 KiB, YAML and shells do not
RESTART_CODES = (75, 76)  # preempted and saved; another process lost: the same command continues the run
STOP_CODES = (2, 3, 4, 5, 70)  # starting the same command again would fail again


@dataclasses.dataclass(frozen=True)
class Secret:
    """An environment variable whose value is never written: only where the backend finds it.

    Attributes:
        name: of the variable in the job.
        reference: Kubernetes: ``SECRET/KEY``; TPU VMs: the name in Secret Manager; empty: the variable of the same name
            in the environment of the submitting shell (Slurm, local).
    """

    name: str
    reference: str = ""


@dataclasses.dataclass(frozen=True)
class Mount:
    """Storage that the job sees at an absolute path.

    Attributes:
        source: ``gs://BUCKET``, ``s3://BUCKET``, ``pvc:CLAIM`` (Kubernetes), or a path of the host (containers).
        path: in the job.
        read_only: whether the job can't write there.
    """

    source: str
    path: str
    read_only: bool = False


@dataclasses.dataclass(frozen=True)
class SweepRun:
    """One run of a sweep.

    Attributes:
        name: of its run directory, below the `--workdir` of the command.
        overrides: flags that are added to the command, such as ``--config.optimizer.learning_rate=0.01``.
    """

    name: str
    overrides: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class JobSpec:
    """A job: what runs, on which machines, for how long, and where it is submitted.

    Attributes:
        name: of the job: lower-case letters, digits and dashes, at most 40 characters.
        command: the command of t5like and its flags, such as ``("train", "--config=tiny", "--workdir=/runs/a")``.
        workdir: the run directory of the command, absolute or with a scheme.
        accelerator: topology as in `t5like plan`: ``v5e:16x16``, ``h100:8x8`` (hosts x GPUs per host); ``cpu``: none.
        slices: number of TPU slices.
        nodes: hosts of one slice, or of the job.
        processes_per_node: 1, or the number of GPUs per host. TPUs: 1.
        fake_devices: CPU devices per process (`--fake_devices`); 0: JAX's own devices.
        cpus_per_process: CPU cores; 0: the backend's default.
        memory_gib: main memory per host; 0: the backend's default.
        time_limit: seconds; 0: the backend's default, or no limit.
        wait_limit: seconds that a request for machines waits (TPU VMs).
        grace: seconds between the signal that stops a run and its end.
        retries: how often a job starts again after a lost process or host; a preemption does not count.
        env: environment variables of the job, in addition to what t5like sets itself.
        secrets: environment variables by reference.
        image: container image with a tag or digest; empty: no container.
        container: how Slurm starts the image.
        python: interpreter with t5like, on the machines or in the image.
        setup: shell lines before the command on every host, such as ``module load cuda``. They are not quoted.
        directory: working directory of the job; empty: the backend's default.
        mounts: storage.
        compile_cache: directory of JAX's compilation cache; empty: t5like's default.
        log_directory: of log files; empty: ``WORKDIR/logs``.
        runs: the runs of a sweep; empty: the command itself.
        account, partition, qos, reservation, constraint, gres: of Slurm; `gres` replaces the GPUs per host.
        queue, namespace, service_account, priority: of Kubernetes; `queue` is Kueue's.
        node_selector: labels that nodes must have (Kubernetes), such as those of a GPU model.
        project, zone, runtime_version, network: of TPU VMs.
        spot: use machines that can be preempted (TPU VMs, Kubernetes).
        reserved: use the reservation of the project (TPU VMs).
        install: requirement that TPU VMs install, such as ``t5like[tpu]==1.0`` or a wheel's path.
    """

    name: str
    command: tuple[str, ...]
    workdir: str
    accelerator: str = "cpu"
    slices: int = 1
    nodes: int = 1
    processes_per_node: int = 1
    fake_devices: int = 0
    cpus_per_process: int = 0
    memory_gib: int = 0
    time_limit: int = 0
    wait_limit: int = 86400
    grace: int = 120
    retries: int = 10
    env: tuple[tuple[str, str], ...] = ()
    secrets: tuple[Secret, ...] = ()
    image: str = ""
    container: Literal["", "pyxis", "apptainer"] = ""
    python: str = "python3"
    setup: tuple[str, ...] = ()
    directory: str = ""
    mounts: tuple[Mount, ...] = ()
    compile_cache: str = ""
    log_directory: str = ""
    runs: tuple[SweepRun, ...] = ()
    account: str = ""
    partition: str = ""
    qos: str = ""
    reservation: str = ""
    constraint: str = ""
    gres: str = ""
    queue: str = ""
    namespace: str = ""
    service_account: str = ""
    priority: str = ""
    node_selector: tuple[tuple[str, str], ...] = ()
    project: str = ""
    zone: str = ""
    runtime_version: str = ""
    network: str = ""
    spot: bool = False
    reserved: bool = False
    install: str = ""

    @property
    def topology(self) -> Topology | None:
        """The accelerators of all slices; None: CPUs."""
        return None if self.accelerator == "cpu" else parse(self.accelerator, self.slices)

    @property
    def platform(self) -> Literal["cpu", "gpu", "tpu"]:
        """The machines' kind of device, by JAX's name."""
        kind = self.accelerator.partition(":")[0]
        return "tpu" if kind in CHIPS else "gpu" if kind in GPUS else "cpu"

    @property
    def gpus_per_node(self) -> int:
        """GPUs of a host; 0 without GPUs."""
        return self.topology.shape[1] if self.platform == "gpu" else 0

    @property
    def num_processes(self) -> int:
        """Processes of one run, in all slices."""
        return self.slices * self.nodes * self.processes_per_node


def t5like_command(job: JobSpec, run: SweepRun | None = None) -> list[str]:
    """Return the arguments of one process, from the interpreter on; `run` is one of `job.runs`."""
    command = list(job.command)
    if run is not None:
        command = [part for part in command if not part.startswith("--workdir=")]
        command += [f"--workdir={run_directory(job, run)}", *run.overrides]
    if job.fake_devices:
        command.append(f"--fake_devices={job.fake_devices}")
    return [job.python, "-m", "t5like", *command]


def run_directory(job: JobSpec, run: SweepRun | None = None) -> str:
    """Return the run directory of the job, or of one run of its sweep."""
    return job.workdir if run is None else f"{job.workdir.rstrip('/')}/{run.name}"


def check_text(field: str, value: str, *, longest: int = LONGEST_VALUE) -> str:
    """Return a value that can be written into a script or manifest on one line.

    Raises:
        ConfigError: it has a line end, a control character or bytes that are no UTF-8, or is too long.
    """
    bad = next((char for char in value if unicodedata.category(char) in ("Cc", "Cs", "Zl", "Zp")), None)
    if bad is not None:
        raise ConfigError(
            f"{field}={shown(value)} must be one line of text, without the character U+{ord(bad):04X}; leave it out"
        )
    if len(value) > longest:
        raise ConfigError(f"{field}={shown(value)} has {len(value)} characters; use at most {longest}")
    return value


def check_name(field: str, value: str, *, pattern: str, example: str) -> str:
    """Return a value that matches `pattern` completely; raises ConfigError with `example` otherwise."""
    if not re.fullmatch(pattern, value):
        raise ConfigError(f"{field}={shown(value)} must match {pattern}; use {example}")
    return value


def storage_that_fits(source: str, pattern: str, other: str) -> str:
    """Return the source of a mount that matches `pattern`, for a message: this one in lower case, or another one."""
    source = re.sub(r"\w+:(//)?[^/]*", lambda match: match[0].lower(), source, count=1)  # folders keep their case
    return source if re.fullmatch(pattern, source) else other


def job_name(text: str) -> str:
    """Return a valid job name made from any text, such as the name of a run directory."""
    name = re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:LONGEST_NAME].strip("-")
    return name if name[:1].isalpha() else f"t5like-{name}"[:LONGEST_NAME].strip("-")
