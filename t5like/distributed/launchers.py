"""Detect how this process was started: alone, or as one of several by a launcher such as srun, mpirun or torchrun.

`LAUNCHERS` is the table: which environment variables each launcher sets, and what the user must add where these are not
enough. `T5LIKE_COORDINATOR`, `T5LIKE_NUM_PROCESSES` and `T5LIKE_PROCESS_ID` (or JAX's own names, or the flags of the
command line) complete or override them. `T5LIKE_NUM_PROCESSES=1` always runs alone. `cli.main` calls `detect_process`
once, before JAX is imported; this module reads environment variables only.

Sources: the manual pages of srun, mpirun and torchrun for their variables, the Kubernetes documentation of indexed
jobs, and JAX's `clusters` package for TPU pods. JAX only checks that a launcher is present; `detect_process` also
requires that all variables are set. Otherwise an ssh into a Slurm node, or a batch script without srun, would hang or
run N times.
"""

import importlib.util
import re
import urllib.request
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

from t5like.errors import ConfigError

Env = Mapping[str, str]

COORDINATOR = ("T5LIKE_COORDINATOR", "JAX_COORDINATOR_ADDRESS")
NUM_PROCESSES = ("T5LIKE_NUM_PROCESSES", "JAX_NUM_PROCESSES")
PROCESS_ID = ("T5LIKE_PROCESS_ID", "JAX_PROCESS_ID")
ALONE = "set T5LIKE_NUM_PROCESSES=1 to run alone"


class ProcessInfo(NamedTuple):
    """One of several processes of a run.

    Attributes:
        launcher: name of the launcher.
        coordinator: ``host:port`` of process 0.
        num_processes: number of processes of the run, at least 2.
        process: rank of this process, from 0.
        local_devices: indices of the host's GPUs that this process uses; None: all visible ones.
    """

    launcher: str
    coordinator: str
    num_processes: int
    process: int
    local_devices: tuple[int, ...] | None = None


class Launcher(NamedTuple):
    """The environment variables that a launcher sets.

    Attributes:
        name: shown in messages.
        signs: variables; the launcher is present if one of them is set.
        num_processes: variables, of which the first that is set is used; or a function of all variables.
        process: the same for the rank of this process.
        coordinator: returns ``host:port`` of process 0, or None if the variables do not contain it.
        address_from: the variable that must contain the coordinator; named in messages.
        local: variables with the rank of this process on its host, and with the number of processes on the host.
        alone: returns True if the process was not started as one of several, although a sign is set.
        remedy: what to do about a missing variable.
    """

    name: str
    signs: tuple[str, ...]
    num_processes: tuple[str, ...] | Callable[[Env], str | None]
    process: tuple[str, ...] | Callable[[Env], str | None]
    coordinator: Callable[[Env], str | None]
    address_from: str
    local: tuple[str, str] = ("", "")
    alone: Callable[[Env], bool] = lambda env: False
    remedy: str = "set it"


