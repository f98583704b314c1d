"""Values inside of the layers that can be returned by name. Nothing is computed for a name that is not asked for.

Each name is a Flax variable collection: a module that computes such a value calls `record`, which does nothing unless
the collection is mutable. `Stack` applies its blocks with the collections that are mutable in itself, and returns the
values of all layers stacked, whether layers are scanned or unrolled. `transformer.compute_intermediates` is the
interface; `model.apply(..., mutable=["residual"])` is the same in Flax's terms.
"""

from collections.abc import Callable

import flax.linen as nn
import jax

INTERMEDIATES = {
    "residual": "[Y, B, L, D], the residual stream behind each layer (the last one's final norm is the stack's output)",
    "attention_weights": "[Y, B, N, L, S] float32, of self-attention; 0 for a query that attends to no key",
    "cross_attention_weights": "[Y, B, N, L, S] float32, of the decoder's attention to the encoder's output",
    "mlp_input": "[Y, B, L, D], what each MLP reads: behind its norm, unless norms are behind the sublayers",
}


def requested(module: nn.Module) -> list[str]:
    """The names whose values this call returns."""
    return [] if module.is_initializing() else [name for name in INTERMEDIATES if module.is_mutable_collection(name)]


def record(module: nn.Module, name: str, compute: Callable[[], jax.Array]) -> None:
    """Return `compute()` under this name, if the name is requested."""
    if name in requested(module):
        module.put_variable(name, "value", compute())
