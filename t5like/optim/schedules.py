"""Learning-rate schedules by name.

Called by `optimizers`, by `step` for the metric `learning_rate`, and by `plan` for its report.

Sources: T5's inverse square root (Raffel et al. 2020, arXiv:1910.10683, section 3.1.2); WSD (Hu et al. 2024,
arXiv:2404.06395, section 4).
"""

import jax.numpy as jnp
import optax

from t5like.config.schema import Config
from t5like.types import Array


def learning_rate(config: Config) -> optax.Schedule:
    """The learning rate by step: ``rate(step)`` is that of the update from ``step`` to ``step + 1``.

    The first update's rate is above 0, the last update of a warm-up has the full rate, and the last update of the run
    ends at `final_fraction` of it (cosine, linear, wsd).
    """
    optimizer, last = config.optimizer, config.train.num_steps
    warmup = max(optimizer.warmup_steps, 1)
    decay_from = last - optimizer.decay_steps if optimizer.schedule == "wsd" else warmup

    def rate(step: Array) -> Array:
        update = jnp.asarray(step, jnp.float32) + 1
        progress = jnp.clip((update - decay_from) / max(last - decay_from, 1), 0, 1)  # of the decay
        match optimizer.schedule:
            case "rsqrt":
                return optimizer.learning_rate * jnp.sqrt(warmup / jnp.maximum(update - 1, warmup))
            case "constant":
                decay = 1.0
            case "cosine":
                decay = (1 + jnp.cos(jnp.pi * progress)) / 2
            case "linear" | "wsd":
                decay = 1 - progress
        fraction = optimizer.final_fraction + (1 - optimizer.final_fraction) * decay
        return optimizer.learning_rate * jnp.minimum(update / warmup, 1) * fraction

    return rate
