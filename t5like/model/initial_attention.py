"""Patterns as initial values of attention (`ModelConfig.attention_init`), in place of random values.

With random values a head begins with the mean over the whole row, and it takes a short run's hundreds of steps until
heads read single tokens. Patterns that trained models have anyway shorten this (Trockman and Kolter 2023, Mimetic
Initialization of Self-Attention Layers, arXiv:2305.09828). Called by `positions` and `attention`.
"""

import dataclasses
from collections.abc import Callable

import numpy as np

from t5like.config.model_schema import ModelConfig

BIAS = 6.0  # of the preferred token: 76 % of the weights, if the scores of 128 tokens are equal
MATCH = 3.0  # sharpness of the match of equal inputs, in units of a random query's size

Pattern = Callable[[tuple[int, ...]], np.ndarray]  # of the shape of one layer's matrix


def with_pattern(init: Callable, pattern: Pattern | None) -> Callable:
    """The initializer with a pattern in place of its random values: a match of inputs would be lost among them."""
    return init if pattern is None else lambda *arguments: init(*arguments).replace(pattern=pattern, key=None)


@dataclasses.dataclass(frozen=True)
class NearestTokens:
    """Relative biases with which heads prefer a token near the query: of four heads three, each another one."""

    buckets: tuple[int, ...]

    def __call__(self, shape: tuple[int, ...]) -> np.ndarray:
        """The table [R, N] of R buckets and N heads."""
        table_RN = np.zeros(shape, np.float32)
        for head in range(shape[1]):
            if head % 4 < len(self.buckets):
                table_RN[self.buckets[head % 4], head] = BIAS
        return table_RN


def nearest_tokens(
    config: ModelConfig, buckets: Callable[[np.ndarray], np.ndarray], *, bidirectional: bool
) -> NearestTokens | None:
    """The pattern of a relative bias: the tokens in front of and behind the query, and two in front of it.

    In causal attention, where none is behind it, the query itself. None without `attention_init=local`, and in other
    architectures than encoder-decoders, where it was not found to help.

    Args:
        config: of the stack.
        buckets: of distances key - query.
        bidirectional: whether keys behind the query are read.
    """
    if config.attention_init != "local" or config.architecture != "encoder_decoder":
        return None
    return NearestTokens(tuple(buckets(np.array([-1, 1 if bidirectional else 0, -2])).tolist()))


@dataclasses.dataclass(frozen=True)
class EqualInputs:
    """Kernels with which queries prefer keys whose inputs equal theirs: both copy dims of the input, times `scale`.

    Each head of keys copies H other dims; the heads of queries that read it copy the same ones.
    """

    heads: int
    kv_heads: int
    scale: float

    def __call__(self, shape: tuple[int, ...]) -> np.ndarray:
        """The kernel [D, N * H] of N heads."""
        dim, features = shape
        size = features // self.heads
        copied_DKH = np.eye(dim, self.kv_heads * size, dtype=np.float32).reshape(dim, self.kv_heads, size)
        return self.scale * np.repeat(copied_DKH, self.heads // self.kv_heads, axis=1).reshape(shape)


def equal_inputs(config: ModelConfig, scale: float) -> tuple[EqualInputs | None, EqualInputs | None]:
    """The patterns of the kernels of queries and keys in cross-attention; None without `attention_init=local`.

    Args:
        config: of the decoder.
        scale: the factor that a random query kernel has.
    """
    if config.attention_init != "local":
        return None, None
    heads, kv_heads = config.num_heads, config.kv_heads
    return EqualInputs(heads, kv_heads, MATCH * scale), EqualInputs(kv_heads, kv_heads, 1.0)
