"""Export of a run's model as programs that do not need t5like: StableHLO artifacts of `jax.export`, weights, a script.

    forward.jax  generate.jax   for cpu, cuda and tpu, any number of rows: `jax.export.deserialize(...).call`
    weights.npz                 the parameters, by name: the programs' first argument
    signature.json              arguments and results of both, the prompt format and special ids
    tokenizer.model  config.json  README.txt
    run.py                      runs the programs; needs jax and numpy, and sentencepiece for text

Weights are an argument, not part of the programs: an artifact is a protobuf of at most 2 GiB, and both programs share
the weights. They are in numpy's own format, so that reading them needs no other package; its archive has no size limit
and a checksum for each array. The programs use plain kernels (`kernels=plain`) and scanned layers, so that they contain
no custom call and their size does not depend on depth.

The export reads the files again, compares every weight and runs both programs, before the directory appears at its
path. Called by `cli.commands`.
"""

import dataclasses
import json
import shlex
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.export
import jax.numpy as jnp
import numpy as np

from t5like import __version__, tree
from t5like.checkpoint import run_directory
from t5like.config import loader
from t5like.config.schema import Config
from t5like.data.tokenizers.tokenizer import Tokenizer
from t5like.data.tokenizers.vocabulary import DECODER_START_ID
from t5like.errors import CheckpointError, ConfigError
from t5like.inference.decoding import generate, predict_tokens
from t5like.inference.generate import eos_ids, num_positions
from t5like.inference.prompt_format import PromptFormat
from t5like.io.atomic import atomic_directory, check_free
from t5like.model.transformer import Transformer
from t5like.sharding import memory
from t5like.types import Array, Batch

SCRIPT = Path(__file__).with_name("stablehlo_run.py")  # is copied to run.py
PLATFORMS = ("cpu", "cuda", "tpu")
TOLERANCE = 1e-4  # relative to the largest logit, between a program that was read again and the original


class Program(NamedTuple):
    """A function to export.

    Attributes:
        function: a function of the parameters and of arrays.
        arguments: name, shape and dtype of each array; "b" is the number of rows, which is free.
        result: description of the result.
    """

    function: Callable[..., Array]
    arguments: dict[str, jax.ShapeDtypeStruct]
    result: str


def export_run(
    workdir: Path,
    output: Path,
    *,
    step: int | None = None,
    max_new_tokens: int = 64,
    prompt_length: int | None = None,
    temperature: float = 0.0,
) -> Iterator[str]:
    """Write a run's model as StableHLO into a directory; yields lines that report the result.

    Args:
        workdir: the run.
        output: absent or empty.
        step: of the checkpoint; None: the latest.
        max_new_tokens: number of new tokens of `generate`.
        prompt_length: length of padded prompts; None: the length of the run's rows.
        temperature: 0: `generate` decodes greedily; else it samples from softmax(logits / temperature), and has a seed
            as argument.

    Raises:
        ConfigError: the output exists, or the model does not support the lengths.
        CheckpointError: the checkpoint can't be read, the output can't be written, or it differs when read again.
    """
    check_free(output, "--output")
    loaded = run_directory.load(workdir, step, merged=True)
    if objective := loaded.config.data.label_objective:
        raise ConfigError(f"data.objective={objective} predicts labels, and programs generate; use t5like predict")
    config = portable(loaded.config, run_directory.saved_config(workdir).model.dtype)
    exports = programs(
        config,
        eos_ids(loaded.config, loaded.tokenizer),
        max_new_tokens=max_new_tokens,
        prompt_length=prompt_length,
        temperature=temperature,
    )
    params = tree.flatten(loaded.params)
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)
    with atomic_directory(output) as directory:
        for name, program in exports.items():
            exported = exported_program(program, abstract)
            (directory / f"{name}.jax").write_bytes(exported.serialize())
            yield f"{name:10} {signature_text(program)}"
        save_weights(directory / "weights.npz", params)
        yield f"weights    {tree.num_parameters(params):,} numbers in {len(params)} arrays"
        signature = json.dumps(_signature(loaded, exports), indent=1) + "\n"
        (directory / "signature.json").write_text(signature, encoding="utf-8")
        (directory / "tokenizer.model").write_bytes(loaded.tokenizer.model_bytes)
        (directory / "config.json").write_text(loader.to_json(config), encoding="utf-8")
        (directory / "README.txt").write_text(_readme(loaded, exports), encoding="utf-8")
        (directory / "run.py").write_bytes(SCRIPT.read_bytes())
        compare(directory, exports, params)
    yield f"exported   {output}; python {shlex.quote(str(output / 'run.py'))} --prompt=TEXT"


