"""The small Hugging Face models of `tests/golden`: their configs and weights, as ours."""

import dataclasses
import json
from functools import cache
from pathlib import Path

import numpy as np
from conftest import small

from t5like import tree
from t5like.config.schema import Config, TokenizerConfig
from t5like.interop.huggingface import families, weight_maps

GOLDEN = np.load(Path(__file__).parent / "golden" / "hf_logits.npz")


@cache
def golden(name: str, part: str) -> dict[str, np.ndarray]:
    """The weights or inputs of a golden."""
    start = f"{name}.{part}."
    return {key.removeprefix(start): GOLDEN[key] for key in GOLDEN.files if key.startswith(start)}


@cache
def model_of(name: str) -> tuple[str, Config]:
    """The family of a golden and the config that its config.json describes, with 61 ids."""
    theirs = golden(name, "weights")
    head = theirs.get("lm_head.weight")
    untied = head is not None and not np.array_equal(head, theirs.get("shared.weight"))
    next_sentence_head = any(key.startswith("cls.seq_relationship") for key in theirs)
    family, model = families.model_of(
        json.loads(str(GOLDEN[f"{name}.config"])), untied=untied, next_sentence_head=next_sentence_head
    )
    config = small(model={**dataclasses.asdict(model), "dtype": "float32", "layers": "unroll", "vocab_multiple": 1})
    return family, dataclasses.replace(config, tokenizer=TokenizerConfig(vocab_size=61, num_sentinels=0))


def params_of(name: str) -> dict:
    """The golden weights under our names, by the family's table."""
    family, config = model_of(name)
    theirs = {
        weight_maps.canonical(family, key, tied=config.model.tied_embeddings): x
        for key, x in golden(name, "weights").items()
    }
    ours: dict[str, list] = {}
    for row in weight_maps.table(family, config.model):
        for key, _ in row.places():
            for mine, part in zip(row.ours, weight_maps.to_ours(row, theirs[key].astype(np.float32)), strict=True):
                ours.setdefault(mine, []).append(part)
        for mine in row.ours:
            ours[mine] = np.stack(ours[mine]) if row.layers else ours[mine][0]
    return tree.nested(ours)
