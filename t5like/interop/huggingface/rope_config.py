"""Rotary positions in a config.json: `rope_parameters`, or version 4's `rope_theta` and `rope_scaling`."""

import math
from collections.abc import Mapping
from typing import Any

from t5like.config.schema import RotaryConfig
from t5like.errors import CheckpointError
from t5like.interop.huggingface.config_keys import number, whole


def rotary_of(hf: Mapping[str, Any]) -> RotaryConfig:
    """Our section; a kind of scaling that is not built is refused by its name."""
    rope = {**(hf.get("rope_scaling") or {}), **(hf.get("rope_parameters") or {})}
    kind = rope.get("rope_type", rope.get("type", "default"))
    where = "rope_parameters" if hf.get("rope_parameters") else "rope_scaling"
    if kind not in ("default", "linear", "llama3", "yarn"):
        raise CheckpointError(
            f"config.json: {where}.rope_type={kind!r} must be default, linear, llama3 or yarn; others are not built"
        )
    for key, allowed in (("partial_rotary_factor", 1.0), ("truncate", True)):
        if rope.get(key, hf.get(key, allowed)) != allowed:
            raise CheckpointError(f"config.json: {where}.{key}={rope.get(key, hf.get(key))!r} must be {allowed}")
    fields: dict[str, Any] = {"base": number({"rope_theta": 10_000.0, **hf, **rope}, "rope_theta")}
    if kind == "default":
        return RotaryConfig(**fields)
    fields |= {"scaling": kind, "factor": number(rope, "factor", where=where)}
    if kind == "linear":
        return RotaryConfig(**fields)
    longest = hf.get("original_max_position_embeddings", hf.get("max_position_embeddings"))
    fields["original_length"] = whole(
        {"original_max_position_embeddings": longest, **rope}, "original_max_position_embeddings"
    )
    if kind == "llama3":
        low, high = (number(rope, f"{name}_freq_factor", where=where) for name in ("low", "high"))
        return RotaryConfig(**fields | {"low_frequency_factor": low, "high_frequency_factor": high})
    fast, slow = rope.get("beta_fast") or 32.0, rope.get("beta_slow") or 1.0
    attention = rope.get("attention_factor") or 0.0
    if not attention and rope.get("mscale") and rope.get("mscale_all_dim"):
        grown = 0.1 * math.log(max(fields["factor"], 1.0))
        attention = (grown * rope["mscale"] + 1) / (grown * rope["mscale_all_dim"] + 1)
    return RotaryConfig(
        **fields | {"beta_fast": float(fast), "beta_slow": float(slow), "attention_factor": float(attention)}
    )


def config_of(rotary: RotaryConfig) -> dict[str, Any]:
    """`rope_parameters`, as version 5 has them."""
    if rotary.scaling == "none":
        return {"rope_type": "default", "rope_theta": rotary.base}
    rope = {"rope_type": rotary.scaling, "rope_theta": rotary.base, "factor": rotary.factor}
    if rotary.scaling != "linear":
        rope["original_max_position_embeddings"] = rotary.original_length
    if rotary.scaling == "llama3":
        rope |= {"low_freq_factor": rotary.low_frequency_factor, "high_freq_factor": rotary.high_frequency_factor}
    if rotary.scaling == "yarn":
        rope |= {"beta_fast": rotary.beta_fast} if rotary.beta_fast != 32 else {}
        rope |= {"beta_slow": rotary.beta_slow} if rotary.beta_slow != 1 else {}
        rope |= {"attention_factor": rotary.attention_factor} if rotary.attention_factor else {}
    return rope
