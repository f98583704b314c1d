"""Single keys of a config.json, checked: what a file from elsewhere says is not trusted."""

import math
from collections.abc import Mapping
from typing import Any

from t5like.errors import CheckpointError


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
    """A whole number of at least 1."""
    value = default if hf.get(key) is None else hf[key]
    if type(value) is not int or value < 1:
        raise CheckpointError(f"config.json: {key}={value!r} must be a whole number of at least 1")
    return value


def number(hf: Mapping[str, Any], key: str, default: float | None = None, where: str = "") -> float:
    """A finite number, not negative; `where` is the key that it lies in."""
    value = default if hf.get(key) is None else hf[key]
    if type(value) not in (int, float) or not 0 <= value < math.inf:
        raise CheckpointError(f"config.json: {where}{'.' * bool(where)}{key}={value!r} must be a finite number, >= 0")
    return float(value)
