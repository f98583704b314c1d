"""The parts of a Transformer other than attention: dense projections, norms, MLP, embeddings, positions.

Parameters are float32 and named; each dim has a logical axis (`mesh.RULES`). Computation runs in `ModelConfig.dtype`
except where precision counts (norms, logits). Used by `attention` and `transformer`.

Numerics follow T5 (Raffel et al. 2020, and Mesh TensorFlow's initialisers), GPT-2, Llama and BERT where the config says
so.
"""

import dataclasses
import math
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from t5like.config import ModelConfig
from t5like.mesh import constrain, context_size
from t5like.model import cpu, tpu

BAND = 128  # rows of a relative bias that are laid out at once: what a TPU's registers are wide
MATMUL = {"auto": jnp.matmul, "plain": jnp.matmul, "cpu": cpu.matmul}  # by ModelConfig.kernels; tpu: `tpu.products`


def normal(std: float, axes: tuple[str, ...]):
    """An initialiser: N(0, std) in float32, its dims named."""
    return nn.with_logical_partitioning(nn.initializers.normal(std), axes)


def kernel_init(config: ModelConfig, fan_in: int, axes: tuple[str, ...], *, residual: bool = False, scale: float = 1.0):
    """The initialiser of a dense kernel.

    Args:
        config: `init` chooses the family.
        fan_in: inputs of each output.
        axes: logical axes of the two dims.
        residual: whether the output is added to the residual stream (GPT-2 makes those smaller, by depth).
        scale: factor on T5's standard deviation.
    """
    if config.init == "bert":
        return normal(0.02, axes)  # initializer_range of BERT's released code, which also cuts N off at two deviations
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

    def __call__(self, x: jax.Array) -> jax.Array:
        return projections((x, self))[0]

    @nn.compact
    def weights(self, inputs: int) -> tuple[jax.Array, jax.Array | None]:
        """The kernel and, if there is one, the bias, in the dtype of computation."""
        config, bias = self.config, None
        init = kernel_init(config, inputs, self.axes, residual=self.residual, scale=self.scale)
        kernel = self.param("kernel", init, (inputs, self.features), jnp.float32).astype(config.dtype)
        if config.biases:
            zeros = nn.with_logical_partitioning(nn.initializers.zeros, self.axes[1:])
            bias = self.param("bias", zeros, (self.features,), jnp.float32).astype(config.dtype)
        return kernel, bias


def projections(*pairs: tuple[jax.Array, Dense]) -> tuple[jax.Array, ...]:
    """Projections that belong together, each of an input by its layer; all layers have one config."""
    inputs, layers = zip(*pairs, strict=True)
    kernels, biases = zip(*(layer.weights(x.shape[-1]) for x, layer in pairs), strict=True)
    matmul = MATMUL.get(layers[0].config.kernels)
    outputs = tuple(map(matmul, inputs, kernels)) if matmul else tpu.products(inputs, kernels)
    return tuple(
        y if bias is None else y + jnp.broadcast_to(bias, y.shape) for y, bias in zip(outputs, biases, strict=True)
    )


class Norm(nn.Module):
    """RMS norm (Zhang & Sennrich 2019; T5: no bias, no mean) or layer norm, in float32 whatever the dtype."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x_BLD: jax.Array) -> jax.Array:
        config, dim = self.config, x_BLD.shape[-1]
        scale = self.param("scale", nn.with_logical_partitioning(nn.initializers.ones, ("norm",)), (dim,), jnp.float32)
        x = x_BLD.astype(jnp.float32)
        if config.norm == "layer":
            x = x - x.mean(-1, keepdims=True)
        y = (
            x
            * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + config.norm_epsilon)
            * jnp.broadcast_to(scale, x.shape)
        )
        if config.norm == "layer":
            bias = self.param(
                "bias", nn.with_logical_partitioning(nn.initializers.zeros, ("norm",)), (dim,), jnp.float32
            )
            y = y + jnp.broadcast_to(bias, y.shape)
        return y.astype(config.dtype)


ACTIVATIONS = {
    "relu": jax.nn.relu,
    "gelu": jax.nn.gelu,
    "gelu_exact": partial(jax.nn.gelu, approximate=False),
    "gated_gelu": jax.nn.gelu,
    "gated_silu": jax.nn.silu,
}


class Mlp(nn.Module):
    """The position-wise network: out(act(in(x))), or out(act(gate(x)) * in(x)) (Shazeer 2020) when gated."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x_BLD: jax.Array, *, train: bool) -> jax.Array:
        config = self.config
        wide = Dense(config, config.mlp_dim, ("embed", "mlp"), name="in")
        activate = ACTIVATIONS[config.mlp]
        if config.mlp.startswith("gated"):
            gate = Dense(config, config.mlp_dim, ("embed", "mlp"), name="gate")
            gate_BLF, wide_BLF = projections((x_BLD, gate), (x_BLD, wide))
            if config.kernels == "tpu":
                gate_BLF, wide_BLF = tpu.apart(gate_BLF), tpu.apart(wide_BLF)
            h_BLF = activate(gate_BLF) * wide_BLF
        else:
            h_BLF = activate(wide(x_BLD))
        h_BLF = dropout(self, constrain(h_BLF, "batch", "length", "act_mlp"), config.dropout_rate, train=train)
        return Dense(config, config.model_dim, ("mlp", "embed"), residual=True, name="out")(h_BLF)