def portable(config: Config, dtype: str) -> Config:
    """A config for all platforms, independent of the devices of this machine. `dtype` is that of the saved config."""
    dtype = "float32" if dtype == "auto" else dtype
    model = dataclasses.replace(config.model, kernels="plain", layers="scan", remat="none", dtype=dtype)
    return dataclasses.replace(config, model=model)


def programs(
    config: Config,
    eos: Sequence[int],
    *,
    max_new_tokens: int,
    prompt_length: int | None = None,
    temperature: float = 0.0,
) -> dict[str, Program]:
    """`forward` and `generate` of a model, by its architecture; parameters are a dict by name. See `export_run`.

    `eos` are the ids that end a text.
    """
    data, model = config.data, config.model
    inputs = {"encoder_decoder": data.inputs_length, "decoder": config.row_length}.get(
        model.architecture, data.inputs_length
    )
    width = prompt_length or max(inputs, 1)
    if model.architecture == "decoder" and prompt_length is None:
        width = min(width, model.longest_text - max_new_tokens + 1)
    if width < 1 or num_positions(config, width, max_new_tokens) > model.longest_text:
        raise ConfigError(
            f"--prompt_length={width} and --max_new_tokens={max_new_tokens} do not fit model.max_length="
            f"{model.max_length}; use smaller ones"
        )
    memory.check_texts(config, prompt=width, new=max_new_tokens, texts=1)
    shapes = partial(_shapes, {"P": width, "S": max(inputs, 1), "L": data.targets_length, "R": config.row_length})
    if model.architecture == "encoder":
        return _encoder_programs(config, shapes)
    decoder = model.architecture == "decoder"

    def generate_ids(params, prompt, lengths, *rest):
        *prefix, seed = rest if temperature else (*rest, 0)
        return generate(
            config,
            tree.nested(params),
            prompt,
            lengths,
            jax.random.key(seed),
            max_new_tokens=max_new_tokens,
            eos_ids=eos,
            prefix_B=prefix[0] if decoder else None,
            temperature=temperature,
        )

    arguments = shapes(prompt="P", lengths="", **({"prefix": ""} if decoder else {}))
    if temperature:
        arguments["seed"] = jax.ShapeDtypeStruct((), jnp.uint32)
    return {
        "forward": _forward_program(config, shapes),
        "generate": Program(generate_ids, arguments, f"ids [b, {max_new_tokens}], 0 after the end"),
    }


def _apply(config: Config, params: Mapping[str, Array], batch: Batch) -> Array:
    return Transformer(config).apply({"params": tree.nested(params)}, batch)


def _encoder_programs(config: Config, shapes: Callable[..., dict[str, jax.ShapeDtypeStruct]]) -> dict[str, Program]:
    """`forward` and `generate` of an encoder-only model."""

    def batch_of(ids, segments, token_types=None):
        return Batch(None, ids, segments, ids, segments, token_types_BS=token_types)

    arguments = shapes(ids="S", segments="S", **({"token_types": "S"} if config.model.token_types else {}))
    return {
        "forward": Program(
            lambda params, *args: _apply(config, params, batch_of(*args)), arguments, "logits [b, S, V]"
        ),
        "generate": Program(
            lambda params, *args: predict_tokens(config, tree.nested(params), batch_of(*args)),
            arguments,
            "most likely ids [b, S]",
        ),
    }


def _forward_program(config: Config, shapes: Callable[..., dict[str, jax.ShapeDtypeStruct]]) -> Program:
    """`forward` of a model with a decoder."""
    if config.model.architecture == "decoder":
        return Program(
            lambda params, ids, segments, prefix: _apply(
                config, params, Batch(ids, ids, segments, decoder_segments_BL=segments, prefix_BL=prefix != 0)
            ),
            shapes(ids="R", segments="R", prefix="R"),
            "logits [b, R, V]",
        )
    return Program(
        lambda params, inputs, input_segments, ids, segments: _apply(
            config, params, Batch(ids, ids, segments, inputs, input_segments, segments)
        ),
        shapes(inputs="S", input_segments="S", ids="L", segments="L"),
        "logits [b, L, V]",
    )


def _shapes(sizes: Mapping[str, int], **names: str) -> dict[str, jax.ShapeDtypeStruct]:
    """int32 arguments with any number of rows; each name with the letter of its length, or "" for none."""
    (rows,) = jax.export.symbolic_shape("b")
    return {
        name: jax.ShapeDtypeStruct((rows, sizes[length]) if length else (rows,), jnp.int32)
        for name, length in names.items()
    }


def exported_program(program: Program, params: Mapping[str, jax.ShapeDtypeStruct]) -> jax.export.Exported:
    """Trace and lower for all platforms.

    The default checks of `jax.export` are on: it refuses custom calls without a stability guarantee.
    """
    export = jax.export.export(jax.jit(program.function), platforms=PLATFORMS)
    return export(dict(params), *program.arguments.values())


