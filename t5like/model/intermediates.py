"""Values inside of the layers that can be returned by name. Nothing is computed for a name that is not asked for.

Each name is a Flax variable collection: a module that computes such a value calls `record`, which does nothing unless
the collection is mutable. `Stack` applies its blocks with the collections that are mutable in itself, and returns the
values of all layers stacked, whether layers are scanned or unrolled. `layer_values.compute_intermediates` is the
interface; `model.apply(..., mutable=["residual"])` is the same in Flax's terms.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from typing import Any

import flax.linen as nn
import jax

INTERMEDIATES = {  # in the order of a layer's computation, except the residual stream
    "residual": "[Y, B, L, D], the residual stream behind each layer (the last one's final norm is the stack's output)",
    "attention_weights": "[Y, B, N, L, S] float32, of self-attention; 0 for a query that attends to no key",
    "attention_output": "[Y, B, L, D], what self-attention adds to the residual stream",
    "cross_attention_weights": "[Y, B, N, L, S] float32, of the decoder's attention to the encoder's output",
    "cross_attention_output": "[Y, B, L, D], what that attention adds to the residual stream",
    "mlp_input": "[Y, B, L, D], what each MLP reads: behind its norm, unless norms are behind the sublayers",
    "mlp_hidden": "[Y, B, L, F], the units of each MLP, behind the activation",
    "mlp_output": "[Y, B, L, D], what each MLP adds to the residual stream",
}

Summary = Callable[[str, str, jax.Array], jax.Array]  # stack, name, one layer's value [B, ...] -> what is returned
_SUMMARY: ContextVar[Summary | None] = ContextVar("summary", default=None)


def requested(module: nn.Module) -> list[str]:
    """The names whose values this call returns."""
    return [] if module.is_initializing() else [name for name in INTERMEDIATES if module.is_mutable_collection(name)]


def record(module: nn.Module, name: str, compute: Callable[[], jax.Array]) -> None:
    """Return `compute()` under this name, if the name is requested."""
    if name in requested(module):
        module.put_variable(name, "value", compute())


@contextlib.contextmanager
def summarized(summary: Summary | None) -> Iterator[None]:
    """Context of a call of the model: each layer returns the summary of a value, so that no stack keeps all values."""
    token = _SUMMARY.set(summary)
    try:
        yield
    finally:
        _SUMMARY.reset(token)


def returned(stack: str, variables: Mapping[str, Any]) -> dict[str, jax.Array]:
    """What a layer of a stack returns: its recorded values by name, from its Flax variables, or their summaries."""
    summary = _SUMMARY.get()
    values = {name: jax.tree.leaves(value)[0] for name, value in variables.items()}
    return values if summary is None else {name: summary(stack, name, value) for name, value in values.items()}