class MlmTransform(nn.Module):
    """What BERT's masked-language-model head does before the vocabulary: norm(act(dense(x))), D -> D.

    Its activation and its norm are those of the layers, as in BERT's released code.
    """

    config: ModelConfig

    @nn.compact
    def __call__(self, x_BLD: jax.Array) -> jax.Array:
        dense = Dense(self.config, self.config.model_dim, ("embed", "features"), name="dense")
        y_BLD = Norm(self.config, name="norm")(ACTIVATIONS[self.config.mlp](dense(x_BLD)))
        return constrain(y_BLD, "batch", "length", "act_embed")


class PairClassifier(nn.Module):
    """BERT's pooler and next-sentence classifier: classes(tanh(pooler(first token))), the classes in float32.

    Classes as in BERT's released code: 0, the second text follows the first; 1, it does not.
    """

    config: ModelConfig

    @nn.compact
    def __call__(self, x_BSD: jax.Array) -> jax.Array:
        """The output of the encoder [B, S, D] -> float32 logits [B, 2]."""
        pooler = Dense(self.config, self.config.model_dim, ("embed", "features"), name="pooler")
        precise = dataclasses.replace(self.config, dtype="float32")
        classes = Dense(precise, 2, ("embed", "classes"), name="classes")
        return classes(jnp.tanh(pooler(x_BSD[:, 0])).astype(jnp.float32))


def dropout(module: nn.Module, x: jax.Array, rate: float, *, train: bool) -> jax.Array:
    """Dropout with the module's `dropout` random stream; x itself when evaluating or at rate 0."""
    if not train or rate == 0:
        return x
    keep = jax.random.bernoulli(module.make_rng("dropout"), 1 - rate, x.shape)
    return jnp.where(keep, x / (1 - rate), 0)


def embed(table_VD: jax.Array, ids: jax.Array, dtype: str) -> jax.Array:
    """Rows of the table [V, D] for any shape of ids.

    The cast comes before the look-up, so that fewer bytes move; under fsdp the table's columns are gathered first,
    because the compiler would otherwise move the (larger) result.
    """
    return jnp.take(constrain(table_VD.astype(dtype), "vocab", None), ids, axis=0)


def scales_logits(config: ModelConfig) -> bool:
    """Whether logits are multiplied by model_dim**-0.5."""
    if config.logits_scale == "auto":
        return config.tied_embeddings and config.init == "t5"
    return config.logits_scale == "model_dim"


@jax.custom_vjp
def project_to_vocabulary(x_BLD: jax.Array, kernel_DV: jax.Array) -> jax.Array:
    """Float32 logits from operands of any dtype; the backward matmuls run in the operands' dtype again.

    Plain autodiff would multiply the float32 gradient of the logits by bfloat16 operands, at float32's cost.
    """
    return jnp.einsum("BLD,DV->BLV", x_BLD, kernel_DV, preferred_element_type=jnp.float32)


def _vocabulary_forward(x_BLD, kernel_DV):
    return project_to_vocabulary(x_BLD, kernel_DV), (x_BLD, kernel_DV)


def _vocabulary_backward(saved, gradient_BLV):
    x_BLD, kernel_DV = saved
    gradient_BLV = gradient_BLV.astype(x_BLD.dtype)
    return jnp.einsum("BLV,DV->BLD", gradient_BLV, kernel_DV), jnp.einsum("BLD,BLV->DV", x_BLD, gradient_BLV)


