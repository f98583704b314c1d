"""A run's model as programs that need nothing of ours: StableHLO artifacts of `jax.export`, weights, a script.

    forward.jax  generate.jax   for cpu, cuda and tpu, with any number of rows: `jax.export.deserialize(...).call`
    weights.npz                 the parameters, by name: the programs' first argument
    signature.json              arguments and results of both, and how a text becomes a prompt
    tokenizer.model  config.json  README.txt
    run.py                      runs them; needs jax and numpy, and sentencepiece for text

Weights are an argument, not part of the programs: an artifact is a protobuf, which ends at 2 GiB, and both programs
share them. They are numpy's own format, so that nothing has to be installed to read them; its archive has no limit of
size, and a checksum for each array. The programs compute as the plain formulation does (`kernels=plain`), with scanned
layers unless the run says otherwise, so that they hold no custom call and do not grow with depth.

What was written is read again, every weight compared and both programs run, before the directory appears.
Called by `main`.
"""

import dataclasses
import json
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

SCRIPT = Path(__file__).with_name("stablehlo_run.py")  # becomes run.py; nothing imports it
PLATFORMS = ("cpu", "cuda", "tpu")
SAME = 1e-4  # of the largest logit: how far a program that was read again may be from the one that was written


class Program(NamedTuple):
    """A function to export.

    Attributes:
        function: of the parameters and of arrays.
        arguments: name, shape and dtype of each array; "b" is any number of rows.
        result: what it gives, in words.
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
    """Write a run's model as StableHLO into a directory; yields lines that say what happened.

    Args:
        workdir: the run.
        output: absent or empty.
        step: of the checkpoint; None: the latest.
        max_new_tokens: how many tokens `generate` makes.
        prompt_length: tokens of a prompt, padded; None: as long as the run's rows.
        temperature: 0: `generate` takes the likeliest token; else it samples softmax(logits / temperature), and takes a
            seed.

    Raises:
        ConfigError: the output is taken, or the lengths can't be.
        CheckpointError: the checkpoint can't be read, or the output not written, or it is not as it was written.
    """
    check_free(output, "--output")
    loaded = run_directory.load(workdir, step)
    config = portable(loaded.config, run_directory.saved_config(workdir).model.dtype)
    made = programs(
        config,
        eos_ids(loaded.config, loaded.tokenizer),
        max_new_tokens=max_new_tokens,
        prompt_length=prompt_length,
        temperature=temperature,
    )
    params = tree.flatten(loaded.params)
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)
    with atomic_directory(output) as directory:
        for name, program in made.items():
            exported = exported_program(program, abstract)
            (directory / f"{name}.jax").write_bytes(exported.serialize())
            yield f"{name:10} {signature_text(program)}"
        save_weights(directory / "weights.npz", params)
        yield f"weights    {tree.num_parameters(params):,} numbers in {len(params)} arrays"
        signature = json.dumps(_signature(loaded, made), indent=1) + "\n"
        (directory / "signature.json").write_text(signature, encoding="utf-8")
        (directory / "tokenizer.model").write_bytes(loaded.tokenizer.model_bytes)
        (directory / "config.json").write_text(loader.to_json(config), encoding="utf-8")
        (directory / "README.txt").write_text(_readme(loaded, made), encoding="utf-8")
        (directory / "run.py").write_bytes(SCRIPT.read_bytes())
        compare(directory, made, params)
    yield f"exported   {output}; python {output / 'run.py'} --prompt=TEXT"


def portable(config: Config, dtype: str) -> Config:
    """A config for every platform: nothing is chosen by the devices here. `dtype` is the one that was asked for."""
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
    of = partial(_shapes, {"P": width, "S": max(inputs, 1), "L": data.targets_length, "R": config.row_length})
    apply = lambda params, batch: Transformer(config).apply({"params": tree.nested(params)}, batch)
    if model.architecture == "encoder":
        types = {"token_types": "S"} if model.token_types else {}

        def read(params, ids, segments, token_types=None):
            return Batch(None, ids, segments, ids, segments, token_types_BS=token_types)

        arguments = of(ids="S", segments="S", **types)
        return {
            "forward": Program(lambda params, *args: apply(params, read(params, *args)), arguments, "logits [b, S, V]"),
            "generate": Program(
                lambda params, *args: predict_tokens(config, tree.nested(params), read(params, *args)),
                arguments,
                "most likely ids [b, S]",
            ),
        }

    decoder = model.architecture == "decoder"

    def answer(params, prompt, lengths, *rest):
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

    if decoder:
        forward = Program(
            lambda params, ids, segments, prefix: apply(
                params, Batch(ids, ids, segments, decoder_segments_BL=segments, prefix_BL=prefix != 0)
            ),
            of(ids="R", segments="R", prefix="R"),
            "logits [b, R, V]",
        )
    else:
        forward = Program(
            lambda params, inputs, input_segments, ids, segments: apply(
                params, Batch(ids, ids, segments, inputs, input_segments, segments)
            ),
            of(inputs="S", input_segments="S", ids="L", segments="L"),
            "logits [b, L, V]",
        )
    arguments = of(prompt="P", lengths="", **({"prefix": ""} if decoder else {}))
    if temperature:
        arguments["seed"] = jax.ShapeDtypeStruct((), jnp.uint32)
    return {"forward": forward, "generate": Program(answer, arguments, f"ids [b, {max_new_tokens}], 0 after the end")}


def _shapes(sizes: Mapping[str, int], **names: str) -> dict[str, jax.ShapeDtypeStruct]:
    """int32 arguments of any number of rows; each name with the letter of its length, or none."""
    (rows,) = jax.export.symbolic_shape("b")
    return {
        name: jax.ShapeDtypeStruct((rows, sizes[length]) if length else (rows,), jnp.int32)
        for name, length in names.items()
    }


def exported_program(program: Program, params: Mapping[str, jax.ShapeDtypeStruct]) -> jax.export.Exported:
    """Trace and lower for all platforms.

    The default checks of `jax.export` stay on: it refuses custom calls without a promise of stability.
    """
    made = jax.export.export(jax.jit(program.function), platforms=PLATFORMS)
    return made(dict(params), *program.arguments.values())


def save_weights(path: Path, params: Mapping[str, Array]) -> None:
    """Write arrays as numpy's archive, uncompressed, one after another: one at a time is in memory besides the run."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name, leaf in params.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
                np.lib.format.write_array(file, np.asarray(leaf), allow_pickle=False)


