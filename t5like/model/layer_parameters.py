"""The parameters of a stack before training: boxes, which have the key of each random parameter of each layer.

A block's initialization is traced once in a process, and without the stack's `vmap`: both take longer than the rest of
a model's initialization. Called by `stack`, and `traced` also by `train_state`.
"""

from collections.abc import Callable
from functools import lru_cache, partial

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.extend.core import jaxpr_as_fun
from jax.interpreters.partial_eval import dce_jaxpr
from jax.sharding import AbstractMesh

from t5like import tree
from t5like.config.model_schema import ModelConfig
from t5like.model.attention_plan import AttentionPlan
from t5like.model.block import Block, LayerInputs
from t5like.model.layers import Parameter, is_box
from t5like.model.masks import MaskSpec
from t5like.types import Tree


def initialized(block: Block, num_layers: int, cross_dim: int, key: jax.Array) -> Tree:
    """The boxes of Y layers, each initialized from its own key; every leaf has a leading dim `layers`."""
    keys_Y = jax.random.split(key, num_layers)
    boxes, keys_of = _of_a_layer(block.config, block.cross, block.causal, cross_dim, keys_Y.dtype)
    keys = jax.vmap(keys_of)(keys_Y)

    def stacked(path: tuple, box: Parameter) -> Parameter:
        value = jnp.full((num_layers, *box.value.shape), box.mean, box.value.dtype)
        return box.replace(value=value, key=keys.get(tree.name_of(path))).add_axis(0, {nn.PARTITION_NAME: "layers"})

    return jax.tree.map_with_path(stacked, boxes, is_leaf=is_box)


@lru_cache(maxsize=64)
def _of_a_layer(
    config: ModelConfig, cross: bool, causal: bool, cross_dim: int, key_type: jnp.dtype
) -> tuple[Tree, Callable]:
    """`traced` of a block."""
    init = partial(Block(config, cross, causal, parent=None).init, plan=AttentionPlan(1, 1))

    def boxes(key: jax.Array) -> Tree:
        x_BLD = jnp.zeros((1, 1, config.model_dim), config.dtype)
        encoded_BSD = jnp.zeros((1, 1, cross_dim), x_BLD.dtype) if cross_dim else None
        inputs = LayerInputs(None, MaskSpec(), jnp.zeros((1, 1), jnp.int32), encoded_BSD)
        return init(key, x_BLD, inputs)["params"]

    return traced(boxes, key_type)


def traced(make: Callable[[jax.Array], Tree], key_type: jnp.dtype) -> tuple[Tree, Callable]:
    """Boxes of shapes, and a function of the key that `make` takes: the key of each random parameter by name.

    The function computes nothing else. Outside of `jit` nothing is compiled but the hash of a key: a program for all
    would repeat it for each parameter, and take longer to compile than to draw all values.
    """
    with jax.sharding.use_abstract_mesh(AbstractMesh((), ())):  # it must not depend on the caller's mesh
        jaxpr, boxes = jax.make_jaxpr(make, return_shape=True)(jax.ShapeDtypeStruct((), key_type))
    is_key = [jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) for leaf in jax.tree.leaves(boxes)]
    used, _ = dce_jaxpr(jaxpr.jaxpr, is_key, instantiate=True)  # nothing that computes with parameters
    function = jaxpr_as_fun(jaxpr.replace(jaxpr=used))
    named = jax.tree_util.tree_leaves_with_path(boxes, is_leaf=is_box)
    names = [tree.name_of(path) for path, box in named if box.key is not None]
    return boxes, lambda key: dict(zip(names, function(key), strict=True))
