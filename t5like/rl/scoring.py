"""Log-probabilities, entropies and values of the tokens of answers, for losses and for the reference."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from t5like.config.schema import Config
from t5like.model.transformer import Transformer
from t5like.rl.experience import Experience
from t5like.sharding import placement, xla_options
from t5like.types import MASKED, Tree


class Scores(NamedTuple):
    """Of each target token, float32 [B, G, L]; values are None for a model without a scalar head.

    Attributes:
        log_p_BGL: log-probability of the target at `rl.temperature`, in nats.
        entropy_BGL: entropy of that distribution, in nats.
        values_BGL: output of the scalar head at the position that predicts the token.
    """

    log_p_BGL: jax.Array
    entropy_BGL: jax.Array
    values_BGL: jax.Array | None


def scores(config: Config, params: Tree, experience: Experience) -> Scores:
    """Score the answers, without dropout: the sampler has none.

    With `train.loss_chunk` the logits are computed in chunks of the length, and again in the backward pass.
    """
    batch, chunk = experience.rows(), config.train.loss_chunk
    model = Transformer(config)
    hidden_NLD, _ = model.apply({"params": params}, batch, method="hidden")

    def head(hidden_NLD: jax.Array, targets_NL: jax.Array) -> tuple[jax.Array, jax.Array]:
        logits_NLV = model.apply({"params": params}, hidden_NLD, method="logits").astype(jnp.float32)
        logits_NLV = jnp.where(logits_NLV <= MASKED, MASKED, logits_NLV / config.rl.temperature)
        all_NLV = jax.nn.log_softmax(logits_NLV)
        log_p_NL = jnp.take_along_axis(all_NLV, targets_NL[..., None], axis=-1)[..., 0]
        if not config.rl.entropy_coefficient:
            all_NLV = jax.lax.stop_gradient(all_NLV)
        return log_p_NL, -(jnp.exp(all_NLV) * all_NLV).sum(-1)

    if chunk:
        log_p_NL, entropy_NL = _in_chunks(head, hidden_NLD, batch.targets_BL, chunk)
    else:
        log_p_NL, entropy_NL = head(hidden_NLD, batch.targets_BL)
    values_NL = model.apply({"params": params}, hidden_NLD, method="scalars") if config.model.scalar_head else None
    shape = experience.mask_BGL.shape
    return Scores(*(None if x is None else x.reshape(shape) for x in (log_p_NL, entropy_NL, values_NL)))


def _in_chunks(head, hidden_NLD: jax.Array, targets_NL: jax.Array, chunk: int) -> tuple[jax.Array, jax.Array]:
    """`head` on chunks of the length, so that the logits of all positions are never in memory."""
    rows, length = targets_NL.shape
    padding, count = -length % chunk, -(-length // chunk)

    def split(x: jax.Array) -> jax.Array:  # [N, L, ...] -> [count, N, chunk, ...]
        x = jnp.pad(x, [(0, 0), (0, padding)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(rows, count, chunk, *x.shape[2:]), 1, 0)

    parts = jax.lax.map(jax.checkpoint(lambda part: head(*part)), (split(hidden_NLD), split(targets_NL)))
    return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1).reshape(rows, -1)[:, :length], parts)


def jit_scores(config: Config, mesh: Mesh, spec: Experience):
    """The jitted function (params, experience) -> `Scores`, whose arrays are sharded like those of the experience."""
    sharding: NamedSharding = placement.batch_shardings(spec.mask_BGL, mesh)
    return jax.jit(
        partial(scores, config), out_shardings=sharding, compiler_options=xla_options.of_chip(config.train, mesh)
    )
