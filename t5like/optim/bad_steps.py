"""Which updates the train step does not make: those that are not finite, and spikes of the loss or the gradient norm.

Pure functions inside the jitted step, called by `step`. What happens after several bad steps in a row is decided in
`train.rewind`. Skipping spikes: Chowdhery et al. 2022 (PaLM, arXiv:2204.02311, section 5.1) pass over the batches that
led to a spike; here a single one is recognized before its update is made.
"""

import jax.numpy as jnp
import optax

from t5like.config.schema import Config
from t5like.types import Array, Metrics, Sum, Tree

WINDOW = 64  # updates of the running median
FEWEST = 16  # updates before a step can be a spike: the first ones are not typical


def new_window() -> Array:
    """The loss and the gradient norm of recent updates before the first one: float32 [2, WINDOW] of NaN."""
    return jnp.full((2, WINDOW), jnp.nan)


def judge(
    config: Config, recent: Array | None, step: Array, loss: Sum, norm: Array, updates: Tree
) -> tuple[Array, Array | None, Metrics]:
    """Decide whether an update is made.

    Args:
        recent: `TrainState.recent`.
        step: `TrainState.step`.
        loss: of the batch, nats over target tokens.
        norm: of the gradient, before clipping.
        updates: what would be added to the parameters. A damaged optimizer state makes it non-finite although loss and
            gradient are finite.

    Returns:
        A bool, the next `recent`, which contains only updates that were made, and the metrics ``skipped_updates`` and,
        with `train.spike_factor`, ``spikes``.
    """
    one, mean = jnp.ones(()), loss.total / jnp.maximum(loss.weight, 1.0)
    finite = jnp.isfinite(mean) & jnp.isfinite(norm) & jnp.isfinite(optax.tree.norm(updates))
    if recent is None:
        return finite, None, {"skipped_updates": Sum(1.0 - finite.astype(jnp.float32), one)}
    values_2, median_2 = jnp.stack([mean, norm]), jnp.nanmedian(recent, axis=1)
    spike = finite & jnp.any((values_2 > config.train.spike_factor * median_2) & (median_2 > 0))
    spike &= jnp.sum(jnp.isfinite(recent[1])) >= FEWEST
    made = finite & ~spike if config.train.on_spike == "skip" else finite
    recent = jnp.where(made, recent.at[:, step % WINDOW].set(values_2), recent)
    metrics = {
        "skipped_updates": Sum(1.0 - made.astype(jnp.float32), one),
        "spikes": Sum(spike.astype(jnp.float32), one),
    }
    return made, recent, metrics
