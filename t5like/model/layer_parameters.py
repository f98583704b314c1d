"""The parameters of a stack before training: boxes, which have the key of each random parameter of each layer.

A block's initialization is traced once in a process, and without the stack's `vmap`: both take longer than the rest of
a model's initialization. Called by `stack`.
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
    """Boxes of shapes, and a function of a layer's key: the key of each random parameter by name."""
    init, made = partial(Block(config, cross, causal, parent=None).init, plan=AttentionPlan(1, 1)), []

    def keys_of(key: jax.Array) -> dict[str, jax.Array]:
        x_BLD = jnp.zeros((1, 1, config.model_dim), config.dtype)
        encoded_BSD = jnp.zeros((1, 1, cross_dim), x_BLD.dtype) if cross_dim else None
        inputs = LayerInputs(None, MaskSpec(), jnp.zeros((1, 1), jnp.int32), encoded_BSD)
        boxes = init(key, x_BLD, inputs)["params"]
        shape_of = lambda box: box.replace(value=jax.ShapeDtypeStruct(box.value.shape, box.value.dtype), key=None)
        made.append(jax.tree.map(shape_of, boxes, is_leaf=is_box))
        named = jax.tree_util.tree_leaves_with_path(boxes, is_leaf=is_box)
        return {tree.name_of(path): box.key for path, box in named if box.key is not None}

    with jax.sharding.use_abstract_mesh(AbstractMesh((), ())):  # it must not depend on the caller's mesh
        traced, keys = jax.make_jaxpr(keys_of, return_shape=True)(jax.ShapeDtypeStruct((), key_type))
    used, _ = dce_jaxpr(traced.jaxpr, [True] * len(keys), instantiate=True)  # nothing that computes with parameters
    function = jaxpr_as_fun(traced.replace(jaxpr=used))
    return made[0], lambda key: dict(zip(keys, function(key), strict=True))