def detect_process(env: Env) -> ProcessInfo | None:
    """Return this process's rank and addresses; None if it runs alone.

    Raises:
        ConfigError: a variable of the launcher is missing or has an impossible value.
    """
    if _first_set(env, NUM_PROCESSES) == "1":
        return None
    row = next((row for row in LAUNCHERS if any(sign in env for sign in row.signs)), None)
    if row is None or (row.alone(env) and not _first_set(env, NUM_PROCESSES)):
        return None
    fields = {
        "num_processes": (_first_set(env, NUM_PROCESSES) or _read(env, row.num_processes), row.num_processes),
        "process": (_first_set(env, PROCESS_ID) or _read(env, row.process), row.process),
    }
    if fields["num_processes"][0] == "1":
        return None
    address = _first_set(env, COORDINATOR) or row.coordinator(env)
    missing = [row.address_from if callable(names) else names[0] for value, names in fields.values() if value is None]
    missing += [] if address else [row.address_from]
    if missing := list(dict.fromkeys(missing)):
        sign = next(sign for sign in row.signs if sign in env)
        raise ConfigError(
            f"{sign}={env[sign]} is set by {row.name}, but {' and '.join(missing)} "
            f"{'is' if len(missing) == 1 else 'are'} missing: {row.remedy}, or {ALONE}"
        )
    num_processes, process = (_number(f"{row.name}: {field}", value) for field, (value, _) in fields.items())
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
        raise ConfigError(f"{row.name}: the coordinator {address!r} must be HOST:PORT, such as 10.0.0.1:8476")
    if num_processes < 1:
        raise ConfigError(f"{row.name}: num_processes={num_processes} must be at least 1; {ALONE}")
    if not 0 <= process < num_processes:
        raise ConfigError(
            f"{row.name}: process {process} of {num_processes} is impossible: "
            f"use a number from 0 to {num_processes - 1}"
        )
    return ProcessInfo(row.name, address, num_processes, process, _local_devices(env, row))


def _first_set(env: Env, names: tuple[str, ...]) -> str | None:
    return next((env[name] for name in names if env.get(name)), None)


def _read(env: Env, names: tuple[str, ...] | Callable[[Env], str | None]) -> str | None:
    return names(env) if callable(names) else _first_set(env, names)


def _number(name: str, value: str) -> int:
    if not value.isdecimal():
        raise ConfigError(f"{name}={value!r} must be a whole number, such as 2; {ALONE}")
    return int(value)


def _local_devices(env: Env, row: Launcher) -> tuple[int, ...] | None:
    """Return an even share of the host's GPUs if its processes see the same ones; None if each has its own.

    If no variable contains the number of visible GPUs, each process uses one, by its rank on the host, as torchrun and
    JAX's own cluster detection do. JAX_LOCAL_DEVICE_IDS overrides this; explicit addresses share nothing without it.
    """
    if explicit := env.get("JAX_LOCAL_DEVICE_IDS"):
        if not re.fullmatch(r"\d+(,\d+)*", explicit):
            raise ConfigError(f"JAX_LOCAL_DEVICE_IDS={explicit} must be GPU indices separated by commas, such as 0,1")
        return tuple(int(number) for number in explicit.split(","))
    rank, size = (env.get(name, "") for name in row.local)
    size = re.match(r"\d*", size)[0]  # Slurm: 4(x2),3
    if not rank.isdecimal() or not size or int(size) < 2 or any(env.get(name) for name in OWN_GPUS):
        return None
    visible = _first_set(env, ("CUDA_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES"))
    share = len(visible.split(",")) // int(size) if visible else 1
    return tuple(range(int(rank) * share, (int(rank) + 1) * share)) if share else None


OWN_GPUS = ("SLURM_GPUS_PER_TASK", "SLURM_TRES_PER_TASK")  # Slurm then makes only its own GPUs visible to each task


def _port(*job: str) -> int:
    """Return a port that is the same in all processes of a job, above the ephemeral ports (Linux: up to 60999)."""
    return 61440 + zlib.crc32(".".join(job).encode()) % 4096


# --- variables of each launcher ---------------------------------------------------------------------------------------


def _torchrun(env: Env) -> str | None:
    # torchrun's own store listens at MASTER_PORT.
    port = env.get("MASTER_PORT", "")
    return f"{env['MASTER_ADDR']}:{int(port) + 1}" if env.get("MASTER_ADDR") and port.isdecimal() else None


def _tpu_hosts(env: Env) -> list[str]:
    hosts = _first_set(env, ("TPU_PROCESS_ADDRESSES", "TPU_WORKER_HOSTNAMES")) or ""
    return [host.split(":")[0] for host in hosts.split(",") if host]


def _tpu_processes(env: Env) -> str | None:
    hosts = _tpu_hosts(env)
    return str(len(hosts) * _number("MEGASCALE_NUM_SLICES", env.get("MEGASCALE_NUM_SLICES") or "1")) if hosts else None


