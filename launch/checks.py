"""Checks before a job is submitted: its command line and config, and what `t5like plan` checks for the job's machines.

Called by `launch.main`. A failed check raises; what this machine can't see, such as data on the cluster, is a note.
"""

import contextlib
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from launch.job import JobSpec, SweepRun, t5like_command
from t5like.cli import commands, flags
from t5like.config.schema import Config
from t5like.errors import ConfigError, UserError
from t5like.io.paths import expand
from t5like.plan.topology import Chip, Topology

if TYPE_CHECKING:
    from t5like.plan.planner import Plan

HERE = ("local", "slurm")  # backends whose machines see the paths of this one
GIB = 2**30
# File systems of one machine (man 5 filesystems); a cluster shares nfs, lustre, gpfs, beegfs, ceph, fuse and others.
OWN_TYPES = ("tmpfs", "ramfs", "ext2", "ext3", "ext4", "xfs", "btrfs", "zfs", "f2fs", "overlay", "vfat", "apfs")
OWN_PATHS = ("/tmp", "/var/tmp", "/dev/shm", "/run")


def check_job(job: JobSpec, backend: str, *, skip_plan: bool, shared: bool) -> list[str]:
    """Check a job, with all runs of its sweep; return notes about what was not checked.

    Args:
        job: the job.
        backend: where it will run.
        skip_plan: check the command line and the config only.
        shared: the user states that all machines see the run directory.

    Raises:
        UserError: what `train` would refuse, or a config that does not fit into the memory of the job's devices.
    """
    if not shared:
        check_workdir_is_shared(job, backend)
    notes: dict[str, None] = {}  # each once
    for run in job.runs or (None,):
        try:
            config, workdir, seen = load(job, run, backend)
            notes |= dict.fromkeys(seen)
            if config is not None and not skip_plan and job.command[0] == "train":
                notes |= dict.fromkeys(check_plan(config, job, workdir, backend))
            if job.command[0] == "rl":
                notes["the memory that t5like rl needs is not checked"] = None
        except UserError as error:
            raise type(error)(f"run {run.name} of the sweep: {error}" if run else str(error)) from None
    if skip_plan:
        notes["the checks of t5like plan were skipped: memory, mesh, batch, data, run directory"] = None
    return list(notes)


def load(job: JobSpec, run: SweepRun | None, backend: str) -> tuple[Config | None, Path, list[str]]:
    """Parse the command of a job and load its config; return config, run directory and notes.

    The config is None if the command has none, or it is not on this machine.
    """
    arguments = t5like_command(job, run)[3:]
    try:
        with _quiet_help():
            options, overrides = flags.parse(arguments)
    except SystemExit:
        raise ConfigError("the command of a job must not be --help; leave --help out") from None
    workdir = expand(options.workdir) if getattr(options, "workdir", None) else Path()
    if "config" not in options:
        return None, workdir, []
    if options.config and job.directory and (Path(job.directory) / options.config).is_file():
        options.config = str(Path(job.directory) / options.config)
    missing = options.config or f"{workdir}/config.json"
    if backend not in HERE and re.search(r"[/.]", missing) and not Path(missing).is_file():
        return None, workdir, [f"{missing} is not on this machine: the config is not checked"]
    return commands.load_config(options, overrides), workdir, []


@contextlib.contextmanager
def _quiet_help() -> Iterator[None]:
    """Discard what argparse prints for `--help`: standard output is the job."""
    with open(os.devnull, "w") as nothing, contextlib.redirect_stdout(nothing):
        yield