project_to_vocabulary.defvjp(_vocabulary_forward, _vocabulary_backward)


def relative_buckets(distance: np.ndarray, *, buckets: int, max_distance: int, bidirectional: bool) -> np.ndarray:
    """The bucket of each distance key - query (Raffel et al. 2020, section 2.1; Mesh TensorFlow's formula).

    Half of the buckets are exact distances, the other half grow logarithmically up to `max_distance`; beyond it all
    share the last. Bidirectional: half of all buckets for keys before the query, half for keys after it. With 32
    buckets and 128: distances -200, -9, -1, 0, 1, 9, 200 -> 15, 8, 1, 0, 17, 24, 31.
    """
    first = np.zeros_like(distance)
    if bidirectional:
        buckets //= 2
        first = np.where(distance > 0, buckets, 0)
        distance = np.abs(distance)
    else:
        distance = np.maximum(-distance, 0)
    exact = buckets // 2
    # float32 and its epsilon, as upstream: at exact powers the rounding decides the bucket.
    ratio = np.maximum(distance, 1).astype(np.float32) / exact + np.finfo(np.float32).eps
    log = np.log(ratio) / np.float32(math.log(max_distance / exact))
    large = np.minimum(exact + (log * (buckets - exact)).astype(np.int32), buckets - 1)
    return (first + np.where(distance < exact, distance, large)).astype(np.int32)


