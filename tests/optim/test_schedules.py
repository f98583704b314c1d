"""Learning-rate schedules against closed forms, and warnings about them."""

import math

import jax
import numpy as np
import pytest

from t5like.config.schema import Config, OptimizerConfig, TrainConfig
from t5like.optim.schedule_warnings import jump_warning, warmup_warning
from t5like.optim.schedules import learning_rate

RATE = 0.01


def rates(num_steps: int, steps, **changes) -> list[float]:
    changes = {"schedule": "constant", "warmup_steps": 0, "learning_rate": RATE} | changes
    config = Config(optimizer=OptimizerConfig(**changes), train=TrainConfig(num_steps=num_steps))
    return [float(jax.jit(learning_rate(config))(step)) for step in steps]


def test_rsqrt_is_the_schedule_of_t5():
    steps = [0, 1, 9_999, 10_000, 40_000, 1_000_000]
    values = rates(2_000_000, steps, schedule="rsqrt", warmup_steps=10_000)
    np.testing.assert_allclose(values, [1 / math.sqrt(max(n, 10_000)) for n in steps], rtol=1e-6)


@pytest.mark.parametrize(
    ("name", "middle", "last"), [("constant", 1, 1), ("cosine", 0.55, 0.1), ("linear", 0.55, 0.1), ("wsd", 1, 0.1)]
)
def test_schedules_warm_up_from_above_zero_and_end_at_the_final_fraction(name, middle, last):
    values = rates(110, [0, 4, 9, 59, 109, 200], schedule=name, warmup_steps=10, decay_steps=20, final_fraction=0.1)
    np.testing.assert_allclose(values, RATE * np.array([0.1, 0.5, 1, middle, last, last]), rtol=1e-5)


def test_wsd_is_flat_and_then_falls_linearly_over_its_decay_steps():
    values = rates(100, [10, 79, 80, 89, 99], schedule="wsd", warmup_steps=5, decay_steps=20)
    np.testing.assert_allclose(values, RATE * np.array([1, 1, 0.95, 0.5, 0]), atol=1e-9)


@pytest.mark.parametrize("name", ["constant", "rsqrt", "cosine", "linear"])
def test_without_warm_up_the_first_rate_is_the_highest_even_of_a_run_of_one_step(name):
    assert rates(50, [0], schedule=name) == rates(1, [0], schedule=name) == [pytest.approx(RATE)]


# ---- Warnings ----


def scheduled(name: str, num_steps: int, warmup: int = 2, decay: int = 0) -> Config:
    optimizer = OptimizerConfig(schedule=name, warmup_steps=warmup, decay_steps=decay, learning_rate=RATE)
    return Config(optimizer=optimizer, train=TrainConfig(num_steps=num_steps))


@pytest.mark.parametrize(
    "name, steps, warmup, line",
    [
        ("constant", 10, 20, "=20 is more than train.num_steps=10: the learning rate ends at 0.005 and never"),
        ("cosine", 10, 11, "the learning rate ends at 0.00909 and"),
        ("linear", 10, 10, None),
        ("rsqrt", 10, 20, None),
    ],
)
def test_a_warm_up_longer_than_the_run_is_warned_about(name, steps, warmup, line):
    warning = warmup_warning(scheduled(name, steps, warmup))
    assert warning is None if line is None else line in warning and "use optimizer.warmup_steps=1" in warning


@pytest.mark.parametrize(
    "old, new, step, line",
    [
        (scheduled("linear", 10), scheduled("linear", 20), 10, "from 0 at step 10 to 0.005 at step 11"),
        (scheduled("cosine", 20), scheduled("cosine", 10), 6, "from 0.00883 at step 6 to 0.00309 at step 7"),
        (scheduled("wsd", 10, decay=4), scheduled("wsd", 20, decay=4), 10, "from 0 at step 10 to 0.01 at step 11"),
        (scheduled("wsd", 10, decay=4), scheduled("wsd", 20, decay=4), 6, None),
        (scheduled("linear", 10), scheduled("linear", 10), 5, None),
        (scheduled("constant", 10), scheduled("constant", 20), 10, None),
        (scheduled("rsqrt", 10), scheduled("rsqrt", 20), 10, None),
    ],
)
def test_a_learning_rate_that_jumps_where_a_run_continues_is_warned_about(old, new, step, line):
    warning = jump_warning(old, new, step)
    if line is None:
        assert warning is None
    else:
        assert line in warning and "optimizer.schedule=wsd" in warning and "init_from.checkpoint" in warning
