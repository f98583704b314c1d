"""Low-rank adapters and int8 kernels of dense projections, as `layers.projections` applies them.

A projection whose parameters contain ``lora`` adds ``scale * (x A) B`` (LoRA, Hu et al. 2021, section 4.1). A kernel of
int8 has a factor for each output in ``kernel_scale``: x W = (x integers) * factors, so that no other kernel is ever in
memory. `optim.lora` makes both; a model without them computes what it would without this file.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct

from t5like.types import Array

LEVELS = 127  # int8 kernels use -127 to 127, which bfloat16 represents exactly


@struct.dataclass
class Adapter:
    """The adapter of a kernel, or of one in each layer; a node of the tree of parameters.

    Attributes:
        a: float32 [inputs, rank].
        b: float32 [rank, outputs].
        scale: `LoRAConfig.scale`.
    """

    a: Array
    b: Array
    scale: float = struct.field(pytree_node=False)

    def delta(self) -> jax.Array:
        """What is added to the kernel, float32 [inputs, outputs], with any leading dims."""
        return self.scale * jnp.matmul(self.a, self.b, precision="highest")


def is_adapted(module: nn.Module) -> bool:
    """Whether the kernel of a module has an adapter or is int8."""
    return module.has_variable("params", "lora") or module.has_variable("params", "kernel_scale")


def adapted(module: nn.Module, x: jax.Array, y: jax.Array) -> jax.Array:
    """The output y [..., outputs] of a module's kernel for x [..., inputs], with its factors and its adapter."""
    if module.has_variable("params", "kernel_scale"):
        y = y * jnp.broadcast_to(module.get_variable("params", "kernel_scale").astype(y.dtype), y.shape)
    if module.has_variable("params", "lora"):
        adapter = module.get_variable("params", "lora")
        y = y + adapter.scale * ((x @ adapter.a.astype(x.dtype)) @ adapter.b.astype(x.dtype))
    return y


def quantized(kernel: jax.Array) -> tuple[jax.Array, jax.Array]:
    """A float32 kernel [..., inputs, outputs] as int8 and float32 factors [..., outputs], rounded to nearest."""
    factors = jnp.maximum(jnp.abs(kernel).max(-2), 1e-30) / LEVELS
    return jnp.round(kernel / factors[..., None, :]).astype(jnp.int8), factors


def dequantized(kernel: jax.Array, factors: jax.Array) -> jax.Array:
    """The float32 kernel that an int8 kernel and its factors stand for."""
    return kernel.astype(jnp.float32) * factors[..., None, :]
