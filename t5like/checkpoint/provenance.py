"""What decides a run's result: fingerprints of its config, data and code, the machine, and the versions of libraries.

`train` prints the main parts when it starts, and appends all of them to ``provenance.jsonl`` in the run directory, one
record per start: a run that is resumed on another machine shows both. Two runs whose records agree in fingerprints,
processor, versions and settings give the same losses bit by bit; where results differ, so does one of these.

A fingerprint is the first 12 hex digits of a sha256. Nothing large is read: token stores are known by the checksums in
their manifests. All of it takes some 20 ms.
"""

import hashlib
import importlib.metadata
import json
import os
import platform
import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from t5like import __version__
from t5like.checkpoint.run_directory import MUTABLE_FIELDS
from t5like.config.schema import Config, flatten
from t5like.data.store.token_store import SPLITS, TokenStore
from t5like.data.tokenizers.tokenizer import Tokenizer
from t5like.errors import CheckpointError
from t5like.sharding import xla_options

FILE = "provenance.jsonl"  # in a run directory
PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy", "sentencepiece")
PACKAGE = Path(__file__).parents[1]
# Environment variables that change what is compiled or computed; others that begin with JAX_ say where caches lie.
VARIABLES = (
    "XLA_FLAGS",
    "LIBTPU_INIT_ARGS",
    "NVIDIA_TF32_OVERRIDE",
    "JAX_DEFAULT_MATMUL_PRECISION",
    "JAX_DISABLE_MOST_OPTIMIZATIONS",
    "JAX_ENABLE_X64",
    "JAX_THREEFRY_PARTITIONABLE",
    "JAX_DEFAULT_PRNG_IMPL",
)
# Instruction sets of x86 and Arm for which XLA and the libraries below it have code of their own.
INSTRUCTIONS = re.compile(r"sse4|avx|fma|f16c|amx|asimd|sve|sme(?![ap]?p)|bf16|i8mm")


# ---- Fingerprints ----


def fingerprint(value: Any) -> str:
    """12 hex digits that stand for a value of JSON's types."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:12]


def config_fingerprint(config: Config) -> str:
    """Of the fields that decide what is learned (all but `run.MAY_CHANGE`), where they differ from their defaults.

    A field that a later version adds therefore leaves the fingerprints of existing configs as they are.
    """
    default = flatten(Config())
    changed = {name: value for name, value in flatten(config).items() if value != default[name]}
    return fingerprint({name: value for name, value in changed.items() if not name.startswith(MUTABLE_FIELDS)})


def shard_checksums(store: TokenStore, splits: Sequence[str] = SPLITS) -> dict[str, str]:
    """sha256 by file name of a token store's files, as its manifest has them."""
    return {
        name: file["sha256"]
        for piece in store.manifest["pieces"]
        for name, file in piece["files"].items()
        if name.split(".")[1] in splits
    }


def fingerprints(config: Config, tokenizer: Tokenizer, stores: Sequence[TokenStore]) -> dict[str, Any]:
    """``config``, ``tokenizer``, ``stores`` (by source), ``heldout`` (of all sources), ``code``."""
    return {
        "config": config_fingerprint(config),
        "tokenizer": hashlib.sha256(tokenizer.model_bytes).hexdigest()[:12],  # of the file, as sha256sum prints it
        "stores": {
            source: fingerprint(shard_checksums(store))
            for source, store in zip(config.data.source, stores, strict=True)
        },
        "heldout": fingerprint([shard_checksums(store, ("heldout",)) for store in stores]),
        "code": code_fingerprint(),
    }


def code_fingerprint() -> str:
    """Of the package's own source files: changes that are not committed show too."""
    files = sorted(PACKAGE.rglob("*.py"))
    digests = [[path.relative_to(PACKAGE).as_posix(), hashlib.sha256(path.read_bytes()).hexdigest()] for path in files]
    return fingerprint(digests)


def commit() -> str | None:
    """The git commit that is checked out in the clone that runs; None where the package is installed without one."""
    try:
        directory = PACKAGE.parent / ".git"
        if directory.is_file():  # of a worktree or a submodule: "gitdir: PATH"
            directory = PACKAGE.parent / directory.read_text("utf-8").removeprefix("gitdir:").strip()
        head = (directory / "HEAD").read_text("utf-8").strip()
        if not head.startswith("ref: "):
            return head
        shared = directory
        if (directory / "commondir").is_file():
            shared = directory / (directory / "commondir").read_text("utf-8").strip()
        name = head.removeprefix("ref: ")
        if (shared / name).is_file():
            return (shared / name).read_text("utf-8").strip()
        lines = (shared / "packed-refs").read_text("utf-8").splitlines()
        return next((line.split()[0] for line in lines if line.endswith(f" {name}")), None)
    except (OSError, ValueError):
        return None


