"""Learning-rate schedules by name, and warnings about schedules that a run can't follow smoothly.

Called by `optimizers`, by `step` for the metric `learning_rate`, and by `train` and `plan` for their reports.

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


def warnings(config: Config, before: Config, step: int) -> list[str]:
    """Warnings about the schedule of a run that continues after `step` updates with the config `before`."""
    return [line for line in (warmup_warning(config), jump_warning(before, config, step) if step else None) if line]


def warmup_warning(config: Config) -> str | None:
    """A warning if the warm-up is longer than the run, so that the learning rate never reaches its peak."""
    optimizer, steps = config.optimizer, config.train.num_steps
    if optimizer.schedule == "rsqrt" or optimizer.warmup_steps <= steps:  # rsqrt is flat during its warm-up
        return None
    return (
        f"optimizer.warmup_steps={optimizer.warmup_steps:,} is more than train.num_steps={steps:,}: the learning rate "
        f"ends at {float(learning_rate(config)(steps - 1)):.3g} and never reaches {optimizer.learning_rate:g}; use "
        f"optimizer.warmup_steps={max(1, steps // 10)}"
    )


def jump_warning(old: Config, new: Config, step: int) -> str | None:
    """A warning if the learning rate jumps where a run continues after `step` updates with a new config."""
    before, after = (float(learning_rate(config)(index)) for config, index in ((old, step - 1), (new, step)))
    expected = float(learning_rate(old)(step))
    if abs(after - before) <= abs(expected - before) + 1e-3 * new.optimizer.learning_rate:
        return None  # the change is not larger than in the old schedule
    return (
        f"train.num_steps={new.train.num_steps:,} instead of {old.train.num_steps:,} moves the learning rate of "
        f"optimizer.schedule={new.optimizer.schedule} from {before:.3g} at step {step:,} to {after:.3g} at step "
        f"{step + 1:,}; to avoid the jump, continue optimizer.schedule=wsd from before its decay, or start a new run "
        "with init_from.checkpoint"
    )
