"""Leaves of a train state by name: as they are stored, and how stored ones differ from wanted ones.

Called by `checkpoints`.
"""

from collections.abc import Mapping

import jax

from t5like import tree
from t5like.checkpoint.digests import Leaf
from t5like.errors import CheckpointError, shorten
from t5like.types import Array, TrainState


def differences(stored: Mapping[str, Leaf], wanted: Mapping[str, jax.ShapeDtypeStruct]) -> list[str]:
    """Return how names, shapes and dtypes of stored leaves differ from the wanted ones; empty if they fit."""
    names = [f"{name} is missing" for name in wanted if name not in stored]
    names += [f"{name} is not in this model" for name in stored if name not in wanted]
    return names + [
        f"{name} is {stored[name]}, not {leaf.dtype}{list(leaf.shape)}"
        for name, leaf in wanted.items()
        if name in stored and (stored[name].shape, stored[name].dtype) != (tuple(leaf.shape), str(leaf.dtype))
    ]


def leaves_of(state: TrainState) -> dict[str, Array]:
    """Return leaves by name. Refuse names that may collide on disk: Orbax would keep only one of them, silently."""
    paths = [[tree.name_of([key]) for key in path] for path, _ in jax.tree_util.tree_leaves_with_path(state)]
    bad = ["/".join(path) for path in paths if not all(part and not set(part) & {"/", "."} for part in path)]
    if bad:
        raise CheckpointError(
            f"the state has leaves whose names may collide on disk: {shorten(bad, separator='; ')}; "
            "no part of a name may be empty or contain a slash or a dot"
        )
    return tree.flatten(state)
