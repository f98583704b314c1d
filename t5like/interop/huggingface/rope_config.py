"""Rotary embeddings in a config.json: `rope_parameters`, or `rope_theta` and `rope_scaling` of transformers 4."""

import math
from collections.abc import Mapping
from typing import Any

from t5like.config.model_schema import RotaryConfig
from t5like.errors import CheckpointError
from t5like.interop.huggingface.config_keys import nonnegative, positive_int


def rotary_of(hf_config: Mapping[str, Any]) -> RotaryConfig:
    """The section `model.rotary`; an unsupported type of scaling is refused by its name."""
    rope = {**(hf_config.get("rope_scaling") or {}), **(hf_config.get("rope_parameters") or {})}
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    where = "rope_parameters" if hf_config.get("rope_parameters") else "rope_scaling"
    if rope_type not in ("default", "linear", "llama3", "yarn"):
        raise CheckpointError(f"config.json: {where}.rope_type={rope_type!r} must be default, linear, llama3 or yarn")
    for key, allowed in (("partial_rotary_factor", 1.0), ("truncate", True)):
        if rope.get(key, hf_config.get(key, allowed)) != allowed:
            raise CheckpointError(f"config.json: {where}.{key}={rope.get(key, hf_config.get(key))!r} must be {allowed}")
    fields: dict[str, Any] = {"base": base_of({"rope_theta": 10_000.0, **hf_config, **rope})}
    if rope_type == "default":
        return RotaryConfig(**fields)
    fields |= {"scaling": rope_type, "factor": nonnegative(rope, "factor", where=where)}
    if rope_type == "linear":
        return RotaryConfig(**fields)
    longest = hf_config.get("original_max_position_embeddings", hf_config.get("max_position_embeddings"))
    fields["original_length"] = positive_int(
        {"original_max_position_embeddings": longest, **rope}, "original_max_position_embeddings"
    )
    if rope_type == "llama3":
        low, high = (nonnegative(rope, f"{name}_freq_factor", where=where) for name in ("low", "high"))
        return RotaryConfig(**fields | {"low_frequency_factor": low, "high_frequency_factor": high})
    fast, slow = rope.get("beta_fast") or 32.0, rope.get("beta_slow") or 1.0
    attention = rope.get("attention_factor") or 0.0
    if not attention and rope.get("mscale") and rope.get("mscale_all_dim"):
        log_factor = 0.1 * math.log(max(fields["factor"], 1.0))
        attention = (log_factor * rope["mscale"] + 1) / (log_factor * rope["mscale_all_dim"] + 1)
    return RotaryConfig(
        **fields | {"beta_fast": float(fast), "beta_slow": float(slow), "attention_factor": float(attention)}
    )


def base_of(rope: Mapping[str, Any]) -> float:
    """`rope_theta`, above 0: `model.rotary.local_base=0` has a meaning of its own."""
    if not (base := nonnegative(rope, "rope_theta")):
        raise CheckpointError(f"config.json: rope_theta={rope['rope_theta']} must be above 0")
    return base


def config_of(rotary: RotaryConfig) -> dict[str, Any]:
    """`rope_parameters` of transformers 5."""
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