# ---- The machine ----


def processor() -> dict[str, Any]:
    """Model name, architecture, cores that this process may use, and instruction sets that arithmetic depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8", "replace").splitlines()
    except OSError:  # not Linux
        lines = []
    fields = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in reversed(lines))}
    names = (fields.get("flags") or fields.get("Features") or "").split()  # x86, Arm
    return {
        "model": fields.get("model name") or platform.processor() or "unknown",
        "architecture": platform.machine(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "instructions": sorted(set(filter(INSTRUCTIONS.match, names))),
    }


def widest(instructions: Sequence[str]) -> str:
    """The instruction sets that decide most of a processor's arithmetic, as one name."""
    kinds = {"amx": "AMX", "avx512f": "AVX-512", "avx2": "AVX2", "sve": "SVE", "asimd": "NEON"}
    return next((shown for kind, shown in kinds.items() if any(name.startswith(kind) for name in instructions)), "")


def versions() -> dict[str, str | None]:
    """Of Python, the libraries that compute, t5like, and its commit."""
    return {
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in PACKAGES},
        "t5like": __version__,
        "commit": commit(),
    }


def settings(config: Config, mesh: jax.sharding.Mesh) -> dict[str, Any]:
    """What XLA and JAX are asked for: environment variables that are set, JAX's switches, the train step's options."""
    return {
        **{name: os.environ[name] for name in VARIABLES if os.environ.get(name)},
        "jax_default_matmul_precision": jax.config.jax_default_matmul_precision,
        "jax_enable_x64": jax.config.jax_enable_x64,
        "jax_threefry_partitionable": jax.config.jax_threefry_partitionable,
        "compiler_options": xla_options.of_training(config.train, mesh),
        "kernels": config.model.kernels,
        "layers": config.model.layers,
        "dtype": config.model.dtype,
        "microbatches": config.train.microbatches,
    }


# ---- The record ----


def describe(
    asked: Config, config: Config, mesh: jax.sharding.Mesh, tokenizer: Tokenizer, stores: Sequence[TokenStore]
) -> dict[str, Any]:
    """All that decides a run's result.

    Args:
        asked: as the run directory keeps it, the same on every machine.
        config: settled on `mesh`.
        stores: one for each of `data.source`.
    """
    first = mesh.devices.flat[0]
    return {
        "fingerprints": fingerprints(asked, tokenizer, stores),
        "processor": processor(),
        "devices": {"kind": first.device_kind, "platform": first.platform, "count": mesh.size},
        "mesh": {axis: size for axis, size in mesh.shape.items() if size > 1},
        "processes": jax.process_count(),
        "versions": versions(),
        "settings": settings(config, mesh),
    }


def lines(record: Mapping[str, Any]) -> list[str]:
    """The main parts of `describe`, for people."""
    prints, cpu, known = (record[name] for name in ("fingerprints", "processor", "versions"))
    stores = ", ".join(prints["stores"].values())
    model = " ".join(filter(None, (cpu["model"], widest(cpu["instructions"]))))
    code = f"t5like {known['t5like']}" + (f" ({known['commit'][:7]})" if known["commit"] else "")
    return [
        f"run        config {prints['config']}, tokenizer {prints['tokenizer']}, data {stores}, "
        f"held out {prints['heldout']}",
        f"machine    {model}, Python {known['python']}, jax {known['jax']}, numpy {known['numpy']}, {code}",
    ]


def append(workdir: Path, step: int, record: Mapping[str, Any]) -> None:
    """Add the record of a start after `step` updates to the run directory.

    Raises:
        CheckpointError: it can't be written.
    """
    path = workdir / FILE
    values = {"step": step, "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), **record}
    try:
        with path.open("a+b") as file:
            if file.tell() and file.seek(-1, os.SEEK_END) >= 0 and file.read(1) != b"\n":
                file.write(b"\n")  # the last record was cut off
            file.write(json.dumps(values).encode() + b"\n")
    except OSError as error:
        raise CheckpointError(f"{path} can't be written: {error.strerror}; use another --workdir") from None
