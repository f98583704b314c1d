"""Warnings about learning-rate schedules that a run can't follow smoothly. Called by `train.loop`."""

from t5like.config.schema import Config
from t5like.optim.schedules import learning_rate


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
