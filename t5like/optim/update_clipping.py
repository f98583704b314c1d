"""Update clipping, which makes AdamW StableAdamW (Wortsman et al. 2023, arXiv:2304.13013, algorithm 2).

Called by `optimizers`. Adafactor clips its updates in the same way, and has it there.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from t5like import tree
from t5like.config.schema import OptimizerConfig
from t5like.types import Array, Tree


def clip_updates(
    optimizer: OptimizerConfig, rule: optax.GradientTransformation, rms: Callable[[str, Array], Array]
) -> optax.GradientTransformation:
    """Divide the update of each matrix by RMS(g / sqrt(v)) where that is above 1.

    It is above 1 where gradients g are larger than their second moments v, from earlier steps, predict. The algorithm
    divides the learning rate, so that weight decay is divided as well. Its moments are those of Adam with bias
    correction, computed from corrected decay rates instead.

    Args:
        rule: a chain of Adam and weight decay.
        rms: the root mean square of each matrix in the parameter of that name, with all dims kept.
    """

    def update(grads: Tree, state: tuple, params: Tree) -> tuple[Tree, tuple]:
        updates, state = rule.update(grads, state, params)
        adam: optax.ScaleByAdamState = state[0]
        moments = optax.tree.bias_correction(adam.nu, optimizer.b2, adam.count)

        def clipped(name: str, step: Array, grad: Array, moment: Array) -> Array:
            ratio = grad * jax.lax.rsqrt(jnp.maximum(moment, optimizer.epsilon**2))
            return step / jnp.maximum(1, rms(name, ratio))

        return tree.map_named(clipped, updates, grads, moments), state

    return optax.GradientTransformation(rule.init, update)
