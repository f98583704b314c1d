"""The ids that end a text in a Hugging Face directory, `eos_token_id`, and the one that begins a decoder's.

`transformers.generate` reads generation_config.json if it exists, else config.json, and stops at any of the ids. In
t5like the tokenizer's own end-of-sequence id always ends a text, and `tokenizer.extra_eos_ids` are the others.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from t5like.config.schema import Config
from t5like.data.tokenizers.tokenizer import Tokenizer
from t5like.errors import CheckpointError
from t5like.inference.generate import eos_ids
from t5like.interop.huggingface.safetensors_files import read_json

GENERATION = "generation_config.json"
KEY = "eos_token_id"


def extra_ids(directory: Path, hf_config: Mapping[str, Any], tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """The ids besides the tokenizer's own, and separately those that are not in the vocabulary.

    Args:
        hf_config: the directory's config.json.

    Raises:
        CheckpointError: the value is neither an id nor a list of ids.
    """
    file, value = "config.json", hf_config.get(KEY)
    if (directory / GENERATION).is_file():
        generation = read_json(directory / GENERATION)
        if generation.get(KEY) is not None:
            file, value = GENERATION, generation[KEY]
    listed = [] if value is None else value if isinstance(value, list) else [value]
    if not all(type(token) is int and token >= 0 for token in listed):
        raise CheckpointError(f"{file}: {KEY}={value!r} must be a token id, at least 0, or a list of token ids")
    others = [token for token in dict.fromkeys(listed) if token != tokenizer.eos_id]
    known = [token for token in others if token < tokenizer.vocab_size]
    return known, [token for token in others if token not in known]


def listed(config: Config, tokenizer: Tokenizer) -> int | list[int]:
    """`eos_token_id` of a run: one id, or all of them."""
    ids = eos_ids(config, tokenizer)
    return ids[0] if len(ids) == 1 else list(ids)


def decoder_start(directory: Path, hf_config: Mapping[str, Any]) -> int:
    """The id that an encoder-decoder's decoder begins with: `decoder_start_token_id`, else `bos_token_id`, else 0.

    Raises:
        CheckpointError: the value is not an id.
    """
    generation = read_json(directory / GENERATION) if (directory / GENERATION).is_file() else {}
    values = [file.get(key) for key in ("decoder_start_token_id", "bos_token_id") for file in (generation, hf_config)]
    start = next((value for value in values if value is not None), 0)
    if type(start) is not int or start < 0:
        raise CheckpointError(f"decoder_start_token_id={start!r} must be a token id, at least 0")
    return start