def compare(directory: Path, made: Mapping[str, Program], params: Mapping[str, Array]) -> None:
    """Read a written directory again: its weights have to be the run's, its programs to say what ours say.

    Raises:
        CheckpointError: they do not; the disk or this program is at fault.
    """
    with np.load(directory / "weights.npz", allow_pickle=False) as weights:
        for name, leaf in params.items():
            if not np.array_equal(weights[name].view(np.uint8), np.asarray(leaf).view(np.uint8)):
                raise CheckpointError(f"{name} was not written as it is; check the disk of {directory.parent}")
    for name, program in made.items():
        arguments = [example(leaf) for leaf in program.arguments.values()]
        read = jax.export.deserialize(bytearray((directory / f"{name}.jax").read_bytes()))
        there = np.asarray(read.call(dict(params), *arguments))
        if name == "generate":  # of ids a rounding may make others; that it runs is what can be said
            continue
        ours = np.asarray(jax.jit(program.function)(dict(params), *arguments))
        if there.shape != ours.shape or np.abs(there - ours).max() > SAME * np.abs(ours[ours > -1e8]).max():
            raise CheckpointError(f"{name} does not say what the run says; please report this")


def example(leaf: jax.ShapeDtypeStruct) -> np.ndarray:
    """An argument of two rows: ones, which are ids, segments and lengths."""
    return np.ones([size if isinstance(size, int) else 2 for size in leaf.shape], leaf.dtype)


# ---- What is said about it ----


def signature_text(program: Program) -> str:
    """A program's arguments and result in one line."""
    of = lambda leaf: f"{leaf.dtype}[{', '.join(map(str, leaf.shape))}]"
    return f"(weights, {', '.join(f'{name} {of(leaf)}' for name, leaf in program.arguments.items())}) -> " + (
        program.result
    )


def _signature(loaded: run_directory.Run, made: Mapping[str, Program]) -> dict[str, Any]:
    """What run.py has to know."""
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
            for name, each in made.items()
        },
        **text_signature(loaded.config, loaded.tokenizer),
    }


def text_signature(config: Config, tokenizer: Tokenizer) -> dict[str, Any]:
    """What run.py needs for text: the prompt format, and the special ids of the tokenizer."""
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


def _readme(loaded: run_directory.Run, made: Mapping[str, Program]) -> str:
    config = loaded.config
    lines = [f"  {name:9} {signature_text(program)}" for name, program in made.items()]
    return f"""A {config.model.architecture} language model of t5like {__version__}, after {loaded.step:,} steps.

{chr(10).join(lines)}

weights is a dict of the arrays of weights.npz; b, the number of rows, is free. Segments are 1 for text and 0 for
padding; more texts in a row have the numbers 2, 3, ... Prompts are padded with 0, on the {
        "left" if config.model.architecture == "decoder" else "right"
    }; lengths says how many tokens are real, and prefix (decoder-only
models) how many of those, or which places, see each other in both directions.

  import jax, jax.export, numpy
  weights = dict(numpy.load("weights.npz"))
  forward = jax.export.deserialize(bytearray(open("forward.jax", "rb").read()))
  logits = forward.call(weights, ...)

python run.py --prompt=TEXT does this, for cpu, cuda or tpu, whichever jax finds. It was exported by jax
{jax.__version__}; jax reads it in later versions for at least six months, which is its promise for such artifacts.
"""
