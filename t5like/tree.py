"""Named leaves: every parameter has one name, its path joined by slashes, such as ``encoder/layers/mlp/in/kernel``.

Used wherever something is chosen by parameter name: weight decay, freezing, checkpoints, imports, tables of shapes.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
from flax import traverse_util

from t5like.errors import ConfigError, shown
from t5like.types import Tree


def name_of(path: Sequence[Any]) -> str:
    """A JAX key path as a name: dict keys, field names and indices joined by slashes."""
    return "/".join(str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))) for key in path)


def flatten(tree: Tree) -> dict[str, Any]:
    """Leaves by name, in the tree's own order. None is no leaf."""
    return {name_of(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def nested(leaves: Mapping[str, Any]) -> Tree:
    """The plain nested dicts whose leaves have these names: of dicts, what `flatten` undoes."""
    return traverse_util.unflatten_dict(dict(leaves), sep="/")


def map_named(function: Callable[..., Any], tree: Tree, *rest: Tree) -> Tree:
    """Like `jax.tree.map`, with the leaf's name as the first argument."""
    return jax.tree_util.tree_map_with_path(lambda path, *leaves: function(name_of(path), *leaves), tree, *rest)


def matches(name: str, patterns: Iterable[str]) -> bool:
    """Whether a regular expression of the list matches the whole name."""
    return any(re.fullmatch(pattern, name) for pattern in patterns)


def mask(tree: Tree, patterns: Sequence[str], *, field: str) -> Tree:
    """A tree of bools: True where a pattern matches the leaf's name.

    Raises:
        ConfigError: a pattern, found in the config at `field`, is no regular expression or matches no leaf: a typing
            error there would freeze or decay nothing, silently.
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
    """How many numbers the leaves hold together."""
    return sum(int(leaf.size) for leaf in jax.tree.leaves(tree))
