"""How two lists of named tensors differ beyond rounding, where first, and by which constant factor if there is one.

The rule. Rounding is not known in advance, so it is measured: `Noise` has the change of each tensor of A when every
parameter is multiplied by 1 + 2u or 1 - 2u at random, where u is the unit roundoff of the dtype of computation (Monte
Carlo arithmetic: Parker 1997, "Monte Carlo Arithmetic: exploiting randomness in floating-point arithmetic"). This takes
the condition of each tensor into account: an Adam update of a gradient that is only rounding may have another sign. B
differs if the RMS or the largest element of A - B is more than `FACTOR` times that change, and than the same multiple
of u times the size of the tensor. For independent roundings the error of a sum grows with the root of its terms (Higham
and Mary 2019, doi:10.1137/18M1226312, theorem 2.4), as the measured change does.

Called by `compare_steps` and `leaks`; nothing here needs JAX.
"""

from collections.abc import Mapping
from fractions import Fraction
from typing import NamedTuple

import numpy as np

FACTOR = 8.0
SAMPLES = 3  # random changes of the parameters
SMALLEST = 1e-3  # a tensor smaller than this part of its kind's size is compared as if it had that size
LARGEST_FACTOR = 64  # k and 1 / k up to this are recognized


class Noise(NamedTuple):
    """The RMS and the largest element of a tensor's change by rounding."""

    rms: float
    largest: float


class Difference(NamedTuple):
    """A tensor that differs beyond rounding.

    Attributes:
        name: of the tensor.
        error: largest absolute difference over the RMS of A.
        limit: what rounding may make of it.
        where: the smallest slice that contains all elements beyond the limit, as an index; "" for the whole tensor.
        factor: r if B is r x A there, and r is not 1; otherwise None.
        note: instead of an error, another difference, such as that of shapes.
    """

    name: str
    error: float = np.inf
    limit: float = 0.0
    where: str = ""
    factor: float | None = None
    note: str = ""


def rms(x: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(x, dtype=np.float64)))) if x.size else 0.0


def change(a: np.ndarray, b: np.ndarray) -> Noise:
    difference = np.asarray(b, np.float64) - np.asarray(a, np.float64)
    return Noise(rms(difference), float(np.abs(difference).max(initial=0.0)))


def larger(noise: Mapping[str, Noise], other: Mapping[str, Noise]) -> dict[str, Noise]:
    """The larger one of two changes of each tensor, of one that only one has that one."""
    both = {name: Noise(*map(max, noise[name], other[name])) for name in noise.keys() & other.keys()}
    return {**noise, **other, **both}


def kind(name: str) -> str:
    """What a tensor is compared in size with: gradients with gradients, values of the forward pass with each other."""
    first = name.partition("/")[0]
    return first if first in ("batch", "parameter_before", "gradient", "update", "parameter") else "forward"


def compare(
    a: Mapping[str, np.ndarray], b: Mapping[str, np.ndarray], noise: Mapping[str, Noise], unit: float
) -> tuple[list[Difference], dict[str, float]]:
    """Compare tensors by name, in the order of `a`.

    Args:
        noise: the measured change of each tensor; one that is not in it changes by nothing.
        unit: the unit roundoff u.

    Returns:
        the differences, in that order, and for each other tensor its error as a part of its limit.
    """
    sizes: dict[str, float] = {}
    for name, x in a.items():
        sizes[kind(name)] = max(sizes.get(kind(name), 0.0), rms(x))
    differences, within = [], {}
    for name in [*a, *(name for name in b if name not in a)]:
        if name not in a or name not in b:
            differences.append(Difference(name, note=f"only {'A' if name in a else 'B'} has it"))
        elif a[name].shape != b[name].shape:
            differences.append(Difference(name, note=f"shape {a[name].shape} in A, {b[name].shape} in B"))
        else:
            exact = kind(name) in ("batch", "parameter_before")
            floor = 0.0 if exact else unit * max(rms(a[name]), SMALLEST * sizes[kind(name)])
            measured = Noise(0.0, 0.0) if exact else noise.get(name, Noise(0.0, 0.0))
            found = _compare_one(name, a[name], b[name], measured, floor)
            if isinstance(found, Difference):
                differences.append(found)
            else:
                within[name] = found
    return differences, within


def _compare_one(name: str, a: np.ndarray, b: np.ndarray, noise: Noise, floor: float) -> Difference | float:
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if not np.array_equal(finite := np.isfinite(a), np.isfinite(b)):
        return Difference(name, where=_box(finite != np.isfinite(b)), note="one is not finite where the other one is")
    a, b = np.where(finite, a, 0.0), np.where(finite, b, 0.0)
    # The largest of many roundings is several times their RMS.
    limit = Noise(FACTOR * max(noise.rms, floor), FACTOR * max(noise.largest, 4 * floor))
    error = change(a, b)
    if error.rms <= limit.rms and error.largest <= limit.largest:
        return max(e / tolerated if tolerated else 0.0 for e, tolerated in zip(error, limit, strict=True))
    size = max(rms(a), 1e-300)
    by_rms = error.largest <= limit.largest  # many elements differ by little
    beyond = np.abs(a - b) > (limit.rms if by_rms else limit.largest)
    relative = (error.rms, limit.rms) if by_rms else (error.largest, limit.largest)
    where = _box(beyond)
    return Difference(name, relative[0] / size, relative[1] / size, where, _factor(a[beyond], b[beyond]))


def _box(mask: np.ndarray) -> str:
    """The smallest slice with all True elements, as an index; "" for the whole array or a scalar."""
    if not mask.ndim:
        return ""
    places = np.nonzero(mask)
    spans = [(int(each.min()), int(each.max()) + 1) for each in places]
    if spans == [(0, size) for size in mask.shape]:
        return ""
    text = lambda span, size: ":" if span == (0, size) else f"{span[0]}:{span[1]}" if span[1] - span[0] > 1 else span[0]
    return f"[{', '.join(str(text(span, size)) for span, size in zip(spans, mask.shape, strict=True))}]"


def _factor(a: np.ndarray, b: np.ndarray) -> float | None:
    """r if b is r x a up to 1 %, and r is not 1; otherwise None."""
    if not (square := float(np.sum(a * a))):
        return None
    r = float(np.sum(a * b)) / square
    if abs(r - 1) < 0.02 or rms(b - r * a) > 0.01 * max(rms(b), rms(a)):
        return None
    simple = [value for k in range(1, LARGEST_FACTOR + 1) for value in (float(k), 1 / k)]
    return next((value for value in [0.0, *simple] if abs(r - value) < 0.01 * max(value, 0.1)), r)


def factor_text(factor: float, axes: Mapping[str, int]) -> str:
    """``B has 0.5 x A``, and which mesh axes have that size; `axes`: those of both meshes."""
    fraction = Fraction(factor).limit_denominator(LARGEST_FACTOR)
    if factor == 0:
        return "B is 0 there"
    text = f"B has {factor:.4g} x A"
    count = max(fraction.numerator, fraction.denominator)
    fits = [f"mesh.{axis}={size}" for axis, size in axes.items() if size == count > 1]
    if abs(float(fraction) - factor) > 1e-9 or not fits or min(fraction.numerator, fraction.denominator) != 1:
        return text
    return f"{text}, the size of {' and '.join(fits)}: a sum over that axis is missing or made twice"
