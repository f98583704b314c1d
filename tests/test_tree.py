"""Leaves by name, and rules by regular expression."""

import jax.numpy as jnp
import pytest

from t5like import tree
from t5like.errors import ConfigError
from t5like.types import TrainState

PARAMS = {"encoder": {"layers": {"mlp": {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)}}}, "head": jnp.ones((3, 4))}


def test_names_are_paths_joined_by_slashes():
    assert list(tree.flatten(PARAMS)) == ["encoder/layers/mlp/bias", "encoder/layers/mlp/kernel", "head"]
    state = TrainState(jnp.zeros(()), {"a": jnp.ones(2)}, (jnp.zeros(()), {"a": jnp.ones(2)}))
    assert list(tree.flatten(state)) == ["step", "params/a", "opt_state/0", "opt_state/1/a"]


def test_mapping_by_name_passes_the_leaves_of_all_trees():
    named = tree.map_named(lambda name, x, y: f"{name} {x + y}", {"a": {"b": 1}, "c": 2}, {"a": {"b": 10}, "c": 20})
    assert named == {"a": {"b": "a/b 11"}, "c": "c 22"}


def test_a_pattern_must_match_the_whole_name():
    assert tree.matches("encoder/head", ["x", ".*head"])
    assert not tree.matches("encoder/head", ["head", "encoder"])
    chosen = tree.mask(PARAMS, ["encoder/.*bias", "head"], field="optimizer.frozen")
    assert tree.flatten(chosen) == {"encoder/layers/mlp/bias": True, "encoder/layers/mlp/kernel": False, "head": True}


def test_a_pattern_that_matches_nothing_or_is_none_is_refused():
    with pytest.raises(
        ConfigError, match="optimizer.frozen='heads' matches no parameter; there are encoder/layers/mlp/bias, "
    ):
        tree.mask(PARAMS, ["head", "heads"], field="optimizer.frozen")
    with pytest.raises(ConfigError, match=r"optimizer.frozen='\(' is not a regular expression: "):
        tree.mask(PARAMS, ["("], field="optimizer.frozen")
    for pattern in ("(a{99999999999})", "(" * 5000):
        with pytest.raises(ConfigError, match="optimizer.frozen='.* is not a regular expression: "):
            tree.mask(PARAMS, [pattern], field="optimizer.frozen")


def test_parameters_are_counted():
    assert tree.num_parameters(PARAMS) == 6 + 3 + 12
