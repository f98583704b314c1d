"""T5's relative position bias. Called by `stack` and `block`; rotary positions are in `rotary`."""

import math
from collections.abc import Callable
from functools import partial
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from t5like.config.model_schema import ModelConfig
from t5like.model.attention_plan import AttentionPlan
from t5like.model.initial_attention import nearest_tokens, with_pattern
from t5like.model.kernels import gpu_attention, tpu_attention
from t5like.model.layers import normal, parameter
from t5like.sharding.logical_axes import constrain, context_size

BAND_ROWS = 128  # rows of a relative bias that are laid out at once: the width of a TPU's registers


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
    """T5's learned bias on attention scores: one number for each head and bucket of relative distances."""

    config: ModelConfig
    bidirectional: bool

    @nn.compact
    def __call__(self, plan: AttentionPlan, first_query: jax.Array | int = 0) -> jax.Array:
        """The bias [1, N, L, S] for queries at first_query, first_query + 1, ... and keys at 0, 1, ...

        For a fused kernel see `tpu_attention.bias_per_batch_shard` and `gpu_attention.bias_per_shard`.

        The bias depends on key - query only, so there are L + S - 1 different columns; they are looked up once and
        laid out by a shift per row. The backward pass sums along diagonals instead of scattering L * S values.
        """
        config = self.config
        init = normal(config.model_dim**-0.5, ("buckets", "heads"))
        init = with_pattern(init, nearest_tokens(config, self._buckets, bidirectional=self.bidirectional))
        table_RN = parameter(self, "table", init, (config.relative_buckets, config.num_heads))
        queries, keys, start = plan.queries, plan.keys, plan.branch_start
        if plan.self_attention == "gpu":
            return gpu_attention.bias_of(table_RN, self._buckets(gpu_attention.distances(queries, keys)))
        if start is None:
            bias_1NLS = self._bias(table_RN, queries, keys, first_query)
            return tpu_attention.bias_per_batch_shard(bias_1NLS) if plan.self_attention == "tpu" else bias_1NLS
        positions = start + (keys - start) // queries
        bias_1N1S = self._bias(table_RN, 1, positions, start + (first_query - start) // queries)
        branches_1N1S = jnp.repeat(bias_1N1S[..., start:], queries, axis=-1)
        bias_1N1S = jnp.concatenate([bias_1N1S[..., :start], branches_1N1S], axis=-1)
        return jnp.broadcast_to(bias_1N1S, (*bias_1N1S.shape[:2], queries, keys))

    def _bias(self, table_RN: jax.Array, queries: int, keys: int, first_query: jax.Array | int) -> jax.Array:
        if isinstance(first_query, int):
            distance = np.arange(keys + queries - 1) - (queries - 1) - first_query
            buckets = self._buckets(distance)
        else:  # a decoding step: the first query is known only on the device, all buckets are known here
            all_buckets = self._buckets(np.arange(-(queries - 1) - (keys - 1), keys))
            buckets = jax.lax.dynamic_slice(jnp.asarray(all_buckets), (keys - 1 - first_query,), (keys + queries - 1,))
        diagonals_N = table_RN[buckets].T  # [N, L + S - 1]; entry i is distance i - (L - 1)
        parts = context_size()
        if parts == 1 or queries % parts:
            return shift_rows(diagonals_N, queries, keys)[None].astype(self.config.dtype)
        # Each device lays out the rows of its own queries; the full bias would be L x S numbers on every device.
        rows = queries // parts
        windows = jnp.stack(
            [
                diagonals_N[:, first : first + rows + keys - 1]
                for first in range(queries - rows, -1, -rows)  # for the first queries, for the next ones, ...
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


def bias_module(
    config: ModelConfig, scope: Literal["shared", "per_layer"], *, causal: bool
) -> Callable[[AttentionPlan, jax.Array | int], jax.Array] | None:
    """The module that makes the bias on self-attention's scores, if the config's positions have one of this scope."""
    if config.positions != "relative" or config.relative_bias != scope:
        return None
    return RelativeBias(config, bidirectional=not causal)


def shift_rows(diagonals: jax.Array, rows: int, columns: int) -> jax.Array:
    """[N, rows + columns - 1] -> [N, rows, columns] with out[n, i, j] = diagonals[n, j - i + rows - 1].

    For 2 rows and 3 columns, a b c d -> b c d / a b c. The vector is extended by one entry and repeated, and the
    repetition is cut into rows of the original length: each row is shifted by one. These are only reshapes, so the
    gradient is cheap. Where there are many rows, one band of them is made in this way, wide enough that all other
    bands are slices of it: at multiples of the band's size slices need no shuffling on a TPU (2,048 x 2,048: 2 GiB of
    temporaries instead of 5, 6 s to compile instead of 34).
    """
    if rows > BAND_ROWS and rows % BAND_ROWS == 0:
        band = shift_rows(diagonals, BAND_ROWS, rows + columns - BAND_ROWS)
        return jnp.concatenate(
            [band[:, :, start : start + columns] for start in range(rows - BAND_ROWS, -1, -BAND_ROWS)], axis=1
        )
    heads, width = diagonals.shape
    padded = jnp.pad(diagonals, ((0, 0), (0, 1)))  # width + 1 entries per row
    tiled = jnp.broadcast_to(padded[:, None], (heads, rows, width + 1)).reshape(heads, rows * (width + 1))
    shifted = tiled[:, : rows * width].reshape(heads, rows, width)  # row i starts i entries earlier in the vector
    return shifted[:, :, rows - 1 : rows - 1 + columns]