class RelativeBias(nn.Module):
    """T5's learned bias on attention scores: one number per head and bucket of relative distance."""

    config: ModelConfig
    bidirectional: bool

    @nn.compact
    def __call__(
        self, queries: int, keys: int, *, first_query: jax.Array | int = 0, fork: int | None = None
    ) -> jax.Array:
        """The bias [1, N, L, S] for queries at first_query, first_query + 1, ... and keys at 0, 1, ...

        From place `fork` on, each L keys that follow each other stand at the same position, as the queries do.

        The bias depends on key - query only, so there are L + S - 1 different columns; they are looked up once and
        laid out by a shift per row. The backward pass sums along diagonals instead of scattering L * S values.
        """
        config = self.config
        table_RN = self.param(
            "table",
            normal(config.model_dim**-0.5, ("buckets", "heads")),
            (config.relative_buckets, config.num_heads),
            jnp.float32,
        )
        if fork is None:
            return self._bias(table_RN, queries, keys, first_query)
        positions = fork + (keys - fork) // queries
        bias_1N1S = self._bias(table_RN, 1, positions, fork + (first_query - fork) // queries)
        forked_1N1S = jnp.repeat(bias_1N1S[..., fork:], queries, axis=-1)
        bias_1N1S = jnp.concatenate([bias_1N1S[..., :fork], forked_1N1S], axis=-1)
        return jnp.broadcast_to(bias_1N1S, (*bias_1N1S.shape[:2], queries, keys))

    def _bias(self, table_RN: jax.Array, queries: int, keys: int, first_query: jax.Array | int) -> jax.Array:
        if isinstance(first_query, int):
            distance = np.arange(keys + queries - 1) - (queries - 1) - first_query
            buckets = self._buckets(distance)
        else:  # a decoding step: the distances are known only on the device, their buckets already here
            known = self._buckets(np.arange(-(queries - 1) - (keys - 1), keys))
            buckets = jax.lax.dynamic_slice(jnp.asarray(known), (keys - 1 - first_query,), (keys + queries - 1,))
        diagonals_N = table_RN[buckets].T  # [N, L + S - 1]; entry i is distance i - (L - 1)
        parts = context_size()
        if parts == 1 or queries % parts:
            return shift_rows(diagonals_N, queries, keys)[None].astype(self.config.dtype)
        # Each device lays out the rows of its own queries; the whole would be L x S numbers on every one of them.
        rows = queries // parts
        windows = jnp.stack(
            [
                diagonals_N[:, first : first + rows + keys - 1]
                for first in range(queries - rows, -1, -rows)  # of the first queries, of the next ones, ...
            ]
        )
        windows = constrain(windows, "parts", "act_heads", None)
        bias = jax.vmap(partial(shift_rows, rows=rows, columns=keys))(windows)  # [parts, N, rows, S]
        bias = constrain(bias, "parts", "act_heads", None, None).transpose(1, 0, 2, 3)
        bias_1NLS = bias.reshape(1, self.config.num_heads, queries, keys).astype(self.config.dtype)
        return constrain(bias_1NLS, None, "act_heads", "length", None)

    def _buckets(self, distance: np.ndarray) -> np.ndarray:
        config = self.config
        return relative_buckets(
            distance,
            buckets=config.relative_buckets,
            max_distance=config.relative_max_distance,
            bidirectional=self.bidirectional,
        )


def shift_rows(diagonals: jax.Array, rows: int, columns: int) -> jax.Array:
    """[N, rows + columns - 1] -> [N, rows, columns] with out[n, i, j] = diagonals[n, j - i + rows - 1].

    For 2 rows and 3 columns, a b c d -> b c d / a b c. Repeating the vector, one longer than itself, and cutting the
    repetition into rows shifts each row by one: only reshapes, so the gradient is cheap as well. Where there are many
    rows, those of one band are made so, long enough for all bands, which are then parts of it: cut at multiples of its
    size, they cost a TPU no shuffling (2,048 x 2,048: 2 GiB of temporaries instead of 5, 6 s to compile instead of 34).
    """
    if rows > BAND and rows % BAND == 0:
        band = shift_rows(diagonals, BAND, rows + columns - BAND)
        return jnp.concatenate([band[:, :, at : at + columns] for at in range(rows - BAND, -1, -BAND)], axis=1)
    heads, width = diagonals.shape
    padded = jnp.pad(diagonals, ((0, 0), (0, 1)))  # width + 1 entries a row
    tiled = jnp.broadcast_to(padded[:, None], (heads, rows, width + 1)).reshape(heads, rows * (width + 1))
    shifted = tiled[:, : rows * width].reshape(heads, rows, width)  # row i starts i entries earlier in the vector
    return shifted[:, :, rows - 1 : rows - 1 + columns]


def rotary_frequencies(config: ModelConfig) -> tuple[np.ndarray, float]:
    """Radians per token of each pair of a head's dims, float32 [H / 2], and the factor on queries and keys.

    A frequency f makes t = rotary_original_length * f / 2 pi turns in a text of the original length. llama3 (Llama
    3.1's released code): f for t > rotary_high, f / rotary_factor for t < rotary_low, between them both, mixed linearly
    by t. yarn (Peng et al. 2023, section 3): the same with a mixture that is linear in the pair's index, from the first
    that turns fewer than rotary_fast times, rounded down, to the one that turns rotary_slow times, rounded up; and
    queries and keys are scaled.
    """
    half = config.head_dim // 2
    frequency = config.rotary_base ** (-np.arange(half, dtype=np.float32) / half)
    if config.rotary_scaling == "none":
        return frequency, 1.0
    low, scale = frequency / np.float32(config.rotary_factor), 1.0
    if config.rotary_scaling == "linear":
        return low, scale
    if config.rotary_scaling == "llama3":
        turns = config.rotary_original_length * frequency / np.float32(2 * math.pi)
        kept = (turns - config.rotary_low) / (config.rotary_high - config.rotary_low)
    else:

        def index_of(turns: float) -> float:  # of the pair that turns so often, as a real number
            ratio = config.rotary_original_length / (turns * 2 * math.pi)
            return half * math.log(ratio) / math.log(config.rotary_base)

        first = max(math.floor(index_of(config.rotary_fast)), 0)
        last = min(math.ceil(index_of(config.rotary_slow)), config.head_dim - 1)
        kept = 1 - (np.arange(half) - first) / max(last - first, 0.001)
        scale = config.rotary_attention or 0.1 * math.log(max(config.rotary_factor, 1.0)) + 1.0
    kept = np.clip(kept, 0, 1).astype(np.float32)
    return frequency * kept + low * (1 - kept), scale


def rotate(x_BLNH: jax.Array, positions_BL: jax.Array, config: ModelConfig) -> jax.Array:
    """Rotary positions (Su et al. 2021) in Llama's layout: the first and second half of H form the pairs."""
    frequency, scale = rotary_frequencies(config)
    angle_BL1H = positions_BL[:, :, None, None].astype(jnp.float32) * frequency[None, None, None]
    cos, sin = jnp.cos(angle_BL1H), jnp.sin(angle_BL1H)
    if scale != 1:
        cos, sin = cos * scale, sin * scale
    first, second = jnp.split(x_BLNH.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x_BLNH.dtype)
