"""Stateless random numbers: bits, partitions and permutations as pure functions of 64-bit keys, for many rows at once.

All random numbers of `objectives` and `pipeline` come from here, so that a row is the same in every process and after
every restart. A numpy generator per row would take more time than all the rest of an objective.
"""

import numpy as np


def random_bits(keys_B: np.ndarray, count: int) -> np.ndarray:
    """uint64 [B, count] of independent random bits, a pure function of each row's uint64 key.

    SplitMix64 (Steele et al. 2014) as a counter-based generator: the finaliser of key + i * golden ratio.
    """
    with np.errstate(over="ignore"):
        x = keys_B[:, None] + np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))


def keyed_bits(seed: int, purpose: int, number_B: np.ndarray) -> np.ndarray:
    """uint64 [B]: random bits keyed by (seed, purpose, number); both below 2^32."""
    with np.errstate(over="ignore"):
        key = np.uint64(seed) * np.uint64(0x100000000) + np.uint64(purpose)
        return random_bits(random_bits(np.array([key]), 1)[0] ^ number_B, 1)[:, 0]


def random_parts(bits_BN: np.ndarray, parts: int) -> np.ndarray:
    """Partition N + 1 items into `parts` parts of at least one item: int64 lengths [B, parts], uniformly distributed.

    The borders are after the items with the parts - 1 smallest of N random numbers (T5's `_random_segmentation`).
    """
    rows, gaps = bits_BN.shape
    cuts = (
        np.sort(np.argpartition(bits_BN, max(parts - 2, 0), axis=1)[:, : parts - 1], axis=1)
        if parts > 1
        else np.empty((rows, 0), int)
    )
    borders = np.concatenate([np.full((rows, 1), -1), cuts, np.full((rows, 1), gaps)], axis=1)
    return np.diff(borders, axis=1)


def permute(index_B: np.ndarray, size_B: np.ndarray, key_B: np.ndarray) -> np.ndarray:
    """A random permutation of range(size), evaluated at single indices, all uint64 [B].

    A Feistel network on the smallest even number of bits that holds `size`, iterated until the value is below `size`
    (cycle walking, Black & Rogaway 2002). The permutation is never stored. For equal (size, key) it is a bijection.
    """
    half_B = (np.frexp(np.maximum(size_B.astype(np.float64) - 1, 1))[1].astype(np.uint64) + np.uint64(1)) // np.uint64(
        2
    )
    mask_B = (np.uint64(1) << half_B) - np.uint64(1)
    value_B, active = index_B.copy(), np.arange(len(index_B))
    while len(active):
        half, mask, x = half_B[active], mask_B[active], value_B[active]
        high, low = x >> half, x & mask
        for round_number in range(6):
            with np.errstate(over="ignore"):
                mixed = random_bits(key_B[active] ^ (low + np.uint64(round_number) * np.uint64(0xD1B54A32D192ED03)), 1)[
                    :, 0
                ]
            high, low = low, high ^ (mixed & mask)
        value_B[active] = (high << half) | low
        active = active[value_B[active] >= size_B[active]]
    return value_B
