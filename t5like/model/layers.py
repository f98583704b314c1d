"""Dense projections, norms, dropout and initializers.

Parameters are float32; each dim has a logical axis (`logical_axes.RULES`). Computation runs in `ModelConfig.dtype`
except where precision matters (norms, logits). Used by all other modules of `model`.

Numerics follow T5 (Raffel et al. 2020, and Mesh TensorFlow's initializers), GPT-2, Llama and BERT, as the config
selects.
"""

import math
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct

from t5like.config.model_schema import ModelConfig
from t5like.model import adapters
from t5like.model.initial_attention import Pattern, with_pattern
from t5like.model.kernels import cpu, tpu_matmul

# By ModelConfig.kernels; for tpu `tpu_matmul.matmuls`.
MATMUL = {"auto": jnp.matmul, "plain": jnp.matmul, "cpu": cpu.matmul}


@struct.dataclass
class Parameter(nn.LogicallyPartitioned):
    """The box of a parameter: a logical axis for each dim, mean and standard deviation of its initial values.

    `key` is that of a random parameter, or of each layer's. The model does not draw the values: a new random parameter
    is zero in its box, and `train_state` draws it by `key`. Each layer of a parameter with a `pattern` begins as that.
    """

    mean: float = struct.field(default=0.0, pytree_node=False)
    std: float = struct.field(default=0.0, pytree_node=False)
    pattern: Pattern | None = struct.field(default=None, pytree_node=False)
    key: jax.Array | None = None


def is_box(node: object) -> bool:
    """Whether a node of a tree is the box of a parameter, for `is_leaf`."""
    return isinstance(node, Parameter)


def normal(std: float, axes: tuple[str, ...]):
    """An initializer: N(0, std) in float32, with a logical axis for each dim."""
    return lambda key, shape, dtype: Parameter(jnp.zeros(shape, dtype), axes, std=std, key=key)


def constant(value: float, axes: tuple[str, ...]):
    """An initializer: one value, with a logical axis for each dim."""
    return lambda *arguments: Parameter(nn.initializers.constant(value)(*arguments), axes, mean=value)


def parameter(module: nn.Module, name: str, init: Callable, shape: tuple[int, ...]) -> jax.Array:
    """A float32 parameter of a module; `init` makes it where it does not exist.

    `Module.param` alone would trace the initialization at each call, to compare shapes: a sixth of the time of tracing
    a step.
    """
    if not module.has_variable("params", name):
        return module.param(name, init, shape, jnp.float32)
    value = nn.meta.unbox(module.get_variable("params", name))
    if value.shape != shape:
        raise ValueError(f"{'/'.join(module.path)}/{name} has shape {value.shape}, not {shape}")
    return value


def kernel_init(config: ModelConfig, fan_in: int, axes: tuple[str, ...], *, residual: bool = False, scale: float = 1.0):
    """The initializer of a dense kernel.

    Args:
        config: its `init` selects the family.
        fan_in: inputs of each output.
        axes: logical axes of the two dims.
        residual: whether the output is added to the residual stream (GPT-2 scales these kernels down with depth).
        scale: factor on T5's standard deviation.
    """
    if config.init == "bert":
        return normal(0.02, axes)  # initializer_range of BERT's released code, which also truncates N at two deviations
    if config.init == "gpt2":
        # GPT-2 (Radford et al. 2019, section 2.3): N(0, 0.02), residual outputs scaled by 1/sqrt(number of sublayers).
        return normal(0.02 / math.sqrt(2 * config.num_layers) if residual else 0.02, axes)
    return normal(scale * fan_in**-0.5, axes)


class Dense(nn.Module):
    """A projection of the last dim: kernel [inputs, features] and, if the config has biases, bias [features]."""

    config: ModelConfig
    features: int
    axes: tuple[str, str]
    residual: bool = False
    scale: float = 1.0
    pattern: Pattern | None = None

    def __call__(self, x: jax.Array) -> jax.Array:
        return projections((x, self))[0]

    @nn.compact
    def weights(self, inputs: int) -> tuple[jax.Array, jax.Array | None]:
        """The kernel, and the bias or None, in the dtype of computation."""
        config, bias = self.config, None
        init = kernel_init(config, inputs, self.axes, residual=self.residual, scale=self.scale)
        kernel = parameter(self, "kernel", with_pattern(init, self.pattern), (inputs, self.features))
        if config.biases:
            bias = parameter(self, "bias", constant(0.0, self.axes[1:]), (self.features,)).astype(config.dtype)
        return kernel.astype(config.dtype), bias


def projections(*pairs: tuple[jax.Array, Dense]) -> tuple[jax.Array, ...]:
    """Project each input by its layer, with backward passes scheduled together; all layers have one config."""
    inputs, layers = zip(*pairs, strict=True)
    kernels, biases = zip(*(layer.weights(x.shape[-1]) for x, layer in pairs), strict=True)
    matmul = MATMUL.get(layers[0].config.kernels)
    if any(map(adapters.is_adapted, layers)):  # the schedule of `tpu_matmul` is that of kernels' gradients
        matmul = matmul or jnp.matmul
    outputs = tuple(map(matmul, inputs, kernels)) if matmul else tpu_matmul.matmuls(inputs, kernels)
    outputs = tuple(map(adapters.adapted, layers, inputs, outputs))
    return tuple(
        y if bias is None else y + jnp.broadcast_to(bias, y.shape) for y, bias in zip(outputs, biases, strict=True)
    )


class Norm(nn.Module):
    """RMS norm (Zhang & Sennrich 2019; T5: no bias, no mean) or layer norm, always in float32.

    With `norm_offset` the parameter is the factor minus 1 (Gemma's released code).
    """

    config: ModelConfig

    @nn.compact
    def __call__(self, x_BLD: jax.Array) -> jax.Array:
        config, dim = self.config, x_BLD.shape[-1]
        scale = parameter(self, "scale", constant(0.0 if config.norm_offset else 1.0, ("norm",)), (dim,))
        scale = 1 + scale if config.norm_offset else scale
        x = x_BLD.astype(jnp.float32)
        if config.norm == "layer":
            x = x - x.mean(-1, keepdims=True)
        y = (
            x
            * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + config.norm_epsilon)
            * jnp.broadcast_to(scale, x.shape)
        )
        if config.norm == "layer" and config.norm_bias:
            bias = parameter(self, "bias", constant(0.0, ("norm",)), (dim,))
            y = y + jnp.broadcast_to(bias, y.shape)
        return y.astype(config.dtype)


def dropout(module: nn.Module, x: jax.Array, rate: float, *, train: bool) -> jax.Array:
    """Dropout with the module's `dropout` random stream; x itself when evaluating or at rate 0."""
    if not train or rate == 0:
        return x
    keep = jax.random.bernoulli(module.make_rng("dropout"), 1 - rate, x.shape)
    return jnp.where(keep, x / (1 - rate), 0)
