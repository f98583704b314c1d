"""Compiles the train and eval step for a topology whose devices need not be attached, each in its own process.

`run` starts the processes, so that libtpu's output, environment variables and crashes stay out of the caller's process.
A process (`python -m t5like.plan.compile DIR STEP`) lowers and compiles one step, `train` or `eval`, and writes
``STEP.json`` (the compiler's memory analysis) and ``STEP.hlo.gz`` (the scheduled program, which `hlo_text` parses).
"""

import gzip
import hashlib
import importlib.util
import json
import os
import re
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from t5like.config import loader
from t5like.config.schema import Config
from t5like.errors import ConfigError, UserError
from t5like.io.atomic import replace_file
from t5like.optim import train_state
from t5like.plan import topology as topologies
from t5like.plan.topology import Topology
from t5like.sharding import auto, placement, xla_options

# TPU_SKIP_MDS_QUERY: no request to Google's metadata server. ALLOW_MULTIPLE_LIBTPU_LOAD: two steps compile in parallel.
# The accelerator's type and host only silence warnings that they are missing.
ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_STDERR_LOG_LEVEL": "3",
    "TPU_MIN_LOG_LEVEL": "3",
    "TF_CPP_MIN_LOG_LEVEL": "3",
}


class Program(NamedTuple):
    """One compiled step; bytes are per device."""

    text: str  # the scheduled HLO; empty if it does not fit, or jaxlib can't parse it
    lowered: str  # SHA-256 of the StableHLO
    arguments: int  # state and batch, with the padding of their layouts
    outputs: int
    aliased: int  # of the outputs: in the buffers of donated arguments
    temporary: int
    peak: int  # arguments and the maximum of live temporaries
    seconds: float  # of lowering and compiling
    out_of_memory: str = ""  # the compiler's message
    needed: int = 0  # bytes, if the message gives them
    cpu_seconds: float = 0.0  # of the process that compiled it
    resident: int = 0  # maximum resident bytes of that process


def check_installed(topology: Topology) -> None:
    """Refuse a topology whose compiler is not installed.

    Raises:
        ConfigError: with the package to install.
    """
    module, extra = {"tpu": ("libtpu", "tpu"), "gpu": ("jax_cuda12_plugin", "cuda"), "cpu": ("jax", "")}[
        topology.chip.platform
    ]
    if importlib.util.find_spec(module) is None:
        raise ConfigError(
            f"--topology={topology.name} needs the compiler in the package {module}, which is not installed (no device "
            f"is needed); pip install 't5like[{extra}]', or use --quick"
        )


def compile_steps(
    config: Config, topology: Topology, names: Sequence[str], keep: Path | None = None
) -> dict[str, Program]:
    """Compile the steps of these names, `train` or `eval`, in parallel; their files are written to `keep` if given.

    Raises:
        UserError: the compiler refused the program for another reason than memory.
    """
    with tempfile.TemporaryDirectory(prefix="t5like-plan-") as temporary:
        directory = keep or Path(temporary)
        request = {"config": loader.to_json(config), "topology": topology}
        try:
            directory.mkdir(parents=True, exist_ok=True)
            replace_file(directory / "request.json", json.dumps(request))
            for name in names:  # files of an earlier program
                for kept in (f"{name}.json", f"{name}.hlo.gz"):
                    (directory / kept).unlink(missing_ok=True)
        except OSError as error:
            raise ConfigError(f"--keep={directory} can't be written: {error.strerror}; use another folder") from None
        started = [(name, _start(directory, name, topology)) for name in names]
        try:
            return {name: _collect(directory, name, process) for name, process in started}
        finally:
            for _, process in started:
                if process.poll() is None:
                    process.kill()
                    process.wait()


def _start(directory: Path, name: str, topology: Topology) -> subprocess.Popen:
    inherited = {key: value for key, value in os.environ.items() if key not in ("XLA_FLAGS", "LIBTPU_INIT_ARGS")}
    flags = f"--xla_force_host_platform_device_count={topology.num_devices}" if topology.kind == "cpu" else ""
    return subprocess.Popen(
        [sys.executable, "-m", "t5like.plan.compile", str(directory), name],
        env={**inherited, **ENVIRONMENT, "XLA_FLAGS": flags, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=(directory / f"{name}.log").open("wb"),
    )


def _collect(directory: Path, name: str, process: subprocess.Popen) -> Program:
    code = process.wait()
    path = directory / f"{name}.json"
    if code or not path.exists():
        lines = (directory / f"{name}.log").read_text(encoding="utf-8", errors="replace").strip().split("\n")
        last = next((line for line in reversed(lines) if line.strip() and not line.startswith(" ")), "no message")
        raise UserError(f"the {name} step could not be compiled (exit code {code}): {last[:400]}")
    result = json.loads(path.read_text(encoding="utf-8"))
    if "refused" in result:
        raise ConfigError(result["refused"])
    return read(directory, name)


def read(directory: Path, name: str) -> Program:
    """Read what `compile_steps` wrote to a folder."""
    result = json.loads((directory / f"{name}.json").read_text(encoding="utf-8"))
    packed = directory / f"{name}.hlo.gz"
    return Program(text=gzip.decompress(packed.read_bytes()).decode() if packed.exists() else "", **result)


# ---- In the compiling process ----


def lower(config: Config, topology: Topology, name: str):
    """The step as `train`, or its evaluation, lowers it on these devices."""
    import jax

    from t5like.checkpoint.teacher import open_teacher, with_teacher_step
    from t5like.data import pipeline
    from t5like.optim import distillation, eval_step, step
    from t5like.sharding import mesh as meshes
    from t5like.types import Taught

    mesh = meshes.make_mesh(config, topologies.devices(topology))
    config = auto.resolve_auto(config, mesh)
    batch = pipeline.spec(config)
    abstract = train_state.abstract_state(config, batch, mesh)
    if name == "train" and config.distill.teacher:
        teacher = open_teacher(with_teacher_step(config, None), mesh)
        loss_fn, taught = distillation.distilled_loss(teacher.config), Taught(batch, teacher.abstract)
        return step.lower_train_step(config, taught, abstract, loss_fn, distillation.rows_of)
    if name == "train":
        return step.lower_train_step(config, batch, abstract)
    shapes = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), batch, placement.batch_shardings(batch, mesh)
    )
    zeros = eval_step.zero_metrics(config, abstract.params, batch)
    with jax.set_mesh(mesh):
        return eval_step.jit_eval_step(config, mesh).lower(abstract.params, shapes, zeros)


