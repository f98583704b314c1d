"""The small Hugging Face models of `tests/golden`: their configs and weights, converted to t5like."""

import dataclasses
import json
from functools import cache
from pathlib import Path

import numpy as np
from conftest import small

from t5like import tree
from t5like.config.schema import Config, TokenizerConfig
from t5like.interop.huggingface import families, weight_maps

GOLDEN: dict[str, np.ndarray] = {}
for _file in ("hf_logits", "hf_encoder_logits", "hf_gemma_logits"):
    GOLDEN |= np.load(Path(__file__).parent / "golden" / f"{_file}.npz")


@cache
def golden(name: str, part: str) -> dict[str, np.ndarray]:
    """The weights or inputs of a golden."""
    start = f"{name}.{part}."
    return {key.removeprefix(start): GOLDEN[key] for key in GOLDEN if key.startswith(start)}


@cache
def model_of(name: str) -> tuple[str, Config]:
    """The family of a golden and the config that its config.json describes, with 61 ids."""
    tensors = golden(name, "weights")
    head = tensors.get("lm_head.weight")
    untied = head is not None and not np.array_equal(head, tensors.get("shared.weight"))
    next_sentence_head = any(key.startswith("cls.seq_relationship") for key in tensors)
    family, model = families.model_of(
        json.loads(str(GOLDEN[f"{name}.config"])), untied=untied, next_sentence_head=next_sentence_head
    )
    config = small(model={**dataclasses.asdict(model), "dtype": "float32", "layers": "unroll", "vocab_multiple": 1})
    return family, dataclasses.replace(config, tokenizer=TokenizerConfig(vocab_size=61, num_sentinels=0))


def params_of(name: str) -> dict:
    """The golden weights as parameters of t5like, by the family's weight map."""
    family, config = model_of(name)
    tensors = {
        weight_maps.canonical_name(family, key, tied=config.model.tied_embeddings): x
        for key, x in golden(name, "weights").items()
    }
    params: dict[str, list] = {}
    for entry in weight_maps.weight_map(family, config.model):
        for key, _ in entry.names():
            parts = weight_maps.from_huggingface(entry, tensors[key].astype(np.float32))
            for param, part in zip(entry.params, parts, strict=True):
                params.setdefault(param, []).append(part)
        for param in entry.params:
            unused = [np.ones_like(params[param][0])] * entry.first
            params[param] = np.stack(unused + params[param]) if entry.layers else params[param][0]
    return tree.nested(params)