def _tpu_process(env: Env) -> str | None:
    if not (worker := env.get("TPU_WORKER_ID")):
        return None
    slice_start = _number("MEGASCALE_SLICE_ID", env.get("MEGASCALE_SLICE_ID") or "0") * len(_tpu_hosts(env))
    return str(slice_start + _number("TPU_WORKER_ID", worker))


def _tpu_coordinator(env: Env) -> str | None:
    hosts = [env.get("MEGASCALE_COORDINATOR_ADDRESS", "").split(":")[0], *_tpu_hosts(env)]
    return next((f"{host}:8476" for host in hosts if host), None)


def _open_mpi(env: Env) -> str | None:
    """Process 0 is on mpirun's own host, the first of its host list, unless mpirun was called with other options."""
    uri = env.get("OMPI_MCA_orte_hnp_uri", "")
    port = _port(env.get("PMIX_NAMESPACE") or uri.partition(".")[0])
    if env.get("OMPI_COMM_WORLD_LOCAL_SIZE") == env.get("OMPI_COMM_WORLD_SIZE"):
        return f"127.0.0.1:{port}"
    host = re.search(r"tcp://([^,:;]+)", uri)
    return f"{host[1]}:{port}" if host else None


def _hydra(env: Env) -> str | None:
    job = env.get("PMI_ID", "") or env.get("HYDRA_JOBID", "") or env.get("PMI_FD", "")
    return f"127.0.0.1:{_port(job)}" if env.get("MPI_LOCALNRANKS") == env.get("PMI_SIZE") else None


def _slurm(env: Env) -> str | None:
    """Return the first host of ``node[007,009-015],other3``; task 0 runs there."""
    first_entry = re.match(r"(?:[^,\[]|\[[^\]]*\])+", env.get("SLURM_STEP_NODELIST", ""))
    if not first_entry:
        return None
    host = re.sub(r"\[(\d+)[^\]]*\]", r"\1", first_entry[0])
    return f"{host}:{_port(env.get('SLURM_JOB_ID', ''), env.get('SLURM_STEP_ID', ''))}"


def _not_by_srun(env: Env) -> bool:
    """Return True for a shell inside an allocation (ssh into a node, or a single task): it is no task of a step."""
    if env.get("SLURM_STEP_NODELIST"):
        return False
    by_ssh = "SLURM_PROCID" not in env and "SSH_CONNECTION" in env
    return by_ssh or env.get("SLURM_NTASKS", "1") == "1"


def _kubernetes(env: Env) -> str | None:
    """Pod 0 of an indexed job is named JOB-0; its address comes from a headless service, the pods' subdomain."""
    name, index = env.get("HOSTNAME", ""), env.get("JOB_COMPLETION_INDEX", "")
    if not name.endswith(f"-{index}") or not env.get("T5LIKE_SERVICE"):
        return None
    return f"{name.removesuffix(index)}0.{env['T5LIKE_SERVICE']}:8476"


