"""Import of a Hugging Face model directory as a run with a checkpoint of step 0, and export of a run.

Both write a temporary directory and rename it when it is complete. An export first reads its files again and compares
every tensor and, if transformers is installed, logits. An import keeps config.json and other small files, byte for
byte, and the names and dtypes of the tensors in `RUN/hf/`, for a later export. Called by `cli.commands`.
"""

import dataclasses
import json
import shlex
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from t5like import tree
from t5like.checkpoint import run_directory
from t5like.config import loader
from t5like.config.model_schema import ModelConfig
from t5like.config.schema import Config
from t5like.data import pipeline
from t5like.data.objectives import masking
from t5like.data.tokenizers.tokenizer import Tokenizer
from t5like.errors import CheckpointError, ConfigError, shorten
from t5like.interop.huggingface import (
    card,
    eos_ids,
    families,
    family_keys,
    label_heads,
    logits_check,
    safetensors_files,
    side_files,
    tensor_check,
    tokenizer_files,
    weight_maps,
)
from t5like.interop.huggingface.config_keys import positive_int
from t5like.interop.huggingface.weight_maps import TensorMap
from t5like.io.atomic import atomic_directory, check_free
from t5like.optim import train_state
from t5like.sharding import auto
from t5like.sharding import mesh as meshes

KEPT = "hf"  # the folder of a run directory with the files that an import keeps


# ---- Import ----


def import_run(source: Path, workdir: Path) -> Iterator[str]:
    """Write a run directory from a model directory; yields lines that report the result.

    Raises:
        ConfigError: `workdir` is not empty.
        CheckpointError: the directory has no supported model, or is damaged.
        DataError: its tokenizer can't be used.
    """
    if not source.is_dir():
        raise CheckpointError(f"--input={source} is not a directory; name one with config.json and model.safetensors")
    check_free(workdir, "--workdir")
    side_files.check_files(source)
    hf_config = safetensors_files.read_json(source / "config.json")
    tensors = safetensors_files.tensors(source)
    untied = tensor_check.has_own_head(hf_config, tensors)
    family, model = families.model_of(
        hf_config, untied=untied, next_sentence_head=tensor_check.has_next_sentence_head(hf_config, tensors)
    )
    rows = families.vocabulary_rows(family, hf_config)
    tensor_check.check_sizes(model, rows, tensors)
    tokenizer = tokenizer_files.read(source)
    extra_eos, unknown_eos = eos_ids.extra_ids(source, hf_config, tokenizer)
    special = {"extra_eos_ids": extra_eos}
    if model.architecture == "encoder_decoder":
        special["decoder_start_id"] = eos_ids.decoder_start(source, hf_config)
    config = _new_config(model, tokenizer, rows, hf_config, workdir, special)
    names, ignored = tensor_check.canonical_names(family, model, tensors)
    record = tensor_check.ImportRecord(
        family, names, {name: tensors[files[0]].dtype for name, files in names.items()}, rows
    )

    mesh = meshes.make_mesh(config, jax.devices()[:1])
    resolved = auto.resolve_auto(config, mesh)
    shape = train_state.abstract_state(resolved, pipeline.spec(resolved), mesh)
    abstract = tree.flatten(shape.params)
    weight_map = weight_maps.weight_map(family, model)
    tensor_check.check(weight_map, abstract, record, tensors)
    yield f"model      {tree.num_parameters(abstract):,} parameters, {family}, {config.model.architecture}"

    with atomic_directory(workdir) as directory:
        leaves = {}
        for entry in weight_map:
            leaves |= _read_params(entry, abstract, record, tensors)
        params = jax.tree.unflatten(jax.tree.structure(shape.params), [leaves.pop(name) for name in abstract])
        run_directory.write_imported(params, config, tokenizer, directory)
        side_files.keep_files(source, directory / KEPT, record)
    if ignored:
        yield f"           ignored, not weights: {shorten(ignored)}"
    yield f"tokenizer  {tokenizer.vocab_size:,} ids for {config.vocab_rows:,} rows"
    if extra_eos:
        yield f"           texts also end with {shorten(map(str, extra_eos))}, by {eos_ids.KEY}"
    if unknown_eos:
        yield f"           not in the vocabulary, ignored in {eos_ids.KEY}: {shorten(map(str, unknown_eos))}"
    use = "t5like generate --workdir={} --prompt=... generates text"
    if not model.has_decoder:
        use = "t5like embed --workdir={} --inputs=TEXTS --output=embeddings.npy writes embeddings"
    yield f"imported   {workdir}; {use.format(shlex.quote(str(workdir)))}"


