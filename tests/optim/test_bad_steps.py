"""Which updates are made: only finite ones, and no spikes if they are skipped; the window is a part of the state."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import small

from t5like.optim import bad_steps
from t5like.types import Sum

ONE = {"w": jnp.ones(3)}


def judged(config, recent, step, loss=2.0, norm=1.0, updates=ONE):
    """Whether the update is made, the next window, the metrics as numbers."""
    loss = Sum(jnp.float32(4 * loss), jnp.float32(4))
    made, recent, metrics = jax.jit(bad_steps.judge, static_argnums=0)(
        config, recent, jnp.int32(step), loss, jnp.float32(norm), updates
    )
    return bool(made), recent, {name: float(value.total) for name, value in metrics.items()}


def filled(config, steps=20, norm=1.0):
    """The window after that many ordinary steps."""
    recent = bad_steps.new_window()
    for step in range(steps):
        _, recent, _ = judged(config, recent, step, norm=norm + 0.01 * step)
    return recent


@pytest.mark.parametrize(
    "wrong",
    [
        {"loss": np.nan},
        {"loss": np.inf},
        {"norm": np.inf},
        {"norm": np.nan},
        {"updates": {"w": np.array([1, np.nan])}},
    ],
)
def test_an_update_with_anything_that_is_not_finite_is_not_made(wrong):
    for config in (small(), small(train={"spike_factor": 3, "on_spike": "keep"})):
        window = filled(config) if config.train.spike_factor else None
        made, recent, metrics = judged(config, window, 20, **wrong)
        assert not made and metrics["skipped_updates"] == 1 and not metrics.get("spikes")
        assert window is None or np.array_equal(recent, window, equal_nan=True)


def test_without_a_spike_factor_the_state_has_no_window_and_large_norms_are_taken():
    made, recent, metrics = judged(small(), None, 20, norm=1e6)
    assert made and recent is None and metrics == {"skipped_updates": 0}


@pytest.mark.parametrize("wrong", [{"norm": 3.4}, {"loss": 6.1}])
@pytest.mark.parametrize("on_spike", ["skip", "keep"])
def test_a_spike_beyond_the_factor_is_counted_and_skipped_or_kept_as_configured(wrong, on_spike):
    config = small(train={"spike_factor": 3.0, "on_spike": on_spike})
    window = filled(config)  # median norm 1.095, loss 2
    assert judged(config, window, 20, norm=3.2, loss=5.9)[::2] == (True, {"skipped_updates": 0, "spikes": 0})
    made, recent, metrics = judged(config, window, 20, **wrong)
    assert made == (on_spike == "keep") and metrics == {"skipped_updates": not made, "spikes": 1}
    assert np.isfinite(recent[1]).sum() == 20 + made


def test_the_first_steps_are_no_spikes():
    config = small(train={"spike_factor": 3.0})
    early = filled(config, bad_steps.FEWEST - 1)
    assert judged(config, early, bad_steps.FEWEST - 1, norm=100.0)[0]
    assert not judged(config, filled(config, bad_steps.FEWEST), bad_steps.FEWEST, norm=100.0)[0]


def test_the_median_is_that_of_the_last_window_of_updates():
    config = small(train={"spike_factor": 3.0})
    recent, norms = bad_steps.new_window(), np.exp(np.random.default_rng(0).normal(size=150) * 0.1)
    for step, norm in enumerate(norms):
        made, recent, _ = judged(config, recent, step, norm=norm)
        assert made
    median = np.median(norms[-bad_steps.WINDOW :].astype(np.float32))
    assert (
        judged(config, recent, 150, norm=median * 2.999)[0] and not judged(config, recent, 150, norm=median * 3.001)[0]
    )
