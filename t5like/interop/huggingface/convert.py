"""A Hugging Face model directory in, as a run directory with a checkpoint of step 0; a run out, as such a directory.

Both build what they make beside its place and rename it when it is whole; an export reads its own files again first and
compares every tensor, and, where transformers is installed, logits. What an import keeps of the directory (config.json
and other small files, byte for byte, and which names and dtypes the tensors had) lies in `RUN/hf/` for the way back.
Called by `main`.
"""

import dataclasses
import json
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
from t5like.config.schema import Config, ModelConfig
from t5like.data import pipeline
from t5like.data.tokenizers.tokenizer import Tokenizer
from t5like.errors import CheckpointError, ConfigError, shorten
from t5like.interop.huggingface import (
    card,
    eos_ids,
    families,
    family_keys,
    logits_check,
    safetensors_files,
    tensor_check,
    tokenizer_files,
    weight_maps,
)
from t5like.interop.huggingface.config_keys import positive_int
from t5like.interop.huggingface.weight_maps import Row
from t5like.io.atomic import atomic_directory, check_free
from t5like.optim import step as steps
from t5like.sharding import auto
from t5like.sharding import mesh as meshes

KEPT = "hf"  # the folder in a run directory
RECORD = "import.json"  # what an import knew, beside the kept files
SIDE_FILES = ("*.json", "*.jinja", "*.txt", "*.model")  # kept, but for weights' indices
LARGEST_SIDE_FILE = 64 * 2**20  # bytes


# ---- In ----


def import_run(source: Path, workdir: Path) -> Iterator[str]:
    """Make a run directory of a model directory; yields lines that say what happened.

    Raises:
        ConfigError: `workdir` is not empty.
        CheckpointError: the directory holds something else than a model that ours can be, or is damaged.
        DataError: its tokenizer can't be used.
    """
    if not source.is_dir():
        raise CheckpointError(f"--input={source} is not a directory; name one with config.json and model.safetensors")
    check_free(workdir, "--workdir")
    hf = safetensors_files.read_json(source / "config.json")
    found = safetensors_files.tensors(source)
    untied = tensor_check.has_own_head(hf, found)
    family, model = families.model_of(
        hf, untied=untied, next_sentence_head=tensor_check.has_next_sentence_head(hf, found)
    )
    rows = hf.get("vocab_size")
    tensor_check.check_sizes(model, rows, found)
    tokenizer = tokenizer_files.read(source)
    extra_eos, unknown_eos = eos_ids.extra_ids(source, hf, tokenizer)
    config = _new_config(model, tokenizer, rows, hf, workdir, extra_eos)
    names, left_out = tensor_check.canonical_names(family, model, found)
    imported = tensor_check.Imported(
        family, names, {name: found[files[0]].dtype for name, files in names.items()}, rows
    )

    mesh = meshes.make_mesh(config, jax.devices()[:1])
    settled = auto.resolve_auto(config, mesh)
    shape = steps.abstract_state(settled, pipeline.spec(settled), mesh)
    wanted = tree.flatten(shape.params)
    rows_of_table = weight_maps.table(family, model)
    tensor_check.check(rows_of_table, wanted, imported, found)
    yield f"model      {tree.num_parameters(wanted):,} parameters, {family}, {config.model.architecture}"

    with atomic_directory(workdir) as made:
        leaves = {}
        for row in rows_of_table:
            leaves |= _filled(row, wanted, imported, found)
        params = jax.tree.unflatten(jax.tree.structure(shape.params), [leaves.pop(name) for name in wanted])
        run_directory.write_imported(params, config, tokenizer, made)
        _keep(source, made / KEPT, imported)
    if left_out:
        yield f"           left out, no weights: {shorten(left_out)}"
    yield f"tokenizer  {tokenizer.vocab_size:,} ids for {config.vocab_rows:,} rows"
    if extra_eos:
        yield f"           texts also end with {shorten(map(str, extra_eos))}, by {eos_ids.KEY}"
    if unknown_eos:
        yield f"           no tokens, left out of {eos_ids.KEY}: {shorten(map(str, unknown_eos))}"
    yield f"imported   {workdir}; t5like generate --workdir={workdir} --prompt=... speaks with it"


