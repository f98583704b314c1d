"""The flags of `t5like launch` that describe a job: one table with help, unit, range, example and backends.

A flag belongs to the backends that can do what it asks for; another backend refuses it. Called by `launch.options`.
"""

from typing import Any, NamedTuple

from launch import flag_values
from launch.job import check_text
from launch.record import BACKENDS
from t5like.config.field_types import Range

CLUSTERS = ("slurm", "kubernetes", "tpu_vm")


class Option(NamedTuple):
    """A flag that is a field of `JobSpec`.

    Attributes:
        flag: its name without dashes.
        text: help, with the unit.
        example: a value that works.
        backends: that take it.
        kind: ``text``, ``number``, ``duration``, ``switch``, or a function of `flag_values` by name.
        limits: of a number.
        field: of `JobSpec`, if it has another name; such a flag may be repeated.
    """

    flag: str
    text: str
    example: str
    backends: tuple[str, ...] = BACKENDS
    kind: str = "text"
    limits: Range | None = None
    field: str = ""

    @property
    def help(self) -> str:
        """Help text with range and example."""
        parts = [self.text]
        if self.limits:
            parts.append(str(self.limits))
        parts += ["may be repeated"] * bool(self.field)
        example = f"--{self.flag}" if self.kind == "switch" else f"--{self.flag}={self.example}"
        return "; ".join([*parts, f"such as {example}"]).replace("%", "%%")

    def convert(self, text: str, backend: str) -> Any:
        """Return the value of a text for a backend; raises ConfigError."""
        if self.kind == "number":
            return flag_values.number(self.flag, text, self.limits, self.example)
        if self.kind == "text":
            return check_text(f"--{self.flag}", text)
        if self.kind == "variable":
            return flag_values.variable(self.flag, text, backend)
        return getattr(flag_values, self.kind)(self.flag, text)


_number = lambda flag, text, example, limits, backends=BACKENDS: Option(flag, text, example, backends, "number", limits)
GROUPS: dict[str, tuple[Option, ...]] = {
    "machines": (
        Option(
            "accelerator", "cpu, or a topology as in t5like plan: TPU slice, or hosts x GPUs; default: cpu", "h100:8x8"
        ),
        _number("slices", "TPU slices of that topology; default: 1", "2", Range(1, 4096), ("kubernetes", "tpu_vm")),
        _number("nodes", "hosts of the job, or of a slice; default: those of --accelerator", "4", Range(1, 65536)),
        _number("processes_per_node", "processes per host; GPUs: 1, or one per GPU; default: 1", "8", Range(1, 1024)),
        _number("fake_devices", "CPU devices per process; 0: JAX's own devices; default: 0", "4", Range(0, 1024)),
        _number(
            "cpus_per_process", "CPU cores per process; 0: the backend's default", "16", Range(0, 4096), CLUSTERS[:2]
        ),
        _number(
            "memory_gib", "main memory per host in GiB; 0: the backend's default", "64", Range(0, 65536), CLUSTERS[:2]
        ),
        Option("spot", "use machines that can be preempted", "true", ("kubernetes", "tpu_vm"), "switch"),
        Option("reserved", "use the reservation of the project", "true", ("tpu_vm",), "switch"),
    ),
    "time and restarts": (
        Option(
            "time_limit",
            "time after which the scheduler ends the job, in d, h, m, s; 0: none",
            "12h",
            CLUSTERS,
            "duration",
        ),
        Option("wait_limit", "time that a request waits for machines; default: 1d", "12h", ("tpu_vm",), "duration"),
        Option("grace", "time to save between the signal and the end, in m, s; default: 2m", "5m", kind="duration"),
        _number(
            "retries",
            "restarts after a lost process or host; a preemption does not count; default: 10",
            "3",
            Range(0, 1000),
        ),
    ),
    "environment": (
        Option(
            "env",
            "environment variable: NAME=VALUE, or NAME for its current value",
            "LOG_LEVEL=info",
            kind="variable",
            field="env",
        ),
        Option(
            "secret",
            "environment variable whose value is never written; Slurm, local: NAME, set in this shell; Kubernetes: "
            "NAME=SECRET/KEY; TPU VMs: NAME=SECRET of Secret Manager",
            "WANDB_API_KEY",
            kind="secret",
            field="secrets",
        ),
        Option("setup", "shell line on every host before the command", "'module load cuda/12'", field="setup"),
        Option(
            "python",
            "interpreter that has t5like, on the machines or in the image; default: see docs/launch.md",
            "/opt/venv/bin/python",
        ),
        Option("directory", "working directory of the job, absolute", "/home/me/t5like"),
        Option("compile_cache", "directory of JAX's compilation cache, best shared by all hosts", "/shared/jax_cache"),
        Option(
            "log_directory",
            "directory of log files; default: WORKDIR/logs",
            "/shared/logs",
            ("local", "slurm", "tpu_vm"),
        ),
    ),
    "container and storage": (
        Option("image", "container image with a tag or digest", "registry.example/t5like:1.0", CLUSTERS, "image"),
        Option("container", "program that starts the image: pyxis or apptainer", "pyxis", ("slurm",)),
        Option(
            "mount",
            "storage at an absolute path of the job: SOURCE:PATH or SOURCE:PATH:ro",
            "gs://BUCKET:/data",
            CLUSTERS,
            "mount",
            field="mounts",
        ),
        Option("install", "requirement or wheel that the machines install", "'t5like[tpu]==0.1.0'", ("tpu_vm",)),
    ),
    "Slurm": tuple(
        Option(flag, text, example, ("slurm",))
        for flag, text, example in (
            ("account", "account that is charged", "lab"),
            ("partition", "partition", "gpu"),
            ("qos", "quality of service", "long"),
            ("reservation", "reservation", "course"),
            ("constraint", "features that the nodes must have", "'h100&ib'"),
            ("gres", "generic resources per node; default: the GPUs of --accelerator", "gpu:h100:8"),
        )
    ),
    "Kubernetes": tuple(
        Option(flag, text, example, ("kubernetes", "tpu_vm") if flag == "service_account" else ("kubernetes",))
        for flag, text, example in (
            ("queue", "local queue of Kueue", "team-a"),
            ("namespace", "namespace; default: that of the current context", "research"),
            ("service_account", "service account of the pods, or e-mail of that of the TPU VMs", "trainer"),
            ("priority", "priority class", "high"),
        )
    )
    + (
        Option(
            "node_selector",
            "label that the nodes must have",
            "nvidia.com/gpu.product=NVIDIA-H100-80GB-HBM3",
            ("kubernetes",),
            kind="label",
            field="node_selector",
        ),
    ),
    "TPU VMs": tuple(
        Option(flag, text, example, ("tpu_vm",))
        for flag, text, example in (
            ("project", "project of Google Cloud; default: that of gcloud", "lab-project"),
            ("zone", "zone that has these TPUs", "europe-west4-b"),
            ("runtime_version", "software version of the machines; default: JAX's for the chip", "v2-alpha-tpuv5-lite"),
            ("network", "VPC network; default: default", "tpu-net"),
        )
    ),
}
OPTIONS = {option.flag: option for options in GROUPS.values() for option in options}