def _new_config(
    model: ModelConfig,
    tokenizer: Tokenizer,
    rows: Any,
    hf_config: Mapping[str, Any],
    workdir: Path,
    special: dict[str, Any],
) -> Config:
    """A config for the model, with data and optimizer settings for further training."""
    if type(rows) is not int or rows < tokenizer.vocab_size:
        raise CheckpointError(
            f"config.json: vocab_size={rows!r} must be at least {tokenizer.vocab_size}, the tokenizer's ids"
        )
    ids = tokenizer.vocab_size
    multiple = next(m for m in (128, 64, 32, 16, 8, 4, 2, 1, rows) if -(-ids // m) * m == rows)
    longest = (
        model.max_length if model.positions == "learned" else positive_int(hf_config, "max_position_embeddings", 2**30)
    )
    data = {
        "encoder_decoder": _denoising(tokenizer.num_sentinels),
        "decoder": {"objective": "causal_lm", "inputs_length": 0, "targets_length": min(1024, longest)},
        "encoder": {
            "objective": "mlm_nsp" if model.has_next_sentence_head else "mlm",
            "inputs_length": min(512, longest),
        },
    }[model.architecture]
    optimizer = {"name": "adamw", "learning_rate": 5e-5, "schedule": "linear", "warmup_steps": 500}
    if model.architecture == "encoder_decoder":  # as T5 is fine-tuned (Raffel et al. 2020, section 3.1.2)
        optimizer = {"name": "adafactor", "learning_rate": 1e-3, "schedule": "constant", "warmup_steps": 0}
    path = str(workdir / "tokenizer.model")
    values = {
        "tokenizer": {
            "path": path,
            "vocab_size": ids,
            "num_sentinels": tokenizer.num_sentinels,
            **special,
        },
        "data": data,
        "model": {**dataclasses.asdict(model), "vocab_multiple": multiple},
        "optimizer": optimizer,
        "train": {"num_steps": 10_000},
    }
    try:
        return loader.resolve(values)
    except ConfigError as error:  # caused by values of config.json
        raise CheckpointError(f"config.json describes a model that t5like does not support: {error}") from None


def _denoising(sentinels: int) -> dict[str, Any]:
    """Span corruption with row lengths that have enough sentinels, about one in 20 tokens."""
    if sentinels < 4:
        return {"objective": "prefix_lm"}
    return {"inputs_length": min(512, 16 * sentinels), "targets_length": min(114, 4 * sentinels)}


def _read_params(
    entry: TensorMap,
    abstract: Mapping[str, Any],
    record: tensor_check.ImportRecord,
    tensors: Mapping[str, safetensors_files.Tensor],
) -> dict[str, jax.Array]:
    """The parameters of an entry of the weight map, in float32, read layer by layer."""
    arrays = [np.ones(abstract[name].shape, np.float32) for name in entry.params]  # see `TensorMap.first`
    for hf_name, y in entry.names():
        tensor = safetensors_files.read(tensors[record.names[hf_name][0]])
        tensor_check.check_finite(tensors[record.names[hf_name][0]], tensor)
        for array, part in zip(arrays, weight_maps.from_huggingface(entry, tensor), strict=True):
            array[... if y is None else y] = part
    return {
        name: jax.device_put(array, abstract[name].sharding) for name, array in zip(entry.params, arrays, strict=True)
    }


# ---- Export ----


def export_run(
    workdir: Path,
    output: Path,
    *,
    step: int | None = None,
    family: str | None = None,
    dtype: str | None = None,
    max_shard_size: int = 5 * 10**9,
) -> Iterator[str]:
    """Write a run as a model directory for transformers; yields lines that report the result.

    Args:
        workdir: the run.
        output: absent, or an empty directory.
        step: of the checkpoint; None: the latest.
        family: None: the family of the import, or the default family of the model.
        dtype: of the weights: float32, bfloat16 or float16. None: the dtypes of the import if the run has not been
            trained since; else float32.
        max_shard_size: maximum bytes of weights in a file.

    Raises:
        ConfigError: `output` is not empty.
        CheckpointError: the family can't represent the model, or a comparison fails; then nothing is written.
    """
    check_free(output, "--output")
    loaded = run_directory.load(workdir, step, merged=True)
    record = _load_record(workdir / KEPT)
    family = family or (record.family if record else families.default_family(loaded.config.model))
    families.check_exportable(family, loaded.config)
    labels = loaded.config.data.label_objective  # whose head an imported file does not have
    record = record if record and record.family == family and not labels else None
    export = Export(loaded, family, record, dtype)
    with atomic_directory(output) as directory:
        files = safetensors_files.write(directory, export.specs(), export.value, max_shard_size=max_shard_size)
        size = sum((directory / file).stat().st_size for file in files)
        yield f"weights    {size:,} bytes in {len(files)} file{'s' * (len(files) > 1)}, {family}"
        _write_json(directory / "config.json", export.config_json(workdir / KEPT))
        if differs := _write_other_files(export, directory, workdir):
            yield f"tokenizer  {differs}"
        compare(directory, export)
        yield f"compared   {len(export.specs())} tensors, read again, equal step {loaded.step} bit for bit"
        yield f"           {logits_check.compare(directory, loaded.config, export.written_params())}"
    yield f"exported   {output}"


class Export:
    """The export of a run: its tensors and its config.json."""

    def __init__(
        self, loaded: run_directory.Run, family: str, record: tensor_check.ImportRecord | None, dtype: str | None
    ):
        self.loaded, self.family, self.record = loaded, family, record
        self.leaves = tree.flatten(loaded.params)
        self.rows = record.rows if record else loaded.config.tokenizer.vocab_size
        self.keeps_dtypes = dtype is None and record is not None and loaded.step == 0
        self.dtype = dtype or "float32"
        weight_map = label_heads.tensors(family, loaded.config)
        self._entries = {name: (entry, y) for entry in weight_map for name, y in entry.names()}
        file_names = record.names if record else {name: [name] for name in self._entries}
        self._canonical = {file_name: name for name in self._entries for file_name in file_names[name]}

    def specs(self) -> list[safetensors_files.TensorSpec]:
        """All tensors of the export."""
        specs = []
        for file_name, name in self._canonical.items():
            entry, _ = self._entries[name]
            shape = weight_maps.shape_of(entry, self.leaves)
            shape = (self.rows, *shape[1:]) if entry.vocabulary else shape
            specs.append(safetensors_files.TensorSpec(file_name, self._dtype_of(name), shape))
        return specs

    def _dtype_of(self, name: str) -> str:
        names = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
        return self.record.dtypes[name] if self.keeps_dtypes else names[self.dtype]

    def value(self, file_name: str) -> np.ndarray:
        """A tensor of the export. Padding rows of the vocabulary are removed: transformers does not mask them."""
        entry, y = self._entries[self._canonical[file_name]]
        parts = [np.asarray(self.leaves[name]) for name in entry.params]
        array = weight_maps.to_huggingface(entry, [part if y is None else part[y] for part in parts])
        array = array[: self.rows] if entry.vocabulary else array
        with np.errstate(over="ignore"):
            cast = array.astype(safetensors_files.DTYPES[self._dtype_of(self._canonical[file_name])])
        if cast.dtype == np.float16 and not np.array_equal(np.isfinite(cast), np.isfinite(array)):
            raise CheckpointError(
                f"--dtype=float16 can't represent {file_name}: its largest value is above 65,504; use bfloat16"
            )
        return cast

    def config_json(self, kept: Path) -> dict[str, Any]:
        """config.json: the imported one with later changes, or a new one."""
        config, tokenizer = self.loaded.config, self.loaded.tokenizer
        if self.record is None:
            ends = eos_ids.listed(config, tokenizer)
            pad = tokenizer.pad_id
            special = {}
            if config.model.architecture == "encoder" and tokenizer.num_sentinels > masking.CLS:
                mask, cls = tokenizer.sentinel_ids[[masking.MASK, masking.CLS]].tolist()
                special = {"cls": cls, "sep": tokenizer.eos_id, "mask": mask}
            return families.config_of(
                self.family, config, rows=self.rows, eos=ends, pad=pad, dtype=self.dtype, special_ids=special
            )
        values = safetensors_files.read_json(kept / "config.json")
        _, imported = families.model_of(
            values, untied=not config.model.tied_embeddings, next_sentence_head=config.model.next_sentence_head
        )
        if config.model.dropout_rate != imported.dropout_rate:
            values |= family_keys.dropout_keys(self.family, config.model.dropout_rate)
        if not self.keeps_dtypes:
            values |= {key: self.dtype for key in ("dtype", "torch_dtype") if key in values} or {"dtype": self.dtype}
        return values

    def written_params(self) -> Any:
        """The parameters as written, for the comparison of logits. Consumes the parameters of the run."""
        if self.keeps_dtypes or self.dtype == "float32":
            return self.loaded.params
        round_to = jnp.dtype(self.dtype)
        rounded = [self.leaves.pop(name).astype(round_to).astype(jnp.float32) for name in list(self.leaves)]
        return jax.tree.unflatten(jax.tree.structure(self.loaded.params), rounded)


def compare(directory: Path, export: Export) -> None:
    """Read a written directory as an import does, and refuse it if anything differs from the run.

    Raises:
        CheckpointError: there is a difference, caused by the disk or by an internal error.
    """
    model = export.loaded.config.model
    tensors = safetensors_files.tensors(directory)
    family, read = families.model_of(
        safetensors_files.read_json(directory / "config.json"),
        untied=not model.tied_embeddings,
        next_sentence_head=model.next_sentence_head,
    )
    if family != export.family or families.numeric_fields(read) != families.numeric_fields(model):
        raise CheckpointError(f"{directory / 'config.json'} does not describe the exported model; please report this")
    for spec in export.specs():
        written, value = safetensors_files.read(tensors[spec.name]), export.value(spec.name)
        if written.dtype != value.dtype or not np.array_equal(
            *(x.reshape(-1).view(np.uint8) for x in (written, value))
        ):
            raise CheckpointError(f"{spec.name} was not written correctly; check the disk of {directory}")


def _write_other_files(export: Export, directory: Path, workdir: Path) -> str | None:
    """Tokenizer, generation settings, model card. Returns a line if AutoTokenizer may encode some texts differently."""
    loaded, config = export.loaded, export.loaded.config
    kept, differs = workdir / KEPT, None
    if export.record:
        for path in kept.iterdir():
            if path.name not in (side_files.RECORD, "config.json") and not path.is_symlink():
                shutil.copyfile(path, directory / path.name)
    else:
        longest = config.row_length if config.model.architecture == "decoder" else config.data.inputs_length
        differs = tokenizer_files.write(loaded.tokenizer, directory, family=export.family, max_length=longest)
    if config.model.has_decoder and not (directory / eos_ids.GENERATION).exists():
        ends, pad = eos_ids.listed(config, loaded.tokenizer), loaded.tokenizer.pad_id
        is_pair = config.model.architecture == "encoder_decoder"
        start = {"decoder_start_token_id": config.tokenizer.decoder_start_id} if is_pair else {}
        settings = {eos_ids.KEY: ends, "pad_token_id": pad, **start, "max_new_tokens": card.new_tokens(config)}
        _write_json(directory / eos_ids.GENERATION, settings)
    card.write(directory, workdir, loaded, export.family)
    return differs


def _load_record(kept: Path) -> tensor_check.ImportRecord | None:
    """The record of the import that created a run, or None."""
    if not (kept / side_files.RECORD).is_file():
        return None
    try:
        return tensor_check.ImportRecord(**safetensors_files.read_json(kept / side_files.RECORD))
    except TypeError:
        raise CheckpointError(f"{kept / side_files.RECORD} is not a record of an import; move it away") from None


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
