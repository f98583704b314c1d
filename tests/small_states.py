"""Small train states and checkpoints of them."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding, PartitionSpec

from t5like.checkpoint.checkpoints import Checkpoints
from t5like.config.schema import Config
from t5like.types import TrainState

REST = {"config": Config(seed=7), "tokenizer": b"\x00model\xff", "tokenizer_hash": "abc"}


def on_mesh(tree, **axes: int):
    """Abstract leaves on a mesh of these axes: rows over the first axis, columns over the second where they divide."""
    mesh = jax.make_mesh(tuple(axes.values()), tuple(axes), devices=jax.devices()[: np.prod(list(axes.values()))])

    def place(leaf):
        spec = [
            axis if leaf.shape[dim] % axes[axis] == 0 else None
            for dim, axis in list(enumerate(axes))[: len(leaf.shape)]
        ]
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, PartitionSpec(*spec)))

    return jax.tree.map(place, tree)


def new_state(step: int = 0, rows: int = 16, **axes: int) -> TrainState:
    """A state with all types of leaves and containers of real ones: Optax tuples, empty states, bool, bfloat16."""
    rng = np.random.default_rng(step)
    params = {
        "encoder": {
            "kernel": jnp.asarray(rng.normal(size=(rows, 12)), jnp.float32),
            "scale": jnp.asarray(rng.normal(size=12), jnp.bfloat16),
        },
        "decoder": {"kernel": jnp.asarray(rng.normal(size=(8, 5)), jnp.float32)},
    }
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3), optax.apply_if_finite(optax.sgd(0.1), 3))
    state = TrainState(jnp.int32(step), params, tx.init(params))
    return jax.device_put(state, jax.tree.map(lambda leaf: leaf.sharding, on_mesh(state, **(axes or {"data": 1}))))


def saved(directory: Path, *steps: int, keep: int = 9, keep_every: int = 0, rows: int = 16, **axes: int) -> Checkpoints:
    checkpoints = Checkpoints(directory, keep=keep, keep_every=keep_every)
    for step in steps:
        checkpoints.save(new_state(step, rows, **axes), **REST)
    checkpoints.close()
    return checkpoints


def assert_bitwise(got, want) -> None:
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert a.dtype == b.dtype and np.asarray(a).tobytes() == np.asarray(b).tobytes()
