"""Whether the tensors of a Hugging Face directory are those of the model that its config.json describes.

A tensor that is missing, one that the model does not have, another shape, and two that should be one are refused by
name. Copies may be absent: T5's `encoder.embed_tokens.weight`, a tied `lm_head.weight`. Buffers that are no weights
(`tables.LEFT_OUT`) may be there. Called by `directory`.
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from t5like.config.schema import ModelConfig
from t5like.errors import CheckpointError, shorten
from t5like.interop.huggingface import safetensors_files, weight_maps
from t5like.interop.huggingface.weight_maps import ENCODER_DECODERS, Row

HEAD = "lm_head.weight"
EMBEDDINGS = (
    "shared.weight",
    "encoder.embed_tokens.weight",
    "decoder.embed_tokens.weight",
)  # T5's, in any of its files
PAIRS = ("cls.seq_relationship.weight", "cls.seq_relationship.bias", "bert.pooler.dense.weight")


class Imported(NamedTuple):
    """What an import remembers for the way back.

    Attributes:
        family: one of `families.FAMILIES`.
        names: names in the files of each of the table's tensors; more than one are copies.
        dtypes: safetensors' name of the dtype that each of the table's tensors had.
        rows: of the embedding.
    """

    family: str
    names: dict[str, list[str]]
    dtypes: dict[str, str]
    rows: int


def has_own_head(hf: Mapping[str, Any], found: Mapping[str, safetensors_files.Tensor]) -> bool:
    """Whether a T5's output head is another matrix than its embedding.

    Raises:
        CheckpointError: config.json says otherwise than the files.

    transformers 4 ties the two unless tie_word_embeddings is false. transformers 5 forgets that key when it saves such
    a model, and takes the head of the files where it differs. Its scale_decoder_outputs, of T5 and UMT5, is what the
    key was: true where the two were tied.
    """
    family, tied, scaled = hf.get("model_type"), hf.get("tie_word_embeddings"), hf.get("scale_decoder_outputs")
    if family not in ENCODER_DECODERS:
        return False
    if HEAD not in found:
        if tied is False:
            raise CheckpointError(f"the {family} weights lack {HEAD}, but config.json says tie_word_embeddings=false")
        return False
    may_differ = (
        tied is False or scaled is False or (_major(hf.get("transformers_version")) >= 5 and scaled is not True)
    )
    embedding = next((name for name in EMBEDDINGS if name in found), None)
    if embedding is None:
        return may_differ
    if _same(found[HEAD], found[embedding]):
        return False
    if not may_differ:
        raise CheckpointError(
            f"{HEAD} must be a copy of {embedding}, but they differ; if both are meant, set tie_word_embeddings to "
            "false in config.json"
        )
    return True


def _major(version: Any) -> int:
    """The first number of a version; 0: none is given."""
    first = str(version or "").partition(".")[0]
    return int(first) if first.isdecimal() else 0


def has_next_sentence_head(hf: Mapping[str, Any], found: Mapping[str, safetensors_files.Tensor]) -> bool:
    """Whether a BERT has a pooler and a next-sentence classifier.

    Raises:
        CheckpointError: config.json names a class that has them, and the files lack them.
    """
    there = any(name.startswith("cls.seq_relationship.") for name in found)
    named = hf.get("architectures")
    if not there and isinstance(named, list) and "BertForPreTraining" in named and hf.get("model_type") == "bert":
        missing = [name for name in PAIRS if name not in found]
        raise CheckpointError(f"the bert weights lack {shorten(missing)}, but config.json says BertForPreTraining")
    return there


def check_sizes(model: ModelConfig, rows: Any, found: Mapping[str, safetensors_files.Tensor]) -> None:
    """Refuse a config.json of another size than the files, before anything of that size is made.

    Raises:
        CheckpointError: no tensor has so many numbers as a dimension of the model says.
    """
    most = max((math.prod(tensor.shape) for tensor in found.values()), default=0)
    sizes = {
        "vocab_size": rows if type(rows) is int else 0,  # what it must be is checked next to the tokenizer
        "model_dim": model.model_dim,
        "num_heads * head_dim": model.num_heads * model.head_dim,
        "mlp_dim": model.mlp_dim,
        "relative_buckets": model.relative_buckets if model.positions == "relative" else 0,
        "max_length": model.max_length if model.positions == "learned" else 0,
        "token_types": model.token_types,
    }
    for name, size in sizes.items():
        if size > most:
            raise CheckpointError(f"config.json: {name} is {size:,}, but the largest tensor has {most:,} numbers")
    for name, layers in (("num_layers", model.num_layers), ("num_decoder_layers", model.num_decoder_layers)):
        if layers > len(found):
            raise CheckpointError(f"config.json: {name} is {layers:,}, but there are {len(found)} tensors")


def canonical_names(
    family: str, model: ModelConfig, found: Mapping[str, safetensors_files.Tensor]
) -> tuple[dict[str, list[str]], list[str]]:
    """The file names of each of the table's tensors, and those of what is no weight."""
    names: dict[str, list[str]] = {}
    left_out = []
    for name in found:
        if (known := weight_maps.canonical(family, name, tied=model.tied_embeddings)) is None:
            left_out.append(name)
        else:
            names.setdefault(known, []).append(name)
    for files in names.values():
        for copy in files[1:]:
            if not _same(found[files[0]], found[copy]):
                head = "lm_head.weight" in (copy, files[0])
                raise CheckpointError(
                    f"{copy} must be a copy of {files[0]}, but they differ"
                    + ("; set tie_word_embeddings to false in config.json" if head else "; save the model again")
                )
    return names, left_out


def _same(one: safetensors_files.Tensor, other: safetensors_files.Tensor) -> bool:
    """Whether two tensors have the same bits."""
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    return np.array_equal(*(safetensors_files.read(tensor).reshape(-1).view(np.uint8) for tensor in (one, other)))


def check(
    rows: list[Row], wanted: Mapping[str, Any], imported: Imported, found: Mapping[str, safetensors_files.Tensor]
) -> None:
    """Refuse files that lack a tensor of the model, have one more, or have one of another shape or kind."""
    assert {name for row in rows for name in row.ours} == set(wanted), "the table names every parameter"
    expected = {name: weight_maps.shape_of(row, wanted) for row in rows for name, _ in row.places()}
    missing = [name for name in expected if name not in imported.names]
    extra = [files[0] for name, files in imported.names.items() if name not in expected]
    tensors = {name: found[files[0]] for name, files in imported.names.items() if name in expected}
    wrong = [
        f"{name} {list(t.shape)}, not {list(expected[name])}"
        for name, t in tensors.items()
        if t.shape != expected[name]
    ]
    kinds = [f"{name} {t.dtype}" for name, t in tensors.items() if t.dtype not in safetensors_files.DTYPES]
    for what, names in (
        ("lack", missing),
        ("hold what the model of config.json has not", extra),
        ("have another shape than config.json says", wrong),
        (f"have a dtype that is not one of {', '.join(safetensors_files.DTYPES)}", kinds),
    ):
        if names:
            raise CheckpointError(f"the {imported.family} weights {what}: {shorten(names)}")
