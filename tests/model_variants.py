"""Model variants that the tests of `model/` share, and functions of a config that are compiled once."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from conftest import random_batch, small

from t5like import tree
from t5like.config.schema import Config, MeshConfig
from t5like.model.layer_values import compute_intermediates
from t5like.model.transformer import Transformer
from t5like.optim import step, train_state
from t5like.sharding import mesh as meshes
from t5like.types import Batch

BERT = {
    "architecture": "encoder",
    "head_dim": 4,
    "mlp": "gelu_exact",
    "positions": "learned",
    "norm": "layer",
    "norm_position": "post",
    "norm_epsilon": 1e-12,
    "embedding_norm": True,
    "token_types": 2,
    "head": "mlm",
    "biases": True,
    "tied_embeddings": True,
    "scale_attention": True,
    "init": "bert",
    "max_length": 64,
}


GEMMA = {
    "num_layers": 1,
    "positions": "rotary",
    "num_kv_heads": 2,
    "norm_position": "sandwich",
    "norm_offset": True,
    "embedding_scale": "sqrt_dim",
    "tied_embeddings": True,
    "scale_attention": True,
    "attention_scale_dim": 6,
    "logits_softcap": 5.0,
    "attention_window": 3,
}
VARIANTS = {
    "gemma2": {"model": {**GEMMA, "architecture": "decoder", "attention_softcap": 2.0}},
    "gemma_encoder": {"model": {**GEMMA, "architecture": "encoder", "attention_softcap": 2.0}},
    "t5gemma": {
        "model": {
            **GEMMA,
            "attention_softcap": 2.0,
            "encoder_window": 4,
            "separate_embeddings": True,
            "decoder_model_dim": 24,
            "decoder_num_heads": 2,
            "decoder_num_kv_heads": 1,
            "decoder_head_dim": 6,
            "decoder_mlp_dim": 20,
        }
    },
    "t5gemma2": {
        "model": {
            **GEMMA,
            "qk_norm": True,
            "encoder_window": 2,
            "encoder_window_ahead": 3,
            "merged_attention": True,
        }
    },
    "t5": {},
    "causal": {"model": {"architecture": "decoder"}},
    "llama": {
        "model": {
            "architecture": "decoder",
            "positions": "rotary",
            "num_kv_heads": 2,
            "scale_attention": True,
            "mlp": "gated_silu",
        }
    },
    "umt5": {"model": {"relative_bias": "per_layer"}},
    "windowed": {
        "model": {
            "architecture": "decoder",
            "positions": "rotary",
            "qk_norm": True,
            "attention_window": 6,
            "rotary": {"scaling": "yarn", "factor": 4.0, "original_length": 16},
        }
    },
    "pattern": {
        "model": {
            "architecture": "decoder",
            "positions": "rotary",
            "num_kv_heads": 2,
            "scale_attention": True,
            "attention_window": 3,
            "layer_pattern": ("local", "global"),
            "rotary": {"local_base": 100.0},
            "mlp": "gated_silu",
            "mlp_pattern": ("gated_silu", "gated_gelu"),
        }
    },
    "t5_pattern": {"model": {"attention_window": 4, "layer_pattern": ("local", "global")}},
    "post_norm": {
        "model": {"norm_position": "post", "norm": "layer", "biases": True, "positions": "learned", "mlp": "relu"}
    },
    "prefix": {"model": {"architecture": "decoder"}, "data": {"objective": "prefix_lm"}},
    "bert": {"model": {**BERT, "head_dim": 8}, "data": {"objective": "mlm_nsp"}},
    "encoder": {"model": {"architecture": "encoder"}},
    "modernbert": {
        "model": {
            "architecture": "encoder",
            "positions": "rotary",
            "rotary": {"local_base": 100.0},
            "attention_window": 4,
            "layer_pattern": ("global", "local"),
            "norm": "layer",
            "norm_bias": False,
            "embedding_norm": True,
            "first_attention_norm": False,
            "mlp": "gated_gelu_exact",
            "head": "mlm",
            "tied_embeddings": True,
            "scale_attention": True,
            "init": "gpt2",
        }
    },
}


def with_model(variant, **model) -> Config:
    sections = VARIANTS[variant]
    return small(**{**sections, "model": {**sections.get("model", {}), **model}})


@functools.cache
def init(config: Config):
    """The random parameters of a new run, made once for all tests of a process."""
    return tree.nested(train_state.random_params(config, random_batch(config), jax.random.key(0)))


@functools.cache
def params_of(config: Config, seed: int = 0):
    """`drawn_params`, once for all tests of a process."""
    return drawn_params(config, random_batch(config), seed)


def drawn_params(config: Config, batch: Batch, seed: int = 0):
    """Parameters distributed like those of `init`, drawn by NumPy: JAX's draws take longer to compile than a model."""
    rng, kinds = np.random.default_rng(seed), train_state.initial_values(config, batch)
    alone = dataclasses.replace(config, mesh=MeshConfig())
    shapes = train_state.abstract_state(alone, batch, meshes.make_mesh(alone, jax.devices()[:1])).params
    values = {name: rng.normal(*kinds[name], leaf.shape) for name, leaf in tree.flatten(shapes).items()}
    return jax.tree.map(jnp.float32, tree.nested(values))


@functools.partial(jax.jit, static_argnums=0)
def logits(config: Config, params, batch: Batch):
    return Transformer(config).apply({"params": params}, batch)


@functools.partial(jax.jit, static_argnums=0)
def pair_logits(config: Config, params, batch: Batch):
    return Transformer(config).apply(
        {"params": params}, batch, method=lambda m, batch: m.pair_logits(m.hidden(batch).x_BLD)
    )


@functools.partial(jax.jit, static_argnums=0)
def mean_loss(config: Config, params, batch: Batch, key=None):
    loss = step.pretrain_loss(config, params, batch, key).metrics["loss"]
    return loss.total / loss.weight


def loss_and_gradients(config: Config, params, batch: Batch):
    return jax.jit(jax.value_and_grad(lambda p: step.pretrain_loss(config, p, batch, None).objective))(params)


def values_of(config: Config, params, batch: Batch, *names: str):
    """`compute_intermediates`, compiled as one program."""
    return jax.jit(lambda params: compute_intermediates(config, params, batch, names))(params)


@functools.partial(jax.jit, static_argnums=0)
def decoded_by_steps(config: Config, params, batch: Batch):
    """The logits of the full forward, and those with a cache: of 5 tokens at once, then of one token after another."""
    apply = functools.partial(Transformer(config).apply, {"params": params})
    rows, length = batch.decoder_BL.shape
    encoded = None if batch.encoder_BS is None else apply(batch.encoder_BS, method="encode")
    cache = apply(rows, length, encoded, method="prepare_cache")
    first, cache = apply(batch.decoder_BL[:, :5], cache, 0, method="decode")

    def one(cache, index):
        ids_B1 = jax.lax.dynamic_slice_in_dim(batch.decoder_BL, index, 1, axis=1)
        logits_B1V, cache = apply(ids_B1, cache, index, method="decode")
        return cache, logits_B1V[:, 0]

    rest = jax.lax.scan(one, cache, jnp.arange(5, length))[1].swapaxes(0, 1)
    return apply(batch), jnp.concatenate([first, rest], axis=1)
