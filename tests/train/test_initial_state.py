"""The initial state: existing parameters are used as they are, and only the others are initialized at random."""

import jax
import numpy as np
from conftest import random_batch, small

from t5like import tree
from t5like.optim import train_state
from t5like.sharding import mesh as meshes


def test_only_missing_parameters_are_random_with_the_values_of_a_random_state():
    config = small(mesh={"fsdp": 2, "data": 4}, optimizer={"ema_decay": 0.9})
    batch = random_batch(config)
    abstract = train_state.abstract_state(config, batch, meshes.make_mesh(config))
    expected = tree.flatten(jax.device_get(train_state.new_state(config, batch, abstract)))
    names = list(tree.flatten(abstract.params))
    for given in (names[::2], names):
        params = {
            name: jax.device_put(expected[f"params/{name}"] + 1, leaf.sharding)
            for name, leaf in tree.flatten(abstract.params).items()
            if name in given
        }
        state = train_state.new_state(config, batch, abstract, params)
        assert jax.tree.map(lambda leaf: leaf.sharding, state) == jax.tree.map(lambda leaf: leaf.sharding, abstract)
        for name, leaf in tree.flatten(state).items():
            parameter = name.removeprefix("params/").removeprefix("ema/")
            added = 1 if parameter in given and name.startswith(("params/", "ema/")) else 0
            np.testing.assert_array_equal(leaf, expected[name] + np.asarray(added, leaf.dtype), err_msg=name)
        jax.jit(lambda state: jax.tree.map(lambda x: x * 2, state), donate_argnums=0)(state)  # no shared buffers
