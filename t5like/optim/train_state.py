"""The train state before the first step: parameters, optimizer state and their logical axes, as shapes or as arrays.

Pure functions without I/O. The training loop, evaluation, conversions and the planner use them.
"""

import math
from collections.abc import Callable, Mapping
from functools import lru_cache, partial
from operator import attrgetter

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from t5like import tree
from t5like.config.schema import Config
from t5like.model.layer_parameters import traced
from t5like.model.layers import Parameter, is_box
from t5like.model.transformer import Transformer
from t5like.optim import lora
from t5like.optim.bad_steps import new_window
from t5like.optim.optimizers import make_optimizer
from t5like.sharding import mesh as meshes
from t5like.sharding import placement
from t5like.types import Batch, LogicalAxes, TrainState, Tree

SIZES = [4**power for power in range(6, 11)]  # of the draws that small parameters on CPUs share
SMALL = SIZES[-1]


def init_params(config: Config, batch: Batch, key: jax.Array) -> Tree:
    """Random float32 parameters in boxes with their logical axes (`flax.linen.LogicallyPartitioned`).

    For shapes and small models: `random_params` takes less time to compile.
    """
    boxes = jax.tree.map(_drawn, _model_boxes(config, batch, key), is_leaf=is_box)
    boxes = lora.with_adapters(config.lora, boxes, key)
    return jax.tree.map(lambda box: box.replace(key=None), boxes, is_leaf=is_box)


def random_params(
    config: Config, batch: Batch, key: jax.Array, shardings: Mapping[str, NamedSharding | None] | None = None
) -> dict[str, jax.Array]:
    """The values of `init_params` by name, each drawn by a program of its own, which equal shapes share.

    One program for all would repeat the random bits and the inverse error function for each parameter, and take three
    times as long to compile. Small parameters on CPUs share programs of a few sizes.

    Args:
        config: its model and tokenizer.
        batch: gives shapes only.
        key: of all parameters.
        shardings: the parameters to draw, with their shardings; by default all, on one device.
    """
    all_boxes, keys_of = _traced_boxes(config, batch)
    boxes = {tree.name_of(path): box for path, box in _named_boxes(all_boxes)}
    shardings = dict.fromkeys(boxes) if shardings is None else shardings
    keys = keys_of(key) if shardings else {}
    return {name: _values(boxes[name], keys.get(name), sharding) for name, sharding in shardings.items()}


def _drawn(box: Parameter) -> Parameter:
    """The box of a parameter with its initial values."""
    return box.replace(value=_values(box, box.key))


def _values(box: Parameter, key: jax.Array | None, sharding: NamedSharding | None = None) -> jax.Array:
    """The initial values of a parameter: its pattern, random ones of a key, or one constant."""
    shape = box.value.shape
    if box.pattern is not None:
        return _placed(np.broadcast_to(box.pattern(shape[-2:]), shape), sharding)
    on_cpus = meshes.on_cpus(sharding.device_set if sharding else jax.devices())
    is_small = on_cpus and math.prod(shape) <= SMALL
    if key is None:
        if is_small:
            return _placed(np.full(shape, box.mean, box.value.dtype), sharding)
        return jax.jit(jnp.full, static_argnums=(0, 2), out_shardings=sharding)(shape, box.mean, box.value.dtype)
    of_layer = shape[len(key.shape) :]
    if is_small and not isinstance(key, jax.core.Tracer):
        return _placed(_drawn_by_size(key, np.float32(box.std), of_layer), sharding)
    draw = jax.jit(_normal, static_argnums=2, out_shardings=sharding)
    return draw(key, np.float32(box.std), of_layer)


def _placed(values: np.ndarray, sharding: NamedSharding | None) -> jax.Array:
    if sharding is None:
        return jnp.asarray(values)
    return jax.make_array_from_callback(values.shape, sharding, lambda index: values[index])


def _drawn_by_size(key: jax.Array, std: np.float32, shape: tuple[int, ...]) -> np.ndarray:
    """`_normal` by programs of `SIZES`: the bits of a value depend on its key and its place in the array alone."""
    count = math.prod(shape)
    size = next(size for size in SIZES if size >= count)
    data_of_keys = np.asarray(jax.random.key_data(key)).reshape(key.size, -1)
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        draws = [np.asarray(_normals(data, std, size))[:count] for data in data_of_keys]
    return np.concatenate(draws).reshape((*key.shape, *shape))


@partial(jax.jit, static_argnums=2)
def _normals(key_data: np.ndarray, std: np.float32, count: int) -> jax.Array:
    return _normal(jax.random.wrap_key_data(key_data), std, (count,))


