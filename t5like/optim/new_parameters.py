"""The first updates of an adapted model (`init_from.warmup_steps`), in which only its new parameters learn.

New are those that no checkpoint has: in an encoder-decoder made of a decoder, cross-attention and the encoder's
relative bias; those of `init_from.reinitialize`; a new head for scalars or labels. T5Gemma (Zhang et al. 2025,
arXiv:2504.06225) trains random cross-attention alone at first.

Which parameters are new depends on the config and their names alone, so a run that is continued does not need the
checkpoints that it began with. Called by `optimizers` and `step`.
"""

import jax
import jax.numpy as jnp
import optax

from t5like import tree
from t5like.config.schema import Config
from t5like.errors import ConfigError
from t5like.types import Tree

NEW_HEADS = ("scalar_head/.*", "label_head/.*")  # a checkpoint of a language model has none
OF_ADAPTATION = (r"decoder/.*cross_attention.*", r"encoder/.*relative_bias.*")


def is_new(config: Config, name: str) -> bool:
    """Whether a parameter learns in the warm-up."""
    init = config.init_from
    adapted = OF_ADAPTATION if "architecture" in init.adapt else ()
    return tree.matches(name, (*init.reinitialize, *adapted, *NEW_HEADS))


def check(config: Config, params: Tree) -> None:
    """Refuse a warm-up in which nothing would learn.

    Raises:
        ConfigError: no parameter is new, or all new ones are frozen.
    """
    steps, frozen = config.init_from.warmup_steps, config.optimizer.frozen
    if steps and not any(is_new(config, name) and not tree.matches(name, frozen) for name in tree.flatten(params)):
        raise ConfigError(
            f"init_from.warmup_steps={steps} has nothing to train: no parameter is new (init_from.adapt=architecture, "
            "init_from.reinitialize) and not frozen; use 0"
        )


def alone_at_first(config: Config, gradients: Tree, step: jax.Array) -> Tree:
    """The gradients, those of the old parameters as zeros in the warm-up; so norm and clipping are of the new ones."""
    steps = config.init_from.warmup_steps
    if not steps:
        return gradients
    keep = lambda name, leaf: leaf if is_new(config, name) else jnp.where(step < steps, jnp.zeros_like(leaf), leaf)
    return tree.map_named(keep, gradients)


def first_alone(config: Config, rule: optax.GradientTransformation) -> optax.GradientTransformation:
    """An update rule that leaves the old parameters and their optimizer state as they are in the warm-up.

    The old ones have a state of their own, whose count of updates begins after the warm-up: Adam would otherwise
    correct the bias of their first moments as if it had seen `warmup_steps` gradients.
    """
    steps = config.init_from.warmup_steps
    later = optax.conditionally_mask(rule, lambda step: step >= steps)
    label = lambda name, _: "new" if is_new(config, name) else "old"
    return optax.partition({"new": rule, "old": later}, lambda params: tree.map_named(label, params))