def save_weights(path: Path, params: Mapping[str, Array]) -> None:
    """Write arrays as numpy's archive, uncompressed, sequentially: memory has one array besides those of the run."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name, leaf in params.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
                np.lib.format.write_array(file, np.asarray(leaf), allow_pickle=False)


def compare(directory: Path, exports: Mapping[str, Program], params: Mapping[str, Array]) -> None:
    """Read a written directory again, and compare its weights and the results of its programs with those of the run.

    Raises:
        CheckpointError: there is a difference, caused by the disk or by an internal error.
    """
    with np.load(directory / "weights.npz", allow_pickle=False) as weights:
        for name, leaf in params.items():
            if not np.array_equal(weights[name].view(np.uint8), np.asarray(leaf).view(np.uint8)):
                raise CheckpointError(f"{name} was not written correctly; check the disk of {directory.parent}")
    for name, program in exports.items():
        arguments = [example(leaf) for leaf in program.arguments.values()]
        read = jax.export.deserialize(bytearray((directory / f"{name}.jax").read_bytes()))
        result = np.asarray(read.call(dict(params), *arguments))
        if name == "generate":  # ids may differ by rounding, so that only running is checked
            continue
        expected = np.asarray(jax.jit(program.function)(dict(params), *arguments))
        limit = TOLERANCE * np.abs(expected[expected > -1e8]).max()
        if result.shape != expected.shape or np.abs(result - expected).max() > limit:
            raise CheckpointError(f"the results of {name} differ from those of the run; please report this")


def example(leaf: jax.ShapeDtypeStruct) -> np.ndarray:
    """An example argument with two rows: ones are valid ids, segments and lengths."""
    return np.ones([size if isinstance(size, int) else 2 for size in leaf.shape], leaf.dtype)


# ---- Documentation of the export ----


def signature_text(program: Program) -> str:
    """A program's arguments and result in one line."""
    type_of = lambda leaf: f"{leaf.dtype}[{', '.join(map(str, leaf.shape))}]"
    return f"(weights, {', '.join(f'{name} {type_of(leaf)}' for name, leaf in program.arguments.items())}) -> " + (
        program.result
    )


def _signature(loaded: run_directory.Run, exports: Mapping[str, Program]) -> dict[str, Any]:
    """The contents of signature.json, which run.py reads."""
    return {
        "t5like": __version__,
        "step": loaded.step,
        "architecture": loaded.config.model.architecture,
        "platforms": PLATFORMS,
        "jax": jax.__version__,
        "programs": {
            name: {
                "arguments": {
                    key: [str(leaf.dtype), list(map(str, leaf.shape))] for key, leaf in each.arguments.items()
                },
                "result": each.result,
            }
            for name, each in exports.items()
        },
        **text_signature(loaded.config, loaded.tokenizer),
    }


def text_signature(config: Config, tokenizer: Tokenizer) -> dict[str, Any]:
    """The part of the signature about text: the prompt format, and the special ids of the tokenizer."""
    sentinels = {f"<extra_id_{number}>": int(token) for number, token in enumerate(tokenizer.sentinel_ids)}
    return {
        "prompt_format": PromptFormat.of(config, tokenizer).to_values(),
        "tokenizer": {
            "sentencepiece": not tokenizer.is_json,
            "sentinels": sentinels,
            "eos_ids": eos_ids(config, tokenizer),
            "decoder_start_id": DECODER_START_ID,
        },
    }


def _readme(loaded: run_directory.Run, exports: Mapping[str, Program]) -> str:
    config = loaded.config
    lines = [f"  {name:9} {signature_text(program)}" for name, program in exports.items()]
    return f"""A {config.model.architecture} language model of t5like {__version__}, after {loaded.step:,} steps.

{chr(10).join(lines)}

weights is a dict of the arrays of weights.npz; b, the number of rows, is free. Segments are 1 for text and 0 for
padding; further texts in a row have the numbers 2, 3, ... Prompts are padded with 0 on the {
        "left" if config.model.architecture == "decoder" else "right"
    }; lengths is the number of tokens without padding. prefix
(decoder-only models) is the number of tokens, or marks the positions, that attend to each other in both directions.

  import jax, jax.export, numpy
  weights = dict(numpy.load("weights.npz"))
  forward = jax.export.deserialize(bytearray(open("forward.jax", "rb").read()))
  logits = forward.call(weights, ...)

python run.py --prompt=TEXT does this on cpu, cuda or tpu, depending on the installed jax. The export was written by jax
{jax.__version__}. Later versions of jax can read it for at least six months, as jax guarantees for such artifacts.
"""
