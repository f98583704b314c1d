"""Exports the adapters of a LoRA run as an adapter directory of PEFT, which `PeftModel.from_pretrained` loads.

    adapter_config.json         rank, alpha, which modules of the base have an adapter
    adapter_model.safetensors   lora_A [rank, inputs] and lora_B [outputs, rank] of each module, float32

The names are those of PEFT 0.21. The base is the Hugging Face directory of the run's base: what it was imported from,
or its own export.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from t5like.checkpoint import run_directory
from t5like.config.schema import Config
from t5like.errors import CheckpointError, ConfigError, shorten
from t5like.interop.huggingface import families, logits_check, safetensors_files, weight_maps
from t5like.interop.huggingface.weight_maps import TensorMap
from t5like.io.atomic import atomic_directory, check_free
from t5like.model.adapters import Adapter
from t5like.optim import lora

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
PREFIX = "base_model.model."
TASKS = {"Seq2SeqLM": "SEQ_2_SEQ_LM", "CausalLM": "CAUSAL_LM"}  # PEFT has none for masked language models


def export_run(workdir: Path, output: Path, *, step: int | None = None, family: str | None = None) -> Iterator[str]:
    """Write the adapters of a LoRA run as a directory for PEFT; yields lines that report the result.

    Args:
        workdir: the run.
        output: absent, or an empty directory.
        step: of the checkpoint; None: the latest.
        family: of the base; None: the default family of the model.

    Raises:
        ConfigError: `output` is not empty, or the run has no adapters, or has weights that are no adapters.
        CheckpointError: the family has no module for an adapter, or the file differs when it is read again.
    """
    check_free(output, "--output")
    saved = run_directory.config_of(workdir)
    if not saved.lora.rank:
        raise ConfigError(f"--format=peft: {workdir} has lora.rank=0, so no adapters; use --format=hf")
    loaded = run_directory.load(workdir, step)
    family = family or families.default_family(loaded.config.model)
    families.check_exportable(family, loaded.config)
    modules = _modules(family, loaded)
    arrays = {name: array for entry, adapter in modules for name, array in _tensors(entry, adapter)}
    specs = [safetensors_files.TensorSpec(name, "F32", array.shape) for name, array in arrays.items()]
    with atomic_directory(output) as directory:
        safetensors_files.write_file(directory / WEIGHTS, specs, arrays.__getitem__)
        values = adapter_config(loaded.config, family, [entry for entry, _ in modules])
        (directory / CONFIG).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
        for name, tensor in safetensors_files.header(directory / WEIGHTS).items():
            if not np.array_equal(safetensors_files.read(tensor), arrays[name]):
                raise CheckpointError(f"{name} was not written correctly; check the disk of {output}")
        size = sum(array.nbytes for array in arrays.values())
        yield f"adapters   {size:,} bytes, {len(arrays)} tensors, {family}, equal step {loaded.step} bit for bit"
    yield f"exported   {output}; PeftModel.from_pretrained(base, {str(output)!r}) loads it"


def adapter_config(config: Config, family: str, entries: list[TensorMap]) -> dict[str, Any]:
    """PEFT's adapter_config.json."""
    modules = sorted({re.escape(_module(entry)).replace(r"\{\}", r"\d+") for entry in entries})
    return {
        "peft_type": "LORA",
        "task_type": TASKS.get(logits_check.task_of(config.model)),
        "base_model_name_or_path": None,
        "inference_mode": True,
        "r": config.lora.rank,
        "lora_alpha": config.lora.alpha,
        "use_rslora": config.lora.rank_stabilized,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": family == "gpt2",
        "target_modules": "|".join(modules),  # a string is a regular expression of whole names
    }


def _modules(family: str, loaded: run_directory.Run) -> list[tuple[TensorMap, Adapter]]:
    """The adapters, each with the tensor of its kernel."""
    named = lora.leaves(loaded.params)
    whole = [name for name in named if lora.is_trained(loaded.config.lora, name) and not name.endswith("/lora")]
    if whole:
        raise ConfigError(
            f"--format=peft: this run also trains {shorten(whole)}, which are no adapters; use --format=hf, which "
            "exports the whole model"
        )
    by_kernel = {entry.params: entry for entry in weight_maps.weight_map(family, loaded.config.model)}
    found = []
    for name, leaf in named.items():
        if isinstance(leaf, Adapter):
            kernel = name.removesuffix("lora") + "kernel"
            if (kernel,) not in by_kernel:
                raise ConfigError(
                    f"--format=peft: {kernel} is a part of a joined tensor of {family}, for which PEFT has one "
                    "adapter; use --format=hf, or train without it in lora.targets"
                )
            found.append((by_kernel[kernel,], leaf))
    return found


def _module(entry: TensorMap) -> str:
    return entry.hf_name.removesuffix(".weight")


def _tensors(entry: TensorMap, adapter: Adapter) -> Iterator[tuple[str, np.ndarray]]:
    """The tensors of a kernel's adapters, layer by layer."""
    a, b = np.asarray(adapter.a, np.float32), np.asarray(adapter.b, np.float32)
    for y in range(entry.layers):
        name = f"{PREFIX}{_module(entry).format(y)}"
        yield f"{name}.lora_A.weight", np.ascontiguousarray(a[y].T)
        yield f"{name}.lora_B.weight", np.ascontiguousarray(b[y].T)