# The first row with a sign is used: mpirun and torchrun come before Slurm, which may have started them.
LAUNCHERS = (
    Launcher(
        "torchrun",
        ("MASTER_ADDR", "TORCHELASTIC_RUN_ID"),
        ("WORLD_SIZE",),
        ("RANK",),
        _torchrun,
        "MASTER_ADDR or MASTER_PORT",
        ("LOCAL_RANK", "LOCAL_WORLD_SIZE"),
    ),
    Launcher(
        "a TPU pod",
        ("TPU_WORKER_HOSTNAMES", "TPU_PROCESS_ADDRESSES", "MEGASCALE_NUM_SLICES"),
        _tpu_processes,
        _tpu_process,
        _tpu_coordinator,
        "TPU_WORKER_HOSTNAMES or TPU_WORKER_ID",
    ),
    Launcher(
        "Open MPI",
        ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"),
        ("OMPI_COMM_WORLD_SIZE",),
        ("OMPI_COMM_WORLD_RANK",),
        _open_mpi,
        "T5LIKE_COORDINATOR",
        ("OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE"),
        remedy="set it with mpirun -x T5LIKE_COORDINATOR=HOST_OF_RANK_0:8476",
    ),
    Launcher(
        "MPICH or Intel MPI",
        ("MPI_LOCALNRANKS",),
        ("PMI_SIZE",),
        ("PMI_RANK",),
        _hydra,
        "T5LIKE_COORDINATOR",
        ("MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
        remedy="set it with mpiexec -genv T5LIKE_COORDINATOR HOST_OF_RANK_0:8476",
    ),
    Launcher(
        "Slurm",
        ("SLURM_JOB_ID",),
        ("SLURM_STEP_NUM_TASKS", "SLURM_NTASKS"),  # first the step's: a step may have fewer tasks than its job
        ("SLURM_PROCID",),
        _slurm,
        "SLURM_STEP_NODELIST",
        ("SLURM_LOCALID", "SLURM_STEP_TASKS_PER_NODE"),
        alone=_not_by_srun,
        remedy="start it with srun",
    ),
    Launcher(
        "Kubernetes",
        ("JOB_COMPLETION_INDEX",),
        NUM_PROCESSES,
        ("JOB_COMPLETION_INDEX",),
        _kubernetes,
        "T5LIKE_SERVICE",
        remedy="set T5LIKE_NUM_PROCESSES to the job's completions and T5LIKE_SERVICE to its headless service, the "
        "subdomain of its pods",
    ),
    Launcher(
        "explicit addresses",
        (*COORDINATOR, *NUM_PROCESSES, *PROCESS_ID),
        NUM_PROCESSES,
        PROCESS_ID,
        lambda env: None,
        COORDINATOR[0],
        remedy="set all of T5LIKE_COORDINATOR=HOST:PORT, T5LIKE_NUM_PROCESSES and T5LIKE_PROCESS_ID (or --coordinator, "
        "--num_processes and --process_id)",
    ),
)


# --- TPU machines: the metadata server instead of environment variables -----------------------------------------------


def cloud_tpu(env: Env) -> dict[str, str]:
    """Return what Google Cloud's metadata server reports to a TPU VM, by variable name; empty on other machines.

    Raises:
        ConfigError: this is a TPU VM, and the metadata server does not reply.
    """
    here = any(Path(device).exists() for device in ("/dev/accel0", "/dev/vfio/0")) and importlib.util.find_spec(
        "libtpu"
    )
    if not here or env.get("TPU_SKIP_MDS_QUERY") or any(sign in env for row in LAUNCHERS for sign in row.signs):
        return {}
    return metadata(env.get("GCE_METADATA_IP") or "metadata.google.internal")


def metadata(host: str) -> dict[str, str]:
    """Read the variables of a TPU pod from a metadata server."""

    def request(key: str) -> str:
        address = f"http://{host}/computeMetadata/v1/instance/attributes/{key}"
        with urllib.request.urlopen(
            urllib.request.Request(address, headers={"Metadata-Flavor": "Google"}), timeout=10
        ) as response:
            return response.read(2**20).decode()

    try:
        # Each endpoint is HOST or NAME:ID:ADDRESS.
        hosts = [part.split(":")[-1] for part in request("worker-network-endpoints").split(",")]
        variables = {"TPU_WORKER_ID": request("agent-worker-number").strip(), "TPU_WORKER_HOSTNAMES": ",".join(hosts)}
        slices = re.findall(r"^(MEGASCALE_\w+): *'?([^'\n]*)'?", request("tpu-env"), re.MULTILINE)
    except OSError as error:
        raise ConfigError(
            f"this is a TPU machine, but {host} does not report whether it is one of several ({error}); {ALONE}"
        ) from None
    return variables | dict(slices)
