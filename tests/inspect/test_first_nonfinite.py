"""The first operation whose result is not finite; test_replay.py has that of a model."""

import jax
import jax.numpy as jnp
import numpy as np

from t5like.inspect.first_nonfinite import find


def test_finite_outputs_have_no_origin():
    assert find(lambda x: jnp.log(x) * 2, jnp.ones(3)) is None


def test_the_origin_is_the_operation_that_has_finite_inputs():
    found = find(lambda x: jnp.sin(jnp.exp(x) - 1) + 1, jnp.array([1.0, 200.0]))
    assert (found.operation, found.value, found.backward) == (
        "exp",
        "inf",
        False,
    ) and "test_first_nonfinite" in found.source


def test_a_value_that_is_hidden_later_is_no_origin():
    hidden = lambda x: jnp.where(x > 0, jnp.log(x), 0.0) + jnp.sqrt(x - 5)
    assert find(hidden, jnp.array([-1.0, 2.0])).operation == "sqrt"
    assert find(lambda x: jnp.where(x > 0, jnp.log(x), 0.0), jnp.array([-1.0, 2.0])) is None


def test_an_argument_that_is_not_finite_is_named():
    found = find(lambda a, b: a["x"] + b, {"x": jnp.ones(2)}, jnp.array([1.0, np.nan]))
    assert (found.operation, found.scope) == ("argument", "1")


def test_the_backward_pass_and_the_iteration_of_a_loop_are_named():
    found = find(jax.grad(lambda x: 1e30 * (1e30 * x)), jnp.float32(0))
    assert (found.operation, found.value, found.backward) == ("mul", "inf", True)

    def body(x, w):
        with jax.named_scope("body"):
            return jnp.exp(x * w), x

    found = find(
        lambda ws: jax.lax.scan(jax.checkpoint(body), jnp.float32(1), ws)[1].sum(), jnp.array([1.0, 1, 99, 1, 1])
    )
    assert (found.operation, found.scope) == ("exp", "iteration_2/body")
