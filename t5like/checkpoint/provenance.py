"""Provenance: everything that determines a run's result. Fingerprints of config, data and code, machine, versions.

`train` prints the main parts when it starts, and appends all of them to ``provenance.jsonl`` in the run directory, one
record per start: a run that is resumed on another machine has both. Two runs with equal fingerprints, processor,
versions and settings have bitwise equal losses; if results differ, one of these differs.

A fingerprint is the first 12 hex digits of a sha256. Nothing large is read: the fingerprint of a token store is that of
the checksums in its manifest. All of it takes about 20 ms.
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
from t5like.checkpoint.allowed_changes import MUTABLE_FIELDS
from t5like.config.formats import original_names
from t5like.config.schema import Config, changed_fields
from t5like.data.store.fingerprints import fingerprint, shard_checksums
from t5like.data.store.token_store import TokenStore
from t5like.data.tokenizers.tokenizer import Tokenizer
from t5like.errors import CheckpointError
from t5like.sharding import xla_options

FILE = "provenance.jsonl"  # in a run directory
PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy", "sentencepiece")
PACKAGE = Path(__file__).parents[1]
# Environment variables that change compiled programs or results; other JAX_ variables are paths of caches.
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
# Instruction sets of x86 and Arm for which XLA and its libraries have separate code.
INSTRUCTIONS = re.compile(r"sse4|avx|fma|f16c|amx|asimd|sve|sme(?![ap]?p)|bf16|i8mm")


# ---- Fingerprints ----


def config_fingerprint(config: Config) -> str:
    """Return the fingerprint of the fields that change updates (not in `MUTABLE_FIELDS`) and are not the default.

    Neither a field that a later version adds nor a new name of a field changes the fingerprints of existing configs.
    """
    fixed = {name: value for name, value in changed_fields(config).items() if not name.startswith(MUTABLE_FIELDS)}
    return fingerprint(original_names(fixed))


def fingerprints(
    config: Config, tokenizer: Tokenizer, stores: Sequence[TokenStore], data: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """Return ``config``, ``tokenizer``, ``stores`` (by source), ``heldout`` (of all sources), ``code``.

    Without stores, as for records that are read directly, ``stores`` has the texts of `data`.
    """
    if not stores:
        stored, heldout = dict(data or {}), fingerprint(dict(data or {}))
    else:
        checksums = [shard_checksums(store) for store in stores]
        stored = {source: fingerprint(each) for source, each in zip(config.data.source, checksums, strict=True)}
        heldout = fingerprint([shard_checksums(store, ("heldout",)) for store in stores])
    return {
        "config": config_fingerprint(config),
        "tokenizer": hashlib.sha256(tokenizer.model_bytes).hexdigest()[:12],  # of the file, equal to sha256sum
        "stores": stored,
        "heldout": heldout,
        "code": code_fingerprint(),
    }


def code_fingerprint() -> str:
    """Return the fingerprint of the package's source files, which includes uncommitted changes."""
    files = sorted(PACKAGE.rglob("*.py"))
    digests = [[path.relative_to(PACKAGE).as_posix(), hashlib.sha256(path.read_bytes()).hexdigest()] for path in files]
    return fingerprint(digests)


def commit() -> str | None:
    """Return the checked out git commit of the running clone; None if the package is installed without one."""
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
    """Return model name, architecture, usable cores, and the instruction sets on which arithmetic depends."""
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
    """Return the widest vector instruction set, as one name; it determines most of a processor's arithmetic."""
    names_by_prefix = {"amx": "AMX", "avx512f": "AVX-512", "avx2": "AVX2", "sve": "SVE", "asimd": "NEON"}
    return next(
        (shown for prefix, shown in names_by_prefix.items() if any(name.startswith(prefix) for name in instructions)),
        "",
    )


def versions() -> dict[str, str | None]:
    """Return the versions of Python, of the numerical libraries and of t5like, and its commit."""
    return {
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in PACKAGES},
        "t5like": __version__,
        "commit": commit(),
    }


def settings(config: Config, mesh: jax.sharding.Mesh) -> dict[str, Any]:
    """Return the settings of XLA and JAX: environment variables, JAX's flags, and options of the train step."""
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
    requested: Config,
    config: Config,
    mesh: jax.sharding.Mesh,
    tokenizer: Tokenizer,
    stores: Sequence[TokenStore],
    data: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Return everything that determines a run's result.

    Args:
        requested: the config as the run directory stores it, equal on every machine.
        config: resolved on `mesh`.
        stores: one for each of `data.source`; empty if the run reads records.
        data: what identifies the records, by source.
    """
    device = mesh.devices.flat[0]
    return {
        "fingerprints": fingerprints(requested, tokenizer, stores, data),
        "processor": processor(),
        "devices": {"kind": device.device_kind, "platform": device.platform, "count": mesh.size},
        "mesh": {axis: size for axis, size in mesh.shape.items() if size > 1},
        "processes": jax.process_count(),
        "versions": versions(),
        "settings": settings(config, mesh),
    }


def lines(record: Mapping[str, Any]) -> list[str]:
    """Return the main parts of `describe` as lines to print."""
    prints, cpu, packages = (record[name] for name in ("fingerprints", "processor", "versions"))
    stores = ", ".join(prints["stores"].values())
    model = " ".join(filter(None, (cpu["model"], widest(cpu["instructions"]))))
    code = f"t5like {packages['t5like']}" + (f" ({packages['commit'][:7]})" if packages["commit"] else "")
    return [
        f"run        config {prints['config']}, tokenizer {prints['tokenizer']}, data {stores}, "
        f"held out {prints['heldout']}",
        f"machine    {model}, Python {packages['python']}, jax {packages['jax']}, numpy {packages['numpy']}, {code}",
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