def _new_config(
    model: ModelConfig, tokenizer: Tokenizer, rows: Any, hf: Mapping[str, Any], workdir: Path, extra_eos: list[int]
) -> Config:
    """A config for the model, with data and optimizer to go on learning by."""
    if type(rows) is not int or rows < tokenizer.vocab_size:
        raise CheckpointError(
            f"config.json: vocab_size={rows!r} must be at least {tokenizer.vocab_size}, the tokenizer's ids"
        )
    ids = tokenizer.vocab_size
    multiple = next(m for m in (128, 64, 32, 16, 8, 4, 2, 1, rows) if -(-ids // m) * m == rows)
    longest = model.max_length if model.positions == "learned" else positive_int(hf, "max_position_embeddings", 2**30)
    data = {
        "encoder_decoder": _denoising(tokenizer.num_sentinels),
        "decoder": {"objective": "causal_lm", "inputs_length": 0, "targets_length": min(1024, longest)},
        "encoder": {"objective": "mlm_nsp" if model.next_sentence_head else "mlm", "inputs_length": min(512, longest)},
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
            "extra_eos_ids": extra_eos,
        },
        "data": data,
        "model": {**dataclasses.asdict(model), "vocab_multiple": multiple},
        "optimizer": optimizer,
        "train": {"num_steps": 10_000},
    }
    try:
        return loader.resolve(values)
    except ConfigError as error:  # of what their file says
        raise CheckpointError(f"config.json describes no model that t5like can be: {error}") from None


def _denoising(sentinels: int) -> dict[str, Any]:
    """Span corruption in rows that have a sentinel for each span, one in about 20 tokens."""
    if sentinels < 4:
        return {"objective": "prefix_lm"}
    return {"inputs_length": min(512, 16 * sentinels), "targets_length": min(114, 4 * sentinels)}


def _filled(
    row: Row, wanted: Mapping[str, Any], imported: tensor_check.Imported, found: Mapping[str, safetensors_files.Tensor]
) -> dict[str, jax.Array]:
    """The parameters of a row, in float32, each layer read into its place."""
    arrays = [np.empty(wanted[name].shape, np.float32) for name in row.ours]
    for theirs, y in row.places():
        for array, part in zip(
            arrays, weight_maps.to_ours(row, safetensors_files.read(found[imported.names[theirs][0]])), strict=True
        ):
            array[... if y is None else y] = part
    return {name: jax.device_put(array, wanted[name].sharding) for name, array in zip(row.ours, arrays, strict=True)}


def _keep(source: Path, place: Path, imported: tensor_check.Imported) -> None:
    """Copy the small files, so that an export has them again. Code that a file names is forgotten: it is never run."""
    place.mkdir()
    for path in sorted({path for pattern in SIDE_FILES for path in source.glob(pattern)}):
        small = path.is_file() and path.stat().st_size <= LARGEST_SIDE_FILE
        if not small or path.name.endswith(".index.json") or path.name == RECORD:
            continue
        content = path.read_bytes()
        if b'"auto_map"' in content and path.suffix == ".json":
            values = safetensors_files.read_json(path)
            values.pop("auto_map", None)
            content = json.dumps(values, indent=2).encode()
        (place / path.name).write_bytes(content)
    (place / RECORD).write_text(json.dumps(imported._asdict(), indent=1), encoding="utf-8")


# ---- Out ----


def export_run(
    workdir: Path,
    output: Path,
    *,
    step: int | None = None,
    family: str | None = None,
    dtype: str | None = None,
    max_shard_size: int = 5 * 10**9,
) -> Iterator[str]:
    """Write a run as a model directory that transformers loads; yields lines that say what happened.

    Args:
        workdir: the run.
        output: absent, or an empty directory.
        step: of the checkpoint; None: the latest.
        family: None: what it was imported from, or the nearest one.
        dtype: of the weights: float32, bfloat16 or float16. None: what an import had, where nothing was learned since;
            else float32.
        max_shard_size: bytes of weights in a file.

    Raises:
        ConfigError: `output` is not empty.
        CheckpointError: the family can't express the model, or a comparison fails; nothing is left behind then.
    """
    check_free(output, "--output")
    loaded = run_directory.load(workdir, step)
    imported = _record(workdir / KEPT)
    family = family or (imported.family if imported else families.default_family(loaded.config.model))
    families.check_exportable(family, loaded.config)
    imported = imported if imported and imported.family == family else None
    export = Export(loaded, family, imported, dtype)
    with atomic_directory(output) as made:
        files = safetensors_files.write(made, export.wanted(), export.value, max_shard_size=max_shard_size)
        size = sum((made / file).stat().st_size for file in files)
        yield f"weights    {size:,} bytes in {len(files)} file{'s' * (len(files) > 1)}, {family}"
        _write_json(made / "config.json", export.config_json(workdir / KEPT))
        if differs := _write_others(export, made, workdir):
            yield f"tokenizer  {differs}"
        compare(made, export)
        yield f"compared   {len(export.wanted())} tensors, read again, equal step {loaded.step} bit for bit"
        yield f"           {logits_check.compare(made, loaded.config, export.written_params())}"
    yield f"exported   {output}"


class Export:
    """A run on its way out: which tensors there are, and what is in each."""

    def __init__(
        self, loaded: run_directory.Run, family: str, imported: tensor_check.Imported | None, dtype: str | None
    ):
        self.loaded, self.family, self.imported = loaded, family, imported
        self.leaves = tree.flatten(loaded.params)
        self.table = weight_maps.table(family, loaded.config.model)
        self.rows = imported.rows if imported else loaded.config.tokenizer.vocab_size
        self.as_it_was = dtype is None and imported is not None and loaded.step == 0
        self.dtype = dtype or "float32"
        self._place = {name: (row, y) for row in self.table for name, y in row.places()}
        files = imported.names if imported else {name: [name] for name in self._place}
        self._canonical = {file: name for name in self._place for file in files[name]}

    def wanted(self) -> list[safetensors_files.TensorSpec]:
        """All tensors that are to be written."""
        made = []
        for file, name in self._canonical.items():
            row, _ = self._place[name]
            shape = weight_maps.shape_of(row, self.leaves)
            shape = (self.rows, *shape[1:]) if row.vocabulary else shape
            made.append(safetensors_files.TensorSpec(file, self._dtype_of(name), shape))
        return made

    def _dtype_of(self, name: str) -> str:
        names = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
        return self.imported.dtypes[name] if self.as_it_was else names[self.dtype]

    def value(self, file: str) -> np.ndarray:
        """A tensor as it is written. Vocabulary rows that are padding of ours alone are cut off: theirs has no mask."""
        row, y = self._place[self._canonical[file]]
        parts = [np.asarray(self.leaves[name]) for name in row.ours]
        array = weight_maps.to_theirs(row, [part if y is None else part[y] for part in parts])
        array = array[: self.rows] if row.vocabulary else array
        with np.errstate(over="ignore"):
            cast = array.astype(safetensors_files.DTYPES[self._dtype_of(self._canonical[file])])
        if cast.dtype == np.float16 and not np.array_equal(np.isfinite(cast), np.isfinite(array)):
            raise CheckpointError(f"--dtype=float16 can't hold {file}: its largest is above 65,504; use bfloat16")
        return cast

    def config_json(self, kept: Path) -> dict[str, Any]:
        """config.json: the imported one with what has changed since, or a new one."""
        config, tokenizer = self.loaded.config, self.loaded.tokenizer
        if self.imported is None:
            ends = eos_ids.listed(config, tokenizer)
            pad = tokenizer.pad_id
            return families.config_of(self.family, config, rows=self.rows, eos=ends, pad=pad, dtype=self.dtype)
        values = safetensors_files.read_json(kept / "config.json")
        _, then = families.model_of(
            values, untied=not config.model.tied_embeddings, next_sentence_head=config.model.next_sentence_head
        )
        if config.model.dropout_rate != then.dropout_rate:
            values |= family_keys.dropout_keys(self.family, config.model.dropout_rate)
        if not self.as_it_was:
            values |= {key: self.dtype for key in ("dtype", "torch_dtype") if key in values} or {"dtype": self.dtype}
        return values

    def written_params(self) -> Any:
        """The parameters as the files hold them, for a comparison of logits; those of the run are given up."""
        if self.as_it_was or self.dtype == "float32":
            return self.loaded.params
        round_to = jnp.dtype(self.dtype)
        rounded = [self.leaves.pop(name).astype(round_to).astype(jnp.float32) for name in list(self.leaves)]
        return jax.tree.unflatten(jax.tree.structure(self.loaded.params), rounded)


def compare(directory: Path, export: Export) -> None:
    """Read a written directory as an import would, and refuse it if anything differs from the run.

    Raises:
        CheckpointError: it does; the disk or this program is at fault.
    """
    model = export.loaded.config.model
    found = safetensors_files.tensors(directory)
    family, read = families.model_of(
        safetensors_files.read_json(directory / "config.json"),
        untied=not model.tied_embeddings,
        next_sentence_head=model.next_sentence_head,
    )
    if family != export.family or families.numeric_fields(read) != families.numeric_fields(model):
        raise CheckpointError(f"{directory / 'config.json'} does not say what it was to say; please report this")
    for tensor in export.wanted():
        there, value = safetensors_files.read(found[tensor.name]), export.value(tensor.name)
        if there.dtype != value.dtype or not np.array_equal(*(x.reshape(-1).view(np.uint8) for x in (there, value))):
            raise CheckpointError(f"{tensor.name} was not written as it is; check the disk of {directory}")


def _write_others(export: Export, made: Path, workdir: Path) -> str | None:
    """Tokenizer, generation settings and model card; says where AutoTokenizer may cut a text otherwise than we do."""
    loaded, config = export.loaded, export.loaded.config
    kept, differs = workdir / KEPT, None
    if export.imported:
        for path in kept.iterdir():
            if path.name not in (RECORD, "config.json"):
                shutil.copyfile(path, made / path.name)
    else:
        longest = config.row_length if config.model.architecture == "decoder" else config.data.inputs_length
        differs = tokenizer_files.write(loaded.tokenizer, made, family=export.family, max_length=longest)
    if config.model.has_decoder and not (made / eos_ids.GENERATION).exists():
        ends, pad = eos_ids.listed(config, loaded.tokenizer), loaded.tokenizer.pad_id
        start = {"decoder_start_token_id": 0} if config.model.architecture == "encoder_decoder" else {}
        settings = {eos_ids.KEY: ends, "pad_token_id": pad, **start, "max_new_tokens": card.new_tokens(config)}
        _write_json(made / eos_ids.GENERATION, settings)
    card.write(made, workdir, loaded, export.family)
    return differs


def _record(kept: Path) -> tensor_check.Imported | None:
    """What the import that made a run remembered, if one did."""
    if not (kept / RECORD).is_file():
        return None
    try:
        return tensor_check.Imported(**safetensors_files.read_json(kept / RECORD))
    except TypeError:
        raise CheckpointError(f"{kept / RECORD} is not as an import wrote it; move it away") from None


# ---- Both ----


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
