"""Random numbers without a state: bits, cuts and permutations as pure functions of 64-bit keys, many rows at a time.

`objectives`, `masking` and `pipeline` draw from here and nowhere else, so that a row is the same wherever and whenever
it is made. A numpy generator per row would cost more than all the rest of an objective.
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


def random_parts(bits_BN: np.ndarray, parts: int) -> np.ndarray:
    """Cut N + 1 items into `parts` parts of at least one item: int64 lengths [B, parts], all cuts equally likely.

    The parts - 1 smallest of N random numbers say after which items to cut (T5's `_random_segmentation`).
    """
    rows, gaps = bits_BN.shape
    cuts = (
        np.sort(np.argpartition(bits_BN, max(parts - 2, 0), axis=1)[:, : parts - 1], axis=1)
        if parts > 1
        else np.empty((rows, 0), int)
    )
    borders = np.concatenate([np.full((rows, 1), -1), cuts, np.full((rows, 1), gaps)], axis=1)
    return np.diff(borders, axis=1)


def permute(place_B: np.ndarray, size_B: np.ndarray, key_B: np.ndarray) -> np.ndarray:
    """A random permutation of range(size), evaluated at single places, all uint64 [B].

    A Feistel network on the least even number of bits that holds `size`, walked until it lands below `size` (Black &
    Rogaway 2002): any place of any permutation without storing one. Places of equal (size, key) never collide.
    """
    half_B = (np.frexp(np.maximum(size_B.astype(np.float64) - 1, 1))[1].astype(np.uint64) + np.uint64(1)) // np.uint64(
        2
    )
    mask_B = (np.uint64(1) << half_B) - np.uint64(1)
    value_B, left = place_B.copy(), np.arange(len(place_B))
    while len(left):
        half, mask, x = half_B[left], mask_B[left], value_B[left]
        high, low = x >> half, x & mask
        for turn in range(6):
            with np.errstate(over="ignore"):
                mixed = random_bits(key_B[left] ^ (low + np.uint64(turn) * np.uint64(0xD1B54A32D192ED03)), 1)[:, 0]
            high, low = low, high ^ (mixed & mask)
        value_B[left] = (high << half) | low
        left = left[value_B[left] >= size_B[left]]
    return value_B
