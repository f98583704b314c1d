"""Single keys of a config.json, checked: what a file from elsewhere says is not trusted."""

from collections.abc import Mapping
from typing import Any

from t5like.errors import CheckpointError

LARGEST = 1e38  # what float32 holds


def must(hf: Mapping[str, Any], key: str, allowed: tuple, default: Any, because: str = "") -> Any:
    """A value that must be one of a few; `because` names what else says so."""
    value = hf.get(key, default)
    if not any(value == one and type(value) is type(one) for one in allowed):
        names = " or ".join(str(one) for one in allowed if one is not None)
        raise CheckpointError(
            f"config.json: {key}={value!r} must be {names}" + (f" beside {because}" if because else "")
        )
    return value


def whole(hf: Mapping[str, Any], key: str, default: int | None = None) -> int:
    """A whole number of at least 1, and no more than 32 bits hold."""
    value = default if hf.get(key) is None else hf[key]
    if type(value) is not int or not 1 <= value < 2**31:
        raise CheckpointError(f"config.json: {key}={_shown(value)} must be a whole number from 1 to 2,147,483,647")
    return value


def number(hf: Mapping[str, Any], key: str, default: float | None = None, where: str = "") -> float:
    """A finite number, not negative; `where` is the key that it lies in."""
    value = default if hf.get(key) is None else hf[key]
    if type(value) not in (int, float) or not 0 <= value <= LARGEST:
        key = f"{where}{'.' * bool(where)}{key}"
        raise CheckpointError(
            f"config.json: {key}={_shown(value)} must be a number, at least 0 and at most {LARGEST:g}"
        )
    return float(value)


def _shown(value: Any) -> str:
    """A value in a message, cut where it is long."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:50]}... ({len(text)} characters)"
