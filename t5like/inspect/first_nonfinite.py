"""Which operation of a JAX function is the first whose result is not finite, by evaluating them one after another.

`jax.debug_nans` stops at the first NaN, also at one that has no effect, as one that a mask hides, and names a line of
code, but no layer. Here each operation of the function's jaxpr is evaluated alone. A value that is not finite keeps the
operation that it comes from, through all operations up to the function's outputs. Called by `replay`.
"""

import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal
from jax.extend.source_info_util import summarize

from t5like import tree
from t5like.checkpoint.digests import is_on_host

# Operations that contain a jaxpr, which is evaluated in their place: the parameter with it.
CALLS = {"jit": "jaxpr", "closed_call": "call_jaxpr", "checkpoint": "jaxpr", "remat2": "jaxpr", "pjit": "jaxpr"}
CALLS |= {"custom_jvp_call": "call_jaxpr", "custom_vjp_call": "call_jaxpr", "custom_lin": "jaxpr"}


class Origin(NamedTuple):
    """Where a value that is not finite comes from.

    Attributes:
        order: index among all evaluated operations; -1 for an argument of the function.
        operation: name of the JAX primitive, such as dot_general; or "argument".
        scope: names of the modules around it, such as decoder/layer_2/mlp; of an argument its name.
        backward: whether it belongs to the backward pass.
        source: file, line and function that made the operation.
        value: "nan" or "inf".
    """

    order: int
    operation: str
    scope: str
    backward: bool
    source: str
    value: str


def find(function: Callable[..., Any], *arguments: Any) -> Origin | None:
    """Evaluate a function, and return where the first output that is not finite comes from; None if all are finite.

    If several operations spoil an output, it is the first one. An operation whose results are not finite although its
    inputs are is an origin; so are arguments, whose name is their path in the tuple of arguments.
    """
    closed = jax.make_jaxpr(function)(*arguments)
    named = tree.flatten(arguments)
    origins = [
        Origin(-1, "argument", name, False, "", value) if (value := nonfinite(leaf)) else None
        for name, leaf in named.items()
    ]
    jaxpr = _without_unused(closed.jaxpr)
    _, found = _Evaluator().run(jaxpr, closed.consts, list(named.values()), origins, "")
    return min((origin for origin in found if origin), default=None)


def _without_unused(jaxpr: Jaxpr) -> Jaxpr:
    """A jaxpr without operations on which no output depends, such as the backward pass where the output is the loss."""
    needed, kept = {atom for atom in jaxpr.outvars if not isinstance(atom, Literal)}, []
    for equation in reversed(jaxpr.eqns):
        if needed & set(equation.outvars):
            kept.append(equation)
            needed |= {atom for atom in equation.invars if not isinstance(atom, Literal)}
    return jaxpr.replace(eqns=kept[::-1])


def nonfinite(x: Any) -> str:
    """ "nan" or "inf" if a floating-point array has such an element, otherwise ""."""
    if not jnp.issubdtype(x.dtype, jnp.floating):
        return ""
    of = np if is_on_host(x) else jnp  # NumPy compiles nothing for each shape
    with np.errstate(invalid="ignore"):  # a warning about bfloat16
        if bool(of.isfinite(x).all()):
            return ""
        return "nan" if bool(of.isnan(x).any()) else "inf"


