"""Checks that the tensors of a Hugging Face directory are those of the model that its config.json describes.

Missing tensors, unexpected tensors, wrong shapes, and copies that differ are refused by name. Copies may be absent:
T5's `encoder.embed_tokens.weight`, a tied `lm_head.weight`. Buffers that are not weights (`weight_maps.IGNORED`) may be
present. Called by `convert`.
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from t5like.config.model_schema import ModelConfig
from t5like.errors import CheckpointError, shorten
from t5like.interop.huggingface import safetensors_files, weight_maps
from t5like.interop.huggingface.weight_maps import ENCODER_DECODERS, TensorMap

HEAD = "lm_head.weight"
EMBEDDINGS = (
    "shared.weight",
    "encoder.embed_tokens.weight",
    "decoder.embed_tokens.weight",
)  # names of T5's embedding in different versions
PAIRS = ("cls.seq_relationship.weight", "cls.seq_relationship.bias", "bert.pooler.dense.weight")


class ImportRecord(NamedTuple):
    """What an import records for a later export.

    Attributes:
        family: one of `families.FAMILIES`.
        names: the names in the files, by name in the weight map; several names are copies.
        dtypes: safetensors' name of each tensor's dtype, by name in the weight map.
        rows: of the embedding.
    """

    family: str
    names: dict[str, list[str]]
    dtypes: dict[str, str]
    rows: int


def has_own_head(hf_config: Mapping[str, Any], tensors: Mapping[str, safetensors_files.Tensor]) -> bool:
    """Whether the output head of a T5 differs from its embedding.

    Raises:
        CheckpointError: config.json contradicts the files.

    transformers 4 ties the two unless tie_word_embeddings is false. transformers 5 does not save that key for such a
    model, and uses the head of the files if it differs. Its scale_decoder_outputs (T5 and UMT5) has the value of the
    former key: true if the two were tied.
    """
    family, tied, scaled = (
        hf_config.get("model_type"),
        hf_config.get("tie_word_embeddings"),
        hf_config.get("scale_decoder_outputs"),
    )
    if family not in ENCODER_DECODERS:
        return False
    if HEAD not in tensors:
        if tied is False:
            raise CheckpointError(f"the {family} weights lack {HEAD}, but config.json has tie_word_embeddings=false")
        return False
    may_differ = (
        tied is False or scaled is False or (_major(hf_config.get("transformers_version")) >= 5 and scaled is not True)
    )
    embedding = next((name for name in EMBEDDINGS if name in tensors), None)
    if embedding is None:
        return may_differ
    if _same(tensors[HEAD], tensors[embedding]):
        return False
    if not may_differ:
        raise CheckpointError(
            f"{HEAD} must be a copy of {embedding}, but they differ; if the model has both, set tie_word_embeddings to "
            "false in config.json"
        )
    return True


def _major(version: Any) -> int:
    """The major number of a version; 0 if there is none."""
    first = str(version or "").partition(".")[0]
    return int(first) if first.isdecimal() else 0


def has_next_sentence_head(hf_config: Mapping[str, Any], tensors: Mapping[str, safetensors_files.Tensor]) -> bool:
    """Whether a BERT has a pooler and a next-sentence classifier.

    Raises:
        CheckpointError: config.json names a class with them, but the files lack them.
    """
    present = any(name.startswith("cls.seq_relationship.") for name in tensors)
    named = hf_config.get("architectures")
    if (
        not present
        and isinstance(named, list)
        and "BertForPreTraining" in named
        and hf_config.get("model_type") == "bert"
    ):
        missing = [name for name in PAIRS if name not in tensors]
        raise CheckpointError(f"the bert weights lack {shorten(missing)}, but config.json names BertForPreTraining")
    return present


def check_sizes(model: ModelConfig, rows: Any, tensors: Mapping[str, safetensors_files.Tensor]) -> None:
    """Refuse a config.json whose sizes exceed those of the files, before memory of that size is allocated.

    Raises:
        CheckpointError: a dimension of the model is larger than the largest tensor.
    """
    largest = max((math.prod(tensor.shape) for tensor in tensors.values()), default=0)
    sizes = {
        "vocab_size": rows if type(rows) is int else 0,  # its type is checked later, with the tokenizer
        "model_dim": model.model_dim,
        "num_heads * head_dim": model.num_heads * model.head_dim,
        "mlp_dim": model.mlp_dim,
        "relative_buckets": model.relative_buckets if model.positions == "relative" else 0,
        "max_length": model.max_length if model.positions == "learned" else 0,
        "token_types": model.token_types,
    }
    for name, size in sizes.items():
        if size > largest:
            raise CheckpointError(f"config.json: {name} is {size:,}, but the largest tensor has {largest:,} numbers")
    for name, layers in (("num_layers", model.num_layers), ("num_decoder_layers", model.num_decoder_layers)):
        if layers > len(tensors):
            raise CheckpointError(f"config.json: {name} is {layers:,}, but there are {len(tensors)} tensors")


def canonical_names(
    family: str, model: ModelConfig, tensors: Mapping[str, safetensors_files.Tensor]
) -> tuple[dict[str, list[str]], list[str]]:
    """The names in the files, by name in the weight map; and the names of ignored tensors."""
    names: dict[str, list[str]] = {}
    ignored = []
    for name in tensors:
        if (known := weight_maps.canonical_name(family, name, tied=model.tied_embeddings)) is None:
            ignored.append(name)
        else:
            names.setdefault(known, []).append(name)
    for files in names.values():
        for copy in files[1:]:
            if not _same(tensors[files[0]], tensors[copy]):
                head = "lm_head.weight" in (copy, files[0])
                raise CheckpointError(
                    f"{copy} must be a copy of {files[0]}, but they differ"
                    + ("; set tie_word_embeddings to false in config.json" if head else "; save the model again")
                )
    return names, ignored


def _same(one: safetensors_files.Tensor, other: safetensors_files.Tensor) -> bool:
    """Whether two tensors are equal bit for bit."""
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    return np.array_equal(*(safetensors_files.read(tensor).reshape(-1).view(np.uint8) for tensor in (one, other)))


def check_finite(tensor: safetensors_files.Tensor, values: np.ndarray) -> None:
    """Refuse weights with NaN or infinity: every output of such a model is NaN.

    Raises:
        CheckpointError: names the tensor.
    """
    if not np.isfinite(values).all():
        raise CheckpointError(
            f"{tensor.path}: the weights {tensor.name} have NaN or infinity; the file is damaged, download it again"
        )


def check(
    weight_map: list[TensorMap],
    params: Mapping[str, Any],
    record: ImportRecord,
    tensors: Mapping[str, safetensors_files.Tensor],
) -> None:
    """Refuse files with missing tensors, unexpected tensors, or tensors of a wrong shape or an unsupported dtype."""
    assert {name for entry in weight_map for name in entry.params} == set(params), "weight_map covers all parameters"
    shapes = {name: weight_maps.shape_of(entry, params) for entry in weight_map for name, _ in entry.names()}
    missing = [name for name in shapes if name not in record.names]
    unexpected = [files[0] for name, files in record.names.items() if name not in shapes]
    expected = {name: tensors[files[0]] for name, files in record.names.items() if name in shapes}
    wrong_shapes = [
        f"{name} {list(tensor.shape)}, not {list(shapes[name])}"
        for name, tensor in expected.items()
        if tensor.shape != shapes[name]
    ]
    dtypes = [f"{name} {t.dtype}" for name, t in expected.items() if t.dtype not in safetensors_files.DTYPES]
    for problem, names in (
        ("lack", missing),
        ("have tensors that the model of config.json lacks:", unexpected),
        ("have shapes that differ from config.json:", wrong_shapes),
        (f"have a dtype that is not one of {', '.join(safetensors_files.DTYPES)}:", dtypes),
    ):
        if names:
            raise CheckpointError(f"the {record.family} weights {problem} {shorten(names)}")
