"""Checked access to single keys of a config.json: values of imported files are not trusted."""

from collections.abc import Mapping
from typing import Any

from t5like.errors import CheckpointError

MAX_FLOAT = 1e38  # about the largest float32
MOST_LAYERS = 1000


def one_of(hf_config: Mapping[str, Any], key: str, allowed: tuple, default: Any, because: str = "") -> Any:
    """A value that must be one of `allowed`; `because` names the key that requires it."""
    value = hf_config.get(key, default)
    if not any(value == one and type(value) is type(one) for one in allowed):
        names = " or ".join(str(one) for one in allowed if one is not None)
        raise CheckpointError(f"config.json: {key}={value!r} must be {names}" + (f" with {because}" if because else ""))
    return value


def positive_int(hf_config: Mapping[str, Any], key: str, default: int | None = None) -> int:
    """A whole number from 1 to 2^31 - 1."""
    value = default if hf_config.get(key) is None else hf_config[key]
    if type(value) is not int or not 1 <= value < 2**31:
        raise CheckpointError(f"config.json: {key}={_shown(value)} must be a whole number from 1 to 2,147,483,647")
    return value


def layer_count(hf_config: Mapping[str, Any], default: int | None = None) -> int:
    """`num_hidden_layers`, from 1 to 1,000: a list of the kind of each layer must fit in memory."""
    if (count := positive_int(hf_config, "num_hidden_layers", default)) > MOST_LAYERS:
        raise CheckpointError(f"config.json: num_hidden_layers={count:,} must be at most {MOST_LAYERS:,}")
    return count


def nonnegative(hf_config: Mapping[str, Any], key: str, default: float | None = None, where: str = "") -> float:
    """A finite number, not negative; `where` is the key of the object that contains it."""
    value = default if hf_config.get(key) is None else hf_config[key]
    if type(value) not in (int, float) or not 0 <= value <= MAX_FLOAT:
        key = f"{where}{'.' * bool(where)}{key}"
        raise CheckpointError(
            f"config.json: {key}={_shown(value)} must be a number, at least 0 and at most {MAX_FLOAT:g}"
        )
    return float(value)


def _shown(value: Any) -> str:
    """A value for a message, truncated if it is long."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:50]}... ({len(text)} characters)"
