"""Logical axes: the names of the dims of parameters and activations, and the mesh axes that split each of them.

An *axis* belongs to the mesh, a *dim* to a tensor, and a *logical axis* is the name of a dim (as in T5X and MaxText).
The model names the dims of its parameters and calls `constrain` on activations; `RULES` maps each name to mesh axes;
`jax.jit` inserts the communication.
"""

import math
from collections.abc import Sequence

import jax
from jax.sharding import PartitionSpec

# Logical axis -> mesh axes. Parameters above, activations below.
RULES: dict[str, str | tuple[str, ...] | None] = {
    "vocab": "tensor",
    "embed": "fsdp",
    "mlp": "tensor",
    "heads": "tensor",  # query heads and their head_dim, joined
    "kv_heads": "tensor",
    "layers": None,
    "norm": None,
    "buckets": None,
    "positions": None,
    "token_types": None,
    "features": None,  # of BERT's heads, D -> D: too little work for a second split
    "classes": None,
    "batch": ("data", "fsdp"),
    "length": "context",
    "parts": "context",  # a dim with one entry for each shard of a split length
    "act_embed": None,
    "act_mlp": "tensor",
    "act_heads": "tensor",
    "act_vocab": "tensor",
}


def spec(logical: Sequence[str | None], shape: Sequence[int] | None = None) -> PartitionSpec:
    """The PartitionSpec of a tensor whose dims have these logical axes.

    With its shape, a length that `context` does not divide is not split (such as T5's 114 targets with 512 inputs).
    """
    if shape is not None:
        assert len(logical) == len(shape), (logical, shape)
        unsplit = lambda name, size: name == "length" and size % context_size() > 0
        logical = [None if unsplit(name, size) else name for name, size in zip(logical, shape, strict=True)]
    return PartitionSpec(*(None if name is None else RULES[name] for name in logical))


def constrain(x: jax.Array, *logical: str | None) -> jax.Array:
    """Constrain the sharding of an activation; without a mesh (`jax.set_mesh`) return it unchanged."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return x
    return jax.lax.with_sharding_constraint(x, spec(logical, x.shape))


def context_size() -> int:
    """The number of devices that split the length of a row, in the mesh of this trace; 1 without a mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty else mesh.shape["context"]


def batch_parts() -> int:
    """The number of devices that split the rows of a batch, in the mesh of this trace; 1 without a mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty else math.prod(mesh.shape[axis] for axis in RULES["batch"])


def device_kind() -> str:
    """JAX's device kind of the mesh of this trace; empty if it is unknown."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return device.device_kind if device else ""