def compile_step(config: Config, topology: Topology, name: str) -> Program:
    """Lower and compile one step in this process."""
    begin = time.monotonic()
    lowered = lower(config, topology, name)
    digest = hashlib.sha256(lowered.as_text().encode()).hexdigest()
    try:
        with xla_options.refusals():
            program, text = compile_with_text(lowered, topology.chip.platform)
    except Exception as error:
        message = str(error)
        if "RESOURCE_EXHAUSTED" not in message and "out of memory" not in message.lower():
            raise
        return out_of_memory(message, digest, time.monotonic() - begin)
    memory = program.memory_analysis()
    return Program(
        text=text,
        lowered=digest,
        arguments=memory.argument_size_in_bytes,
        outputs=memory.output_size_in_bytes,
        aliased=memory.alias_size_in_bytes,
        temporary=memory.temp_size_in_bytes,
        peak=getattr(memory, "peak_memory_in_bytes", 0),
        seconds=time.monotonic() - begin,
    )


def compile_with_text(lowered, platform: str):
    """Compile; returns the program and its text, which is empty if it can't be parsed."""
    with tempfile.TemporaryDirectory(prefix="t5like-plan-") as dump:
        options = {"xla_dump_to": dump, "xla_dump_hlo_as_text": True} if platform == "tpu" else None
        program = lowered.compile(compiler_options=options)
        return program, program_text(program, Path(dump))


def program_text(program, dump: Path) -> str:
    """The scheduled program from jaxlib, or from the compiler's dump if jaxlib can't parse it; empty if there is none.

    jaxlib 0.10.2 can't parse embedding look-ups of libtpu 0.0.52 on chips with sparse cores, such as v5p ("async-update
    instruction should have 1 operands"): the compiler is newer than the parser.
    """
    from jax.errors import JaxRuntimeError

    try:
        return program.as_text()
    except JaxRuntimeError as error:
        print(f"the program can't be parsed: {error}", file=sys.stderr)
        stages = sorted(dump.glob("*.after_codegen.txt"), key=lambda path: path.stat().st_size)
        return stages[-1].read_text(encoding="utf-8") if stages else ""


def out_of_memory(message: str, digest: str, seconds: float) -> Program:
    """A program that does not fit, from the compiler's message: ``HLO temporaries (64.00G) exceeds available HBM``.

    Raises:
        ConfigError: a kernel does not fit in the core's own memory (VMEM), which no batch size and no mesh changes.
    """
    if "memory space vmem" in message:
        raise ConfigError(
            "model.kernels=tpu: the attention kernel for rows of this length does not fit in the core's own memory "
            "(the compiler: Ran out of memory in memory space vmem); use --config.model.kernels=plain, or shorter rows"
        )
    sizes = [_bytes(*size) for size in re.findall(r"\(([0-9.]+)([KMGT])\)", message)]
    line = " ".join(message.split())
    return Program("", digest, 0, 0, 0, 0, 0, seconds, line[:600], max(sizes, default=0))


def _bytes(number: str, unit: str) -> int:
    return int(float(number) * 1024 ** " KMGT".index(unit or " "))


def main(directory: Path, name: str) -> None:
    """Compile the step of `request.json` and write the result."""
    request = json.loads((directory / "request.json").read_text(encoding="utf-8"))
    kind, shape, num_slices, chip = request["topology"]
    topology = Topology(kind, tuple(shape), num_slices, topologies.Chip(*chip))
    try:
        program = compile_step(loader.from_json(request["config"]), topology, name)
    except UserError as error:
        result = {"refused": str(error)}
    else:
        result = program._asdict()
        del result["text"]
        if program.text:
            replace_file(directory / f"{name}.hlo.gz", gzip.compress(program.text.encode(), 5))
    used = resource.getrusage(resource.RUSAGE_SELF)
    resident = used.ru_maxrss * (1 if sys.platform == "darwin" else 1024)  # macOS counts bytes
    result |= {"cpu_seconds": used.ru_utime + used.ru_stime, "resident": resident}
    replace_file(directory / f"{name}.json", json.dumps(result))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
