"""Matmuls for TPU, with backward passes that are ordered so that collectives overlap with them. Used by `layers`."""

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from t5like.sharding.logical_axes import batch_parts, device_kind

# Chips on which the backward pass of a matmul waits for the one before it: those that overlap a collective with one
# matmul. Where sparse cores run collectives, one may take longer than a matmul, and waiting costs more than it saves.
SERIALIZED_BACKWARD_CHIPS = ("TPU v5 lite",)


@jax.custom_vjp
def gradient_barrier(x: jax.Array) -> jax.Array:
    """Return x; its gradient is written to memory before it is used.

    The gradient of each of a gated MLP's two inputs goes into two matmuls. Without the barrier libtpu fuses the
    activation's derivative into all of them, which then reach 47 to 69 % of the peak (Llama 2 7B on v5e,
    benchmarks/RESULTS.md).
    """
    return x


gradient_barrier.defvjp(lambda x: (x, None), lambda _, gradient: (jax.lax.optimization_barrier(gradient),))


def matmuls(inputs: tuple[jax.Array, ...], kernels: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
    """Each input [..., D] times its kernel [D, F]; with serialized backward matmuls where that is faster."""
    return (_serialized_matmuls if _serializes_backward() else _plain_matmuls)(inputs, kernels)


def _plain_matmuls(inputs: tuple[jax.Array, ...], kernels: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
    return tuple(jnp.matmul(x, kernel) for x, kernel in zip(inputs, kernels, strict=True))


def _serializes_backward() -> bool:
    """Whether there are collectives to overlap, on chips that overlap them in this way.

    Not where the mesh axis `tensor` splits the kernels: the gradient of x would be reduced for each of them, instead of
    once for all.
    """
    sizes = jax.sharding.get_abstract_mesh().shape
    return device_kind() in SERIALIZED_BACKWARD_CHIPS and batch_parts() > 1 and sizes["tensor"] == 1


@jax.custom_vjp
def _serialized_matmuls(inputs: tuple[jax.Array, ...], kernels: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
    """Matmuls whose kernels' gradients are computed and reduced one after another.

    With fsdp each kernel is gathered and its gradient reduced over all devices; these collectives run one at a time,
    each overlapped with a matmul (`sharding.xla_options`). By default libtpu gathers the kernels early and computes
    their gradients late, when no matmul is left to overlap with a reduction. Here a kernel is gathered while its
    gradient is computed, and that gradient is reduced while the gradient of its input is computed.
    """
    return _plain_matmuls(inputs, kernels)


def _serialized_matmuls_backward(saved, gradients):
    d_inputs, d_kernels, previous, free = [], [], None, PartitionSpec.UNCONSTRAINED
    copies = jax.sharding.get_abstract_mesh().shape["data"]
    by_copy = lambda rows: rows.reshape(copies, rows.shape[0] // copies, *rows.shape[1:])
    for x, kernel, gradient in zip(*saved, gradients, strict=True):
        previous, kernel, gradient = jax.lax.optimization_barrier((previous, kernel, gradient))
        # Each copy of the parameters (axis `data`) has its own gradient here, so that no matmul waits for their sum.
        d_copies = jnp.einsum("C...D,C...F->CDF", by_copy(x), by_copy(gradient))
        d_copies = jax.lax.with_sharding_constraint(d_copies, PartitionSpec("data", free, free))
        previous, d_copies = jax.lax.optimization_barrier((jnp.einsum("...F,DF->...D", gradient, kernel), d_copies))
        d_inputs.append(previous)
        d_kernels.append(d_copies.sum(0))
    return tuple(d_inputs), tuple(d_kernels)


# The forward pass is `_plain_matmuls` itself: jax.checkpoint's policies do not look inside a custom_vjp.
_serialized_matmuls.defvjp(lambda *operands: (_plain_matmuls(*operands), operands), _serialized_matmuls_backward)
