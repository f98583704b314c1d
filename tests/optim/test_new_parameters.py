"""The warm-up of an adapted model: only new parameters learn, as if the others were frozen, then all do."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from test_optimizers import axes_of, config_of, random_grads, random_params

from t5like import tree
from t5like.config.schema import Config, InitConfig
from t5like.errors import ConfigError
from t5like.optim import new_parameters
from t5like.optim.optimizers import make_optimizer

WARMUP = InitConfig(checkpoint="run", reinitialize=("embedding",), warmup_steps=2)


def trajectory(config: Config, params: dict, grads: list[dict]) -> list[tuple[dict, tuple]]:
    """Parameters and optimizer state after each update."""
    optimizer = make_optimizer(config, params, axes_of(params))
    state, found = optimizer.init(params), []
    for gradient in grads:
        updates, state = optimizer.update(gradient, state, params)
        params = optax.apply_updates(params, updates)
        found.append((params, state))
    return found


@pytest.mark.parametrize("name", ["adafactor", "adamw", "lion", "muon"])
def test_old_parameters_and_their_state_stay_in_the_warmup_and_then_begin_as_in_a_new_run(name):
    plain = config_of(name, weight_decay=0.1)
    config = dataclasses.replace(plain, init_from=WARMUP)
    frozen = lambda pattern: config_of(name, weight_decay=0.1, frozen=(pattern,))
    params = random_params(1)
    grads = [random_grads(params, step) for step in range(3)]

    @jax.jit
    def run(params, grads):
        only_new = trajectory(frozen("encoder/.*"), params, grads)
        only_old = trajectory(frozen("embedding"), params, grads[2:])
        return trajectory(config, params, grads), only_new, only_old

    both, only_new, only_old = run(params, grads)
    for (after, _), (expected, _) in zip(both, only_new, strict=True):
        np.testing.assert_allclose(after["embedding"], expected["embedding"], rtol=1e-6, atol=1e-9)
    for after, _ in both[:2]:
        jax.tree.map(np.testing.assert_array_equal, after["encoder"], params["encoder"])
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-9),
        both[2][0]["encoder"],
        only_old[0][0]["encoder"],
    )
    begin = tree.flatten(make_optimizer(config, params, axes_of(params)).init(params))
    old = [part for part in begin if "/old/" in part and not part.endswith("/step")]
    assert any("encoder" in part for part in old) and not any("embedding" in part for part in old)
    for part in old:
        np.testing.assert_array_equal(tree.flatten(both[1][1])[part], begin[part], err_msg=part)
    assert any(np.any(tree.flatten(both[2][1])[part] != begin[part]) for part in old)


def test_gradients_of_old_parameters_are_zero_in_the_warmup_also_if_they_are_not_finite():
    config = dataclasses.replace(config_of("adamw"), init_from=WARMUP)
    grads = {"embedding": jnp.ones(3), "encoder": {"kernel": jnp.array([1.0, jnp.nan])}}
    first = new_parameters.alone_at_first(config, grads, jnp.int32(1))
    assert first["embedding"].tolist() == [1, 1, 1] and first["encoder"]["kernel"].tolist() == [0, 0]
    later = new_parameters.alone_at_first(config, grads, jnp.int32(2))
    np.testing.assert_array_equal(later["encoder"]["kernel"], grads["encoder"]["kernel"])
    with pytest.raises(ConfigError, match="init_from.warmup_steps=2 has nothing to train"):
        new_parameters.check(config, {"encoder": grads["encoder"]})
