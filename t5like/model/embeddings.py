"""Token embeddings that may be scaled by sqrt(D), as in Gemma. Called by `transformer`."""

import jax
import jax.numpy as jnp

from t5like.config.model_schema import ModelConfig
from t5like.model.heads import embed


def scaled_embed(table_VD: jax.Array, ids_BL: jax.Array, config: ModelConfig) -> jax.Array:
    """Token embeddings [B, L, D]; Gemma's are times sqrt(D), which is rounded to their dtype (its released code)."""
    x_BLD = embed(table_VD, ids_BL, config.dtype)
    if config.embedding_scale == "sqrt_dim":
        x_BLD = x_BLD * jnp.asarray(table_VD.shape[1] ** 0.5, x_BLD.dtype)
    return x_BLD


def initial_std(config: ModelConfig, dim: int) -> float:
    """Initial standard deviation of token embeddings: with T5's initialization they enter the layers with 1."""
    if config.init != "t5":
        return 0.02
    return 1.0 if config.embedding_scale == "none" else dim**-0.5