class _Evaluator:
    """Evaluates jaxprs with an origin for each value that is not finite."""

    def __init__(self) -> None:
        self._order = 0

    def run(
        self, jaxpr: Jaxpr, consts: Sequence[Any], values: Sequence[Any], origins: Sequence[Origin | None], scope: str
    ) -> tuple[list[Any], list[Origin | None]]:
        """Outputs of a jaxpr and their origins."""
        known = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *values], strict=True))
        spoiled = dict(zip(jaxpr.invars, origins, strict=True))
        value_of = lambda atom: jnp.asarray(atom.val, atom.aval.dtype) if isinstance(atom, Literal) else known[atom]
        origin_of = lambda atom: None if isinstance(atom, Literal) else spoiled.get(atom)
        for equation in jaxpr.eqns:
            inner_scope = f"{scope}/{equation.source_info.name_stack}"
            inputs, input_origins = [[of(atom) for atom in equation.invars] for of in (value_of, origin_of)]
            outputs, output_origins = self._evaluate(equation, inputs, input_origins, inner_scope)
            known |= zip(equation.outvars, outputs, strict=True)
            spoiled |= zip(equation.outvars, output_origins, strict=True)
        return [value_of(atom) for atom in jaxpr.outvars], [origin_of(atom) for atom in jaxpr.outvars]

    def _evaluate(self, equation: JaxprEqn, values: list[Any], origins: list[Origin | None], scope: str):
        name, parameters = equation.primitive.name, equation.params
        if name in CALLS:
            closed = _closed(parameters[CALLS[name]])
            return self.run(closed.jaxpr, closed.consts, values, origins, scope)
        if name == "scan":
            return self._scan(parameters, values, origins, scope)
        if name == "sharding_constraint":  # on one device
            return values, origins
        outputs = equation.primitive.bind(*values, **equation.primitive.get_bind_params(parameters))
        outputs = outputs if equation.primitive.multiple_results else [outputs]
        self._order += 1
        before = min((origin for origin in origins if origin), default=None)
        source = summarize(equation.source_info)
        return outputs, [
            (before or Origin(self._order, name, *_module(scope), source, value)) if (value := nonfinite(x)) else None
            for x in outputs
        ]

    def _scan(self, parameters: dict[str, Any], values: list[Any], origins: list[Origin | None], scope: str):
        first, count = _constants_and_carry(parameters)
        body, length = _closed(parameters["jaxpr"]), parameters["length"]
        consts, const_origins = values[:first], origins[:first]
        carry, carry_origins = values[first : first + count], origins[first : first + count]
        steps = range(length)[::-1] if parameters["reverse"] else range(length)
        collected: dict[int, list[Any]] = {}
        stacked_origins: list[Origin | None] = [None] * (len(body.jaxpr.outvars) - count)
        for index in steps:
            slices = [x[index] for x in values[first + count :]]
            slice_origins = [
                origin if origin and nonfinite(x) else None
                for x, origin in zip(slices, origins[first + count :], strict=True)
            ]
            outputs, found = self.run(
                body.jaxpr,
                body.consts,
                [*consts, *carry, *slices],
                [*const_origins, *carry_origins, *slice_origins],
                f"{scope}/iteration_{index}",
            )
            carry, carry_origins = outputs[:count], found[:count]
            collected[index] = outputs[count:]
            stacked_origins = [old or new for old, new in zip(stacked_origins, found[count:], strict=True)]
        stacked = [jnp.stack(each) for each in zip(*(collected[index] for index in range(length)), strict=True)]
        return [*carry, *stacked], [*carry_origins, *stacked_origins]


def _closed(jaxpr: Jaxpr | ClosedJaxpr) -> ClosedJaxpr:
    return jaxpr if isinstance(jaxpr, ClosedJaxpr) else ClosedJaxpr(jaxpr, ())


def _constants_and_carry(parameters: dict[str, Any]) -> tuple[int, int]:
    """How many of a scan's inputs are constants, and how many are carried; the others are sliced."""
    if "ft_in" in parameters:  # from jax 0.11 on
        constants, carry, _ = parameters["ft_in"].unpack()
        return len(list(constants)), len(list(carry))
    return parameters["num_consts"], parameters["num_carry"]


def _module(scope: str) -> tuple[str, bool]:
    """The modules of a name stack, without the wrappers of JAX's transformations; and whether it is transposed."""
    names = re.sub(r"(?:transpose|jvp|vmap|rematted_computation|checkpoint)\b|[()]", "", scope).split("/")
    modules = [name for name in names if name and "." not in name and name != "Block"]  # others are methods
    return "/".join(modules), "transpose(" in scope