def topology_of(job: JobSpec, backend: str) -> Topology:
    """Return the machines of a job as `t5like plan` describes them."""
    if job.topology is not None:
        return job.topology
    devices = job.num_processes * max(job.fake_devices, 1)
    memory = job.memory_gib * GIB * job.nodes or None
    if backend == "local":
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return Topology("cpu", (devices,), 1, Chip("cpu", memory and memory // devices))


def check_plan(config: Config, job: JobSpec, workdir: Path, backend: str) -> list[str]:
    """Make the quick plan of a config for the machines of a job; return notes.

    Raises:
        UserError: the config does not fit the machines, or `train` would refuse data or run directory.
    """
    with _cpu_only():
        from t5like.plan import planner

        options = planner.PlanOptions(quick=True, workdir=workdir if backend in HERE else None)
        plan, errors = planner.make_plan(config, topology_of(job, backend), options, lambda line: None)
    check_memory(plan)
    if backend not in HERE:
        return [f"data, tokenizer and run directory are where the job of {backend} runs: not checked from here"]
    wrong = [check["name"] for check in plan["checks"] if check["state"] == "wrong"]
    unseen = unseen_paths(config)
    for name, error in zip(wrong, errors, strict=True):
        if name == "run directory" or not unseen:
            raise error
    if unseen:
        return [f"{', '.join(unseen)} is not on this machine: data and tokenizer are not checked"]
    missing = [check for check in plan["checks"] if check["state"] == "missing"]
    if missing:
        check_sources(config)
        return ["the token store does not exist yet: the job prepares it first (or run t5like prepare before)"]
    return []


@contextlib.contextmanager
def _cpu_only() -> Iterator[None]:
    """Let JAX of this process use the CPU only; the environment of the job's processes stays as it is."""
    before = os.environ.get("JAX_PLATFORMS")
    os.environ["JAX_PLATFORMS"] = "cpu"
    try:
        yield
    finally:
        os.environ.pop("JAX_PLATFORMS")
        if before is not None:
            os.environ["JAX_PLATFORMS"] = before


def check_memory(plan: "Plan") -> None:
    """Refuse a plan that does not fit into memory, with the nearest settings that do."""
    quick, topology = plan["quick"], plan["topology"]
    if quick["fits"]:
        return
    nearest = plan.get("nearest") or []
    settings = " ".join(f"--config.{setting}" for setting in nearest[0]["settings"]) if nearest else ""
    raise ConfigError(
        f"a device of {topology['name']} has {topology['memory'] / GIB:.1f} GiB, and a training step needs about "
        f"{quick['total'] / GIB:.1f} GiB; use {settings or 'more devices or a smaller data.batch_size'}, or --skip_plan"
    )


def unseen_paths(config: Config) -> list[str]:
    """Return the files of a config that are on no path of this machine, as data that only the cluster has."""
    paths = [config.tokenizer.path] if config.tokenizer.path else []
    paths += [spec.partition(":")[2] for spec in config.data.source if re.match(r"(text|jsonl|csv|tsv|parquet):", spec)]
    fixed = [Path(os.path.expanduser(re.split(r"[*?\[]", path)[0])) for path in paths]
    return [path for path, base in zip(paths, fixed, strict=True) if not base.exists() and not base.parent.exists()]


def check_sources(config: Config) -> None:
    """Refuse a source of files that match nothing, in a directory that this machine has."""
    unseen = unseen_paths(config)
    for spec in config.data.source:
        kind, _, pattern = spec.partition(":")
        if kind in ("text", "jsonl", "csv", "tsv", "parquet") and pattern not in unseen:
            from t5like.data.sources.files import matching_files

            matching_files(spec, pattern)


def check_workdir_is_shared(job: JobSpec, backend: str) -> None:
    """Refuse a run directory on this machine's own disk for a Slurm job of several hosts.

    Raises:
        ConfigError: see above.
    """
    if backend != "slurm" or job.nodes == 1 or "://" in job.workdir:
        return
    mounts = [mount.path for mount in job.mounts]
    if any(Path(job.workdir).is_relative_to(path) for path in mounts):
        return
    if not Path(*Path(job.workdir).parts[:2]).exists():  # mounted on the cluster's machines only
        return
    where = next((f"below {path}" for path in OWN_PATHS if Path(job.workdir).is_relative_to(path)), "")
    kind = file_system(job.workdir)
    if where or kind in OWN_TYPES:
        raise ConfigError(
            f"--workdir={job.workdir} is {where or f'on a disk of this machine ({kind})'}, and {job.nodes} hosts need "
            "it; use a file system that all share, or --workdir_is_shared if they do"
        )


def file_system(path: str, table: Path = Path("/proc/mounts")) -> str:
    """Return the type of the file system that holds a path, such as ``nfs4``; empty if it is not known (not Linux)."""
    try:
        lines = table.read_text("utf-8", "replace").splitlines()
    except OSError:
        return ""
    mounted = [line.split()[1:3] for line in lines if len(line.split()) > 2]
    decode = lambda text: re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), text)  # a space is \040
    real = Path(os.path.realpath(path))
    holding = [(decode(where), kind) for where, kind in mounted if real.is_relative_to(decode(where))]
    return max(holding, key=lambda row: len(row[0]), default=("", ""))[1]  # the last of equal ones is on top
