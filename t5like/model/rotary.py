"""Rotary position embeddings and their extensions to longer texts. Called by `attention`."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from t5like.config.model_schema import ModelConfig


def rotary_frequencies(config: ModelConfig) -> tuple[np.ndarray, float]:
    """Radians per token of each pair of a head's dims, float32 [H / 2], and the factor on queries and keys.

    A frequency f makes t = original_length * f / 2 pi turns in a text of the original length. llama3 (Llama
    3.1's released code): f for t > high_frequency_factor, f / factor for t < low_frequency_factor, between them both,
    mixed linearly by t. yarn (Peng et al. 2023, section 3): the same with a mixture that is linear in the pair's index,
    from the first that turns fewer than beta_fast times, rounded down, to the one that turns beta_slow times, rounded
    up; and queries and keys are scaled.
    """
    rotary, half = config.rotary, config.head_dim // 2
    frequency = rotary.base ** (-np.arange(half, dtype=np.float32) / half)
    if rotary.scaling == "none":
        return frequency, 1.0
    low, scale = frequency / np.float32(rotary.factor), 1.0
    if rotary.scaling == "linear":
        return low, scale
    if rotary.scaling == "llama3":
        turns = rotary.original_length * frequency / np.float32(2 * math.pi)
        kept = (turns - rotary.low_frequency_factor) / (rotary.high_frequency_factor - rotary.low_frequency_factor)
    else:

        def index_of(turns: float) -> float:  # of the pair with so many turns, as a real number
            ratio = rotary.original_length / (turns * 2 * math.pi)
            return half * math.log(ratio) / math.log(rotary.base)

        first = max(math.floor(index_of(rotary.beta_fast)), 0)
        last = min(math.ceil(index_of(rotary.beta_slow)), config.head_dim - 1)
        kept = 1 - (np.arange(half) - first) / max(last - first, 0.001)
        scale = rotary.attention_factor or 0.1 * math.log(max(rotary.factor, 1.0)) + 1.0
    kept = np.clip(kept, 0, 1).astype(np.float32)
    return frequency * kept + low * (1 - kept), scale


def rotate(x_BLNH: jax.Array, positions_BL: jax.Array, config: ModelConfig) -> jax.Array:
    """Rotary positions (Su et al. 2021) in Llama's layout: the first and second half of H form the pairs."""
    frequency, scale = rotary_frequencies(config)
    angle_BL1H = positions_BL[:, :, None, None].astype(jnp.float32) * frequency[None, None, None]
    cos, sin = jnp.cos(angle_BL1H), jnp.sin(angle_BL1H)
    if scale != 1:
        cos, sin = cos * scale, sin * scale
    first, second = jnp.split(x_BLNH.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x_BLNH.dtype)
