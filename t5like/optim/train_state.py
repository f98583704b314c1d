"""The train state before the first step: parameters, optimizer state and their logical axes, as shapes or as arrays.

Pure functions without I/O. The training loop, evaluation, conversions and the planner use them.
"""

from collections.abc import Mapping
from functools import lru_cache, partial
from operator import attrgetter

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, Mesh

from t5like import tree
from t5like.config.schema import Config
from t5like.model.transformer import Transformer
from t5like.optim.bad_steps import new_window
from t5like.optim.optimizers import make_optimizer
from t5like.sharding import placement
from t5like.types import Batch, LogicalAxes, TrainState, Tree


def init_params(config: Config, batch: Batch, key: jax.Array) -> Tree:
    """Random float32 parameters in boxes with their logical axes (`flax.linen.LogicallyPartitioned`)."""
    ids = jax.tree.map(lambda x: jnp.zeros((1, *x.shape[1:]), x.dtype), batch)
    return Transformer(config).init(key, ids)["params"]


def init_state(config: Config, batch: Batch, key: jax.Array) -> TrainState:
    """The state before the first step; `batch` gives shapes only. Call it under `jax.jit` with `out_shardings`."""
    return _first_state(config, nn.meta.unbox(init_params(config, batch, key)), parameter_axes(config, batch))


def _first_state(config: Config, params: Tree, axes: LogicalAxes) -> TrainState:
    ema = jax.tree.map(jnp.copy, params) if config.optimizer.ema_decay else None
    recent = new_window() if config.train.spike_factor else None
    opt_state = make_optimizer(config, params, axes).init(params)
    return TrainState(jnp.zeros((), jnp.int32), params, opt_state, ema, recent)


def abstract_state(config: Config, batch: Batch, mesh: Mesh) -> TrainState:
    """Shape, dtype and sharding of every leaf of the state on a mesh; nothing is allocated."""
    params = jax.tree.map(attrgetter("value"), _abstract_boxes(config, batch), is_leaf=_is_box)
    axes = parameter_axes(config, batch)
    state = jax.eval_shape(lambda params: _first_state(config, params, axes), params)
    shardings = placement.state_shardings(state, axes, mesh)
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state, shardings)


def parameter_axes(config: Config, batch: Batch) -> LogicalAxes:
    """Logical axes of every parameter by name; `batch` gives shapes only."""
    boxes = jax.tree_util.tree_leaves_with_path(_abstract_boxes(config, batch), is_leaf=_is_box)
    return {tree.name_of(path): box.names for path, box in boxes}


def initial_values(config: Config, batch: Batch) -> dict[str, tuple[float, float]]:
    """Mean and standard deviation of each parameter's initial values, by name, from its initializer."""
    boxes = jax.tree_util.tree_leaves_with_path(_abstract_boxes(config, batch), is_leaf=_is_box)
    return {tree.name_of(path): (box.mean, box.std) for path, box in boxes}


def _is_box(node: object) -> bool:
    return isinstance(node, nn.meta.AxisMetadata)


def _abstract_boxes(config: Config, batch: Batch) -> Tree:
    """Shapes of `init_params`, in boxes with their logical axes."""
    row_types = tuple(None if x is None else (x.shape[1:], np.dtype(x.dtype)) for x in batch)
    return _trace_boxes(Config(model=config.model, tokenizer=config.tokenizer), row_types)


@lru_cache(maxsize=32)
def _trace_boxes(config: Config, row_types: tuple) -> Tree:
    """Trace `init_params` once in a process; `row_types`: (row shape, dtype) or None, by field of the batch."""
    batch = Batch(*(kind and jax.ShapeDtypeStruct((1, *kind[0]), kind[1]) for kind in row_types))
    with jax.sharding.use_abstract_mesh(AbstractMesh((), ())):  # the shapes must not depend on the caller's mesh
        return jax.eval_shape(lambda batch: init_params(config, batch, jax.random.key(0)), batch)


def new_state(
    config: Config, batch: Batch, abstract: TrainState, params: Mapping[str, jax.Array] | None = None
) -> TrainState:
    """Make the state before the first step, each leaf with the sharding in `abstract`.

    Args:
        config: resolved on the mesh of `abstract`.
        batch: gives shapes only.
        abstract: shape, dtype and sharding of every leaf of the state.
        params: parameters by name that exist already and become part of the state; the others are random. Random
            values depend on config, seed and name only.
    """
    shardings, key = shardings_of(abstract), jax.random.key(config.seed)
    with jax.set_mesh(mesh_of(abstract)):
        if not params:
            return jax.jit(partial(init_state, config), out_shardings=shardings)(batch, key)
        wanted = tree.flatten(shardings.params)
        missing = {name: sharding for name, sharding in wanted.items() if name not in params}

        def random_params(batch: Batch, key: jax.Array) -> dict[str, jax.Array]:
            everything = tree.flatten(nn.meta.unbox(init_params(config, batch, key)))
            return {name: everything[name] for name in missing}  # XLA removes what computes the others

        random = jax.jit(random_params, out_shardings=missing)(batch, key) if missing else {}
        leaves = [params[name] if name in params else random[name] for name in wanted]
        whole = jax.tree.unflatten(jax.tree.structure(abstract.params), leaves)
        axes = parameter_axes(config, batch)
        rest = jax.jit(
            lambda params: _first_state(config, params, axes)._replace(params=None),
            out_shardings=shardings._replace(params=None),
        )
        return rest(whole)._replace(params=whole)


def shardings_of(abstract: TrainState) -> TrainState:
    return jax.tree.map(lambda leaf: leaf.sharding, abstract)


def mesh_of(abstract: TrainState) -> Mesh:
    return abstract.step.sharding.mesh