def _normal(key: jax.Array, std: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """A draw from N(0, std), or one for each key of a stack of layers."""
    draw = lambda key: jax.random.normal(key, shape, jnp.float32) * std
    return jax.vmap(draw)(key) if key.ndim else draw(key)


def _boxes(config: Config, batch: Batch, key: jax.Array) -> Tree:
    """`init_params` with the keys in the boxes, and without random values."""
    return lora.with_adapters(config.lora, _model_boxes(config, batch, key), key)


def _model_boxes(config: Config, batch: Batch, key: jax.Array) -> Tree:
    """Those of the model without adapters."""
    ids = jax.tree.map(lambda x: jnp.zeros((1, *x.shape[1:]), x.dtype), batch)
    return Transformer(config).init(key, ids)["params"]


def _first_state(config: Config, params: Tree, axes: LogicalAxes) -> TrainState:
    ema = jax.tree.map(jnp.copy, params) if config.optimizer.ema_decay else None
    recent = new_window() if config.train.spike_factor else None
    opt_state = make_optimizer(config, params, axes).init(params)
    return TrainState(jnp.zeros((), jnp.int32), params, opt_state, ema, recent)


def abstract_state(config: Config, batch: Batch, mesh: Mesh) -> TrainState:
    """Shape, dtype and sharding of every leaf of the state on a mesh; nothing is allocated."""
    whole = jax.tree.map(attrgetter("value"), _abstract_boxes(config, batch), is_leaf=is_box)
    params, base = lora.split(config.lora, whole)
    axes = parameter_axes(config, batch)
    state = jax.eval_shape(lambda params: _first_state(config, params, axes), params)._replace(base=base)
    shardings = placement.state_shardings(state, axes, mesh)
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state, shardings)


def parameter_axes(config: Config, batch: Batch) -> LogicalAxes:
    """Logical axes of every parameter by name; `batch` gives shapes only."""
    return {tree.name_of(path): box.names for path, box in _named_boxes(_abstract_boxes(config, batch))}


def initial_values(config: Config, batch: Batch) -> dict[str, tuple[float, float]]:
    """Mean and standard deviation of each parameter's initial values, by name, from its initializer."""
    boxes = _named_boxes(_abstract_boxes(config, batch))
    return {tree.name_of(path): _mean_and_std(box) for path, box in boxes}


def _mean_and_std(box: Parameter) -> tuple[float, float]:
    if box.pattern is None:
        return box.mean, box.std
    values = box.pattern(box.value.shape[-2:])
    return float(values.mean()), float(values.std())


def _named_boxes(boxes: Tree) -> list[tuple[tuple, nn.LogicallyPartitioned]]:
    return jax.tree_util.tree_leaves_with_path(boxes, is_leaf=is_box)


def _abstract_boxes(config: Config, batch: Batch) -> Tree:
    """Shapes of `init_params`, in boxes with their logical axes and keys."""
    return _traced_boxes(config, batch)[0]


def _traced_boxes(config: Config, batch: Batch) -> tuple[Tree, Callable]:
    """Those, and a function of the key of all parameters: the key of each random one by name."""
    row_types = tuple(None if x is None else (x.shape[1:], np.dtype(x.dtype)) for x in batch)
    return _trace_boxes(config.of_model(), row_types)


@lru_cache(maxsize=32)
def _trace_boxes(config: Config, row_types: tuple) -> tuple[Tree, Callable]:
    """Trace `_boxes` once in a process; `row_types`: (row shape, dtype) or None, by field of the batch."""
    batch = Batch(*(kind and jax.ShapeDtypeStruct((1, *kind[0]), kind[1]) for kind in row_types))
    return traced(lambda key: _boxes(config, batch, key), jax.eval_shape(jax.random.key, 0).dtype)


def new_state(
    config: Config,
    batch: Batch,
    abstract: TrainState,
    params: Mapping[str, jax.Array] | None = None,
    base: Tree | None = None,
) -> TrainState:
    """Make the state before the first step, each leaf with the sharding in `abstract`.

    Args:
        config: resolved on the mesh of `abstract`.
        batch: gives shapes only.
        abstract: shape, dtype and sharding of every leaf of the state.
        params: parameters by name that exist already and become part of the state; the others are random. Random
            values depend on config, seed and name only.
        base: of a LoRA run; by default random.
    """
    shardings = shardings_of(abstract)
    wanted, given = tree.flatten(shardings.params), params or {}
    missing = {name: sharding for name, sharding in wanted.items() if name not in given}
    random = random_params(config, batch, jax.random.key(config.seed), missing)
    base = _random_base(config, batch, abstract) if base is None else base
    leaves = [given[name] if name in given else random[name] for name in wanted]
    with jax.set_mesh(mesh_of(abstract)):
        whole = jax.tree.unflatten(jax.tree.structure(abstract.params), leaves)
        axes = parameter_axes(config, batch)
        rest = jax.jit(
            lambda params: _first_state(config, params, axes)._replace(params=None),
            out_shardings=shardings._replace(params=None, base=None),
        )
        return rest(whole)._replace(params=whole, base=base)


def _random_base(config: Config, batch: Batch, abstract: TrainState) -> Tree | None:
    """The base of a LoRA run that has no weights to begin with, such as one whose memory is measured."""
    if abstract.base is None:
        return None
    places = {name: leaf.sharding for name, leaf in tree.flatten(abstract.base).items()}
    names, key, leaves = lora.base_names(abstract.base), jax.random.key(config.seed), {}
    for name in names:
        drawn = random_params(config, batch, key, {name: places[name]})[name]
        leaves |= lora.stored(config.lora, name, drawn.astype(jnp.float32), places)
    return tree.nested(leaves)


def model_params(state: TrainState, *, average: bool = False) -> Tree:
    """The parameters that the model takes; with `average` their moving average, if the run has one."""
    trained = state.ema if average and state.ema is not None else state.params
    return tree.merged(state.base, trained)


def shardings_of(abstract: TrainState) -> TrainState:
    return jax.tree.map(lambda leaf: leaf.sharding, abstract)


def mesh_of(abstract: TrainState) -> Mesh:
    return abstract.step.sharding.mesh
