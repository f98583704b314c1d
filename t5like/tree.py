"""Named leaves: every parameter has one name, its path joined by slashes, such as ``encoder/layers/mlp/in/kernel``.

Used by everything that selects parameters by name: weight decay, freezing, checkpoints, imports, tables of shapes.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
from flax import traverse_util

from t5like.errors import ConfigError, shown
from t5like.types import Tree


def name_of(path: Sequence[Any]) -> str:
    """Return a JAX key path as a name: dict keys, field names and indices joined by slashes."""
    return "/".join(str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))) for key in path)


def flatten(tree: Tree) -> dict[str, Any]:
    """Return the leaves by name, in the tree's order. None is no leaf."""
    return {name_of(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def nested(leaves: Mapping[str, Any]) -> Tree:
    """Return nested dicts with leaves of these names: the inverse of `flatten` for nested dicts."""
    return traverse_util.unflatten_dict(dict(leaves), sep="/")


def merged(left: Tree | None, right: Tree) -> Tree:
    """Nested dicts with the leaves of both; where both have one, that of `right`. None has no leaves."""
    if not isinstance(left, Mapping) or not isinstance(right, Mapping):
        return right
    return {**left, **{key: merged(left.get(key), child) for key, child in right.items()}}


def map_named(function: Callable[..., Any], tree: Tree, *rest: Tree) -> Tree:
    """Like `jax.tree.map`, with the leaf's name as the first argument."""
    return jax.tree_util.tree_map_with_path(lambda path, *leaves: function(name_of(path), *leaves), tree, *rest)


def matches(name: str, patterns: Iterable[str]) -> bool:
    """Whether one of the regular expressions matches the whole name."""
    return any(re.fullmatch(pattern, name) for pattern in patterns)


def mask(tree: Tree, patterns: Sequence[str], *, field: str) -> Tree:
    """Return a tree of bools: True where a pattern matches the leaf's name.

    Raises:
        ConfigError: a pattern of the config field `field` is no regular expression, or matches no leaf: a typing error
            would otherwise have no effect, silently.
    """
    names = list(flatten(tree))
    for pattern in patterns:
        try:
            re.compile(pattern)
        except (re.error, OverflowError, RecursionError) as error:
            raise ConfigError(f"{field}={shown(pattern)} is not a regular expression: {error}") from None
        if not any(matches(name, [pattern]) for name in names):
            raise ConfigError(f"{field}={shown(pattern)} matches no parameter; there are {', '.join(names[:4])}, ...")
    return map_named(lambda name, _: matches(name, patterns), tree)


def num_parameters(tree: Tree) -> int:
    """Return the total number of elements of all leaves."""
    return sum(int(leaf.size) for leaf in jax.tree.leaves(tree))
