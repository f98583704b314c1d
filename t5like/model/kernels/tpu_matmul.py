"""Matrix products for TPU, with backward passes ordered so that communication overlaps them."""

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from t5like.sharding.logical_axes import batch_parts, device_kind

# Chips on which a product's backward pass waits for the one before it: those that move data inside products. Where
# sparse cores move it, that may take longer than a product, and waiting costs more than it brings.
SERIALIZED_BACKWARD_CHIPS = ("TPU v5 lite",)


@jax.custom_vjp
def gradient_barrier(x: jax.Array) -> jax.Array:
    """x, whose gradient is written to memory before it is used.

    The gradients of a gated MLP's two inputs each go into two products. libtpu puts the activation's derivative into
    all of them, which then reach 47 to 69 % of the peak (Llama 2 7B on v5e, benchmarks/RESULTS.md).
    """
    return x


gradient_barrier.defvjp(lambda x: (x, None), lambda _, gradient: (jax.lax.optimization_barrier(gradient),))


def products(inputs: tuple[jax.Array, ...], kernels: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
    """Each input [..., D] times its kernel [D, F]; where it pays, with a backward pass from one to the next."""
    return (_serialized_products if _serializes_backward() else _products)(inputs, kernels)


def _products(inputs: tuple[jax.Array, ...], kernels: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
    return tuple(jnp.matmul(x, kernel) for x, kernel in zip(inputs, kernels, strict=True))


def _serializes_backward() -> bool:
    """Whether there is something to hide, on chips that hide it so.

    Not where `tensor` splits the kernels: the gradient of x would be reduced for each, instead of once for all.
    """
    sizes = jax.sharding.get_abstract_mesh().shape
    return device_kind() in SERIALIZED_BACKWARD_CHIPS and batch_parts() > 1 and sizes["tensor"] == 1


@jax.custom_vjp
def _serialized_products(inputs: tuple[jax.Array, ...], kernels: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
    """Products whose kernels' gradients are formed and reduced one after the other.

    Under fsdp a kernel has to be gathered, and its gradient to be reduced over all devices, one transfer at a time and
    each inside a product (`compiler_options`). By itself libtpu gathers the kernels early and forms their gradients
    late, when no product is left for a reduction to hide in. Here a kernel is gathered while its gradient is formed,
    and that is reduced while the gradient of its input is.
    """
    return _products(inputs, kernels)


def _serialized_products_backward(saved, gradients):
    of_inputs, of_kernels, before, free = [], [], None, PartitionSpec.UNCONSTRAINED
    copies = jax.sharding.get_abstract_mesh().shape["data"]
    by_copy = lambda rows: rows.reshape(copies, rows.shape[0] // copies, *rows.shape[1:])
    for x, kernel, gradient in zip(*saved, gradients, strict=True):
        before, kernel, gradient = jax.lax.optimization_barrier((before, kernel, gradient))
        # Copies of the parameters, in other slices perhaps, have their own gradient here. No product waits for the sum.
        of_copies = jnp.einsum("C...D,C...F->CDF", by_copy(x), by_copy(gradient))
        of_copies = jax.lax.with_sharding_constraint(of_copies, PartitionSpec("data", free, free))
        before, of_copies = jax.lax.optimization_barrier((jnp.einsum("...F,DF->...D", gradient, kernel), of_copies))
        of_inputs.append(before)
        of_kernels.append(of_copies.sum(0))
    return tuple(of_inputs), tuple(of_kernels)


# The forward pass is `_products` itself: jax.checkpoint's policies don't see what is inside of a custom_vjp.
_serialized_products.defvjp(lambda *operands: (_products(*operands), operands), _serialized_products_backward)
